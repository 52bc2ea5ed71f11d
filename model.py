"""StyleGAN2 with a transformer mapping network (W++), and with the classic one (W): everything that has weights.

The synthesis network and the discriminator are StyleGAN2's (Karras et al. 2020, arXiv 1912.04958). The W++ mapping
network (Li et al. 2024, arXiv 2105.14230) maps one latent per token, L = 2*(log2(size)-1) tokens, through eight blocks
of self-attention, so that the native output space has one vector per synthesis layer. Tensor names are those of
rosinality/stylegan2-pytorch and AnonSubm2021/TransStyleGAN: their checkpoints load with `load_generator`.

    generator = load_generator("checkpoints/face-wpp-128.safetensors", "cpu")
    images, latents = generator(generator.draw_z(3), truncation=0.7, truncation_latent=generator.mean_latent())
"""

from pathlib import Path

import torch
from torch import nn

from common.checkpoint import CheckpointError, load_strictly
from common.generator_file import GeneratorConfig, Statistics, generator_fingerprint, read_generator
from layers import ConstantInput, ConvLayer, EqualLinear, ResBlock, StyledConv, ToRGB, build_mapping

STATISTICS_STREAM = 0x6D65616E  # keeps the samples of latent_statistics apart from latents and weights of the same seed
NOISE_STREAM = 0x9E3779B9  # turns the seed of a latent into that of its noise; the generator takes 32 bits
STDDEV_GROUP = 4  # images over which the minibatch standard deviation is taken, as published
CONDITION_GAIN = 8.0  # a condition in [0,1] enters as gain * (2a - 1): large enough beside a w of std ~2


class Generator(nn.Module):
    """z [N, L, 512] (W++), [N, 512] or [N, L, 512] (W)  ->  image [N, 3, size, size], about [-1, 1]."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.path: Path | None = None  # the file it came from: this and the next three are set by load_generator
        self.fingerprint: str | None = None
        self.recommended: dict[str, dict] = {}  # script -> flag -> value
        self.statistics: Statistics | None = None
        self.compute_dtype = torch.float32  # of the convolutions; mapping and image sum stay in float32
        self.uses_noise = True  # False: all strengths are and stay zero, so that noise is left out
        dim = config.style_dim + config.condition_dim

        self.style = build_mapping(config)
        # W maps without tokens: rosinality's strict load would refuse the name, older files of ours have it
        self.register_buffer("token", torch.eye(config.n_tokens), persistent=not config.w_space)
        self.unused = ("token",) if config.w_space else ()  # names that a state may have in addition
        self.input = ConstantInput(config.channels(4))
        self.conv1 = StyledConv(config.channels(4), config.channels(4), 3, dim)
        self.to_rgb1 = ToRGB(config.channels(4), dim, upsample=False)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        width, resolution = config.channels(4), 8
        while resolution <= config.size:
            out = config.channels(resolution)
            self.convs.append(StyledConv(width, out, 3, dim, up=True))
            self.convs.append(StyledConv(out, out, 3, dim))
            self.to_rgbs.append(ToRGB(out, dim))
            width, resolution = out, resolution * 2
        for i in range(config.n_noise):
            side = config.noise_size(i)
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, side, side))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in self.unused:
            state_dict.pop(prefix + name, None)  # of torch's own copy
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def tokens(self, z):
        """W++ input: z [N, T, 512] with the one-hot token appended -> PixelNorm over both -> [N, T, 512+T]."""
        return self.style[0](torch.cat((z, self.token.to(z.dtype).expand(z.shape[0], -1, -1)), dim=-1))

    def get_latent(self, z):
        """z -> w [N, L, 512]. W accepts [N, 512] (one vector for all layers) or [N, L, 512] (each mapped alone)."""
        config = self.config
        if config.w_space and z.shape[1:] == (config.style_dim,):
            return self.style(z)[:, None].expand(-1, config.n_tokens, -1)
        if z.shape[1:] != (config.n_tokens, config.style_dim):
            vector = f"[N, {config.style_dim}] or " if config.w_space else ""
            shapes = f"{vector}[N, {config.n_tokens}, {config.style_dim}]"
            raise ValueError(f"{config.space.upper()} at size {config.size} maps z {shapes}, got {list(z.shape)}")
        if not config.has_attention:
            return self.style(z)
        return self.style[1:](self.tokens(z))

    @torch.no_grad()
    def get_similarity(self, z) -> torch.Tensor:
        """Attention between tokens, batch mean: [n_mlp, heads, T, T], rows = query. ValueError without attention."""
        if not self.config.has_attention:
            raise ValueError("only W++ has attention maps: neither W nor W++ with independent mappings")
        x, maps = self.tokens(z), []
        for block in self.style[1:]:
            maps.append(block.atten.similarity(block.norm(x)).mean(0))
            x = block(x)
        return torch.stack(maps)

    def draw_z(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Standard normal z on the CPU: [n, L, 512] (W++) or [n, 512] (W)."""
        config = self.config
        shape = (n, config.style_dim) if config.w_space else (n, config.n_tokens, config.style_dim)
        return torch.randn(shape, generator=generator)

    @torch.no_grad()
    def latent_statistics(self, n: int = 10_000, seed: int = 0, batch: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [1, L, 512] and per-token deviation [L] (sqrt(sum_c var_c), as the projector uses it) of w over n seeded
        samples; accumulated in float64, so independent of the batch. Those of the generator's file are returned instead
        where they stand for at least n samples, whatever the seed."""
        if self.statistics is not None and n <= self.statistics.samples:
            return self.statistics.mean.to(self.token.device), self.statistics.std.to(self.token.device)
        draw = torch.Generator().manual_seed(seed ^ STATISTICS_STREAM)
        total = square = 0
        for start in range(0, n, batch):
            z = self.draw_z(min(batch, n - start), draw)
            w = self.get_latent(z.to(self.token.device)).cpu().double()  # [B, L, 512]
            total, square = total + w.sum(0), square + w.square().sum(0)
        mean = total / n
        std = (square / n - mean.square()).clamp(min=0).sum(-1).sqrt()
        return mean[None].float().to(self.token.device), std.float().to(self.token.device)

    def mean_latent(self, n: int = 10_000) -> torch.Tensor:
        """Mean w per token, [1, L, 512], of n samples."""
        return self.latent_statistics(n)[0]

    @property
    def noise_strengths(self) -> list[nn.Parameter]:
        return [block.noise.weight for block in (self.conv1, *self.convs)]

    def fixed_noise(self) -> list[torch.Tensor]:
        """The stored noise maps, each [1, 1, r, r]."""
        return [getattr(self.noises, f"noise_{i}") for i in range(self.config.n_noise)]

    def seeded_noise(self, seeds: list[int]) -> list[torch.Tensor]:
        """Noise maps [N, 1, r, r] drawn on the CPU, each image from its own seed: the same whatever batch or device."""
        # Another stream than common.latents.draw_z has for the same seed, else the noise would repeat the latent
        draws = [torch.Generator().manual_seed(int(seed) ^ NOISE_STREAM) for seed in seeds]
        sides = [self.config.noise_size(i) for i in range(self.config.n_noise)]
        maps = [torch.stack([torch.randn(1, side, side, generator=g) for g in draws]) for side in sides]
        return [m.to(self.token.device) for m in maps]

    def forward(
        self,
        styles: torch.Tensor,
        *,
        input_is_latent: bool = False,
        truncation: float = 1.0,
        truncation_latent: torch.Tensor | None = None,
        noise: list[torch.Tensor | None] | None = None,
        randomize_noise: bool = True,
        condition: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image float32 [N, 3, size, size], and the w used, [N, L, 512] without the condition.

        styles: z (see get_latent), or w [N, 512] | [N, L, 512] with input_is_latent. truncation: psi in
        w = mean + psi*(w - mean), per token; needs truncation_latent (from mean_latent) when not 1. noise: maps
        [N or 1, 1, r, r] per layer (None entries: random); default random, or the stored maps with
        randomize_noise=False. condition: attributes [N, d] in [0, 1] of a conditional generator, d = condition_dim, or
        [N, L, d], per token. dtype: of the convolutions in this call. Raises ValueError on shapes that do not fit.
        """
        config = self.config
        latent = styles if input_is_latent else self.get_latent(styles)
        if latent.ndim == 2:
            latent = latent[:, None].expand(-1, config.n_tokens, -1)
        if latent.shape[1:] != (config.n_tokens, config.style_dim):
            shape = f"[N, {config.n_tokens}, {config.style_dim}], got {list(latent.shape)}"
            raise ValueError(f"this generator ({config.space}, {config.size} px) takes w {shape}")
        if truncation != 1:
            if truncation_latent is None:
                raise ValueError("truncation needs truncation_latent = generator.mean_latent(n)")
            latent = torch.lerp(truncation_latent.to(latent), latent, truncation)
        if noise is None:
            noise = [None] * config.n_noise if randomize_noise else self.fixed_noise()
        sides = [config.noise_size(i) for i in range(config.n_noise)]
        given = [None if n is None else n.shape[-1] for n in noise]
        if len(given) != len(sides) or any(g not in (None, side) for g, side in zip(given, sides, strict=True)):
            raise ValueError(f"noise must be {len(sides)} maps [N or 1, 1, r, r] with r = {sides}, got {given}")
        maps = zip(noise, sides, strict=True)
        maps = [latent.new_empty(len(latent), 1, r, r).normal_() if n is None else n for n, r in maps]
        noise = maps if self.uses_noise else [None] * len(sides)
        w = self.add_condition(latent, condition)  # [N, L, 512 + condition_dim]

        x = self.input.input.to(dtype or self.compute_dtype).expand(latent.shape[0], -1, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last)  # [N, C, 4, 4]
        x = self.conv1(x, w[:, 0], noise[0])
        image = self.to_rgb1(x, w[:, 1])  # [N, 3, 4, 4]
        for i, to_rgb in enumerate(self.to_rgbs):  # tokens 2i+1, 2i+2, and 2i+3, which the next block shares
            x = self.convs[2 * i](x, w[:, 2 * i + 1], noise[2 * i + 1])  # resolution doubles
            x = self.convs[2 * i + 1](x, w[:, 2 * i + 2], noise[2 * i + 2])
            image = to_rgb(x, w[:, 2 * i + 3], image)
        return image, latent

    def add_condition(self, latent, condition):
        """Append the centred, scaled attributes to every token; None stands for the neutral 0.5."""
        dim = self.config.condition_dim
        if dim == 0:
            if condition is not None:
                raise ValueError("this generator is unconditional: it takes no condition")
            return latent
        n, n_tokens, _ = latent.shape
        condition = latent.new_full((n, dim), 0.5) if condition is None else condition
        if condition.shape not in ((n, dim), (n, n_tokens, dim)):
            raise ValueError(f"condition must be [{n}, {dim}] or [{n}, {n_tokens}, {dim}], got {list(condition.shape)}")
        signal = CONDITION_GAIN * (2 * condition - 1)
        signal = signal if signal.ndim == 3 else signal[:, None].expand(-1, n_tokens, -1)
        return torch.cat((latent, signal), dim=-1)


def stddev_group(batch: int) -> int:
    """The largest group of at most STDDEV_GROUP images that divides the batch: any batch size works."""
    return max(g for g in range(1, STDDEV_GROUP + 1) if batch % g == 0)


class Discriminator(nn.Module):
    """Image [N, 3, size, size] in [-1, 1] -> realness logit [N, 1]."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        width = config.channels(config.size)
        layers = [ConvLayer(3, width, 1)]
        resolution = config.size
        while resolution > 4:
            out = config.channels(resolution // 2)
            layers.append(ResBlock(width, out))
            width, resolution = out, resolution // 2
        self.convs = nn.Sequential(*layers)
        self.final_conv = ConvLayer(width + 1, width, 3)
        self.final_linear = nn.Sequential(EqualLinear(width * 16, width, activation=True), EqualLinear(width, 1))

    def features(self, images, dtype=None):
        """The activations before the minibatch statistic, [N, C, 4, 4]."""
        x = images.to(dtype or self.compute_dtype).contiguous(memory_format=torch.channels_last)
        return self.convs(x)

    def forward(self, images, dtype=None):
        """Logits [N, 1]."""
        x = self.features(images, dtype).to(self.final_conv[0].weight.dtype)  # the head keeps the parameters' precision
        n, channels, height, width = x.shape
        group = stddev_group(n)
        # Minibatch standard deviation (Karras et al. 2018, arXiv 1710.10196), one statistic per group
        std = x.view(group, n // group, channels, height, width).var(0, unbiased=False).add(1e-8).sqrt()
        std = std.mean((1, 2, 3)).repeat(group).view(n, 1, 1, 1).expand(-1, 1, height, width)
        x = self.final_conv(torch.cat((x, std), 1))
        return self.final_linear(x.flatten(1))  # channels_last strides are copied to [N, C*4*4] in NCHW order


def load_generator(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Generator:
    """The generator in a file, with EMA weights, in eval mode, gradients off, on `device`; dtype: of the convolutions.
    The architecture comes from the file. Beside the weights the generator keeps `path`, `fingerprint` (of the weights
    in float32), `recommended` (settings that suit it, per script flag names and values), and the statistics of w that
    the file has. Raises FileNotFoundError, or CheckpointError naming what does not fit, or for damaged weights."""
    state, config, file = read_generator(path)
    generator = Generator(config)
    load_strictly(generator, {k: v.float() for k, v in state.items()}, path)
    generator.uses_noise = any(map(bool, generator.noise_strengths))
    generator.fingerprint = generator_fingerprint(generator.state_dict())
    stated = file.get("fingerprint") if Path(path).suffix == ".safetensors" else None
    if stated not in (None, generator.fingerprint):
        found = f"its weights have the fingerprint {generator.fingerprint}, its header says {stated}"
        raise CheckpointError(f"{path} is damaged: {found}; copy or download it again")
    generator.path, generator.compute_dtype = Path(path), dtype
    generator.recommended, generator.statistics = file.get("recommended", {}), file.get("statistics")
    return generator.eval().requires_grad_(False).to(device)
