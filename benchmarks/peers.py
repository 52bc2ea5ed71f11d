"""A peer's generator or training phases at one size and batch, from a folder that holds the peer's repository.

nvidia: NVlabs/stylegan3, config stylegan2 (W, the four highest resolutions in fp16 unless --precision fp32, its losses,
its gradient hygiene and moving average as training_loop.py has them). rosinality: rosinality/stylegan2-pytorch (W,
fp32, losses and schedule of its train.py; channel_max must be 512). On CUDA both compile their extensions at first use;
on a CPU their plain PyTorch code runs. Without augmentation, on random images that lie on the device; NVIDIA's fp32
is without TF32, as its loop sets it. bench_train.py and bench_generate.py start this program, because the peers'
modules have the names of ours (`model`, `op`, `training`).

    python benchmarks/peers.py --peer rosinality --folder stylegan2-pytorch --part training --size 64 --batch 4
"""

import copy
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measuring import forget_peak, latent_gradient, median_seconds, peak_memory  # noqa: E402
from benchmarks.rounds import Schedule, measure_schedule  # noqa: E402
from common.cli import ArgumentParser, UsageError, run_script  # noqa: E402

R1, PATH, PATH_DECAY, MIXING = 10.0, 2.0, 0.01, 0.9
D_REG_EVERY, G_REG_EVERY, PATH_SHRINK = 16, 4, 2
EMA_DECAY = 0.5 ** (32 / 10_000)


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=list(PEERS), required=True, help="whose code")
    parser.add_argument("--folder", type=Path, required=True, help="its repository")
    parser.add_argument("--part", choices=("training", "generator"), required=True, help="what to measure")
    parser.add_argument("--size", type=int, default=256, help="image size")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="fp16: of NVIDIA's top layers")
    parser.add_argument("--channel_max", type=int, default=512, help="largest number of feature maps")
    parser.add_argument("--channel_multiplier", type=float, default=2, help="scales the widths above 32 pixels")
    parser.add_argument("--n_mlp", type=int, default=8, help="mapping layers")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per number")
    parser.add_argument("--steps", type=int, default=0, help="steps of the schedule to run; 0: only the phases")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--device", default="cpu", help="cpu | cuda[:i]")
    return parser


def adam(network, every):
    """Adam corrected for lazy regularisation, with the peers' common step size."""
    ratio = every / (every + 1)
    return torch.optim.Adam(network.parameters(), lr=0.002 * ratio, betas=(0.0, 0.99**ratio))


def require_own(module, folder: Path) -> None:
    """Raise UsageError when `module` is not the peer's but of the same name elsewhere, such as ours."""
    if not Path(module.__file__).resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder} holds no {module.__name__} of the peer's: expected a checkout of its repository")


def stand_in(name, **content):
    """A module that the peer imports, where it is absent: with what is called of it here."""
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)


# ---------------------------------------------------------------------------------------------------------------------
# NVIDIA


class Nvidia:
    def __init__(self, args, device):
        from packaging.version import parse

        stand_in("pkg_resources", parse_version=parse)  # gone from setuptools since
        stand_in("requests")  # for downloads, of which there are none here
        import training

        require_own(training, args.folder)
        from torch_utils.ops import conv2d_gradfix, grid_sample_gradfix
        from training.networks_stylegan2 import Discriminator, Generator

        if device.type == "cuda":  # as its training_loop.py sets them
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        conv2d_gradfix.enabled = grid_sample_gradfix.enabled = True
        half = {} if args.precision == "fp16" else {"num_fp16_res": 0, "conv_clamp": None}
        common = {
            "c_dim": 0,
            "img_resolution": args.size,
            "img_channels": 3,
            "channel_max": args.channel_max,
            "channel_base": int(16384 * args.channel_multiplier),
            **half,
        }
        self.device, self.batch = device, args.batch
        self.g = Generator(
            z_dim=512,
            w_dim=512,
            mapping_kwargs={"num_layers": args.n_mlp},
            fused_modconv_default="inference_only",
            **common,
        ).to(device)
        self.d = Discriminator(**common).to(device)

    def mapping(self, z):
        return self.g.mapping(z, None)

    def synthesis(self, w):
        return self.g.synthesis(w, noise_mode="const")

    def schedule(self):
        from training.loss import StyleGAN2Loss

        g, d, device, batch = self.g.requires_grad_(False), self.d.requires_grad_(False), self.device, self.batch
        average_g = copy.deepcopy(g).eval()
        loss = StyleGAN2Loss(
            device,
            g,
            d,
            r1_gamma=R1,
            style_mixing_prob=MIXING,
            pl_weight=PATH,
            pl_batch_shrink=PATH_SHRINK,
            pl_no_weight_grad=True,
        )
        optimisers = {g: adam(g, G_REG_EVERY), d: adam(d, D_REG_EVERY)}
        pixels = torch.randint(0, 256, (batch, 3, self.g.img_resolution, self.g.img_resolution), dtype=torch.uint8)
        pixels, labels = pixels.to(device), torch.zeros(batch, 0, device=device)

        def run_phase(name, network, gain):
            real, z = pixels.float() / 127.5 - 1, torch.randn(batch, 512, device=device)
            optimisers[network].zero_grad(set_to_none=True)
            network.requires_grad_(True)
            loss.accumulate_gradients(name, real, labels, z, labels, gain, 0)
            network.requires_grad_(False)
            with_gradient = [p for p in network.parameters() if p.grad is not None]
            flat = torch.cat([p.grad.flatten() for p in with_gradient]).nan_to_num_(nan=0, posinf=1e5, neginf=-1e5)
            for p, grad in zip(with_gradient, flat.split([p.numel() for p in with_gradient]), strict=True):
                p.grad = grad.reshape(p.shape)
            optimisers[network].step()

        @torch.no_grad()
        def average():
            for mean, p in zip(average_g.parameters(), g.parameters(), strict=True):
                mean.copy_(p.lerp(mean, EMA_DECAY))
            for mean, buffer in zip(average_g.buffers(), g.buffers(), strict=True):
                mean.copy_(buffer)

        return Schedule(
            {
                "d": lambda: run_phase("Dmain", d, 1),
                "r1": lambda: run_phase("Dreg", d, D_REG_EVERY),
                "g": lambda: run_phase("Gmain", g, 1),
                "path": lambda: run_phase("Greg", g, G_REG_EVERY),
                "average": average,
            },
            {"r1": D_REG_EVERY, "path": G_REG_EVERY},
        )


# ---------------------------------------------------------------------------------------------------------------------
# rosinality


class Rosinality:
    def __init__(self, args, device):
        if args.channel_max != 512:
            raise UsageError(f"rosinality's widths are fixed: --channel_max 512, not {args.channel_max}")
        if device.type == "cpu":  # it builds its CUDA extension at import, though a CPU never calls it
            import torch.utils.cpp_extension

            torch.utils.cpp_extension.load = lambda *args, **kwargs: None
        import model

        require_own(model, args.folder)
        self.device, self.batch, self.size = device, args.batch, args.size
        multiplier = int(args.channel_multiplier)
        self.g = model.Generator(args.size, 512, args.n_mlp, channel_multiplier=multiplier).to(device)
        self.d = model.Discriminator(args.size, channel_multiplier=multiplier).to(device)

    def mapping(self, z):
        return self.g.style(z)

    def synthesis(self, w):
        return self.g([w], input_is_latent=True, randomize_noise=False)[0]

    def draw(self, n):
        """z of one or, for style mixing, two latents."""
        mixed = torch.rand(()) < MIXING
        return list(torch.randn(2 if mixed else 1, n, 512, device=self.device).unbind(0))

    def schedule(self):
        from op import conv2d_gradfix

        g, d, device, batch = self.g, self.d, self.device, self.batch
        average_g, mean_path = copy.deepcopy(g).eval(), torch.zeros((), device=device)
        optimisers = {g: adam(g, G_REG_EVERY), d: adam(d, D_REG_EVERY)}
        real = torch.rand(batch, 3, self.size, self.size, device=device) * 2 - 1

        def run_phase(network, loss):
            g.requires_grad_(network is g)
            d.requires_grad_(network is d)
            network.zero_grad()
            loss().backward()
            optimisers[network].step()

        def d_loss():
            fake = g(self.draw(batch))[0]
            return F.softplus(-d(real)).mean() + F.softplus(d(fake)).mean()

        def r1_loss():
            images = real.detach().requires_grad_()
            logits = d(images)
            with conv2d_gradfix.no_weight_gradients():
                (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            penalty = grad.square().flatten(1).sum(1).mean()
            return R1 / 2 * penalty * D_REG_EVERY + 0 * logits[0, 0]

        def path_loss():
            images, latents = g(self.draw(max(1, batch // PATH_SHRINK)), return_latents=True)
            noise = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
            (grad,) = torch.autograd.grad((images * noise).sum(), latents, create_graph=True)
            lengths = grad.square().sum(2).mean(1).sqrt()
            mean = torch.lerp(mean_path, lengths.mean(), PATH_DECAY)
            mean_path.copy_(mean.detach())
            return PATH * G_REG_EVERY * (lengths - mean).square().mean() + 0 * images[0, 0, 0, 0]

        @torch.no_grad()
        def average():
            for mean, p in zip(average_g.parameters(), g.parameters(), strict=True):
                mean.mul_(EMA_DECAY).add_(p, alpha=1 - EMA_DECAY)

        return Schedule(
            {
                "d": lambda: run_phase(d, d_loss),
                "r1": lambda: run_phase(d, r1_loss),
                "g": lambda: run_phase(g, lambda: F.softplus(-d(g(self.draw(batch))[0])).mean()),
                "path": lambda: run_phase(g, path_loss),
                "average": average,
            },
            {"r1": D_REG_EVERY, "path": G_REG_EVERY},
        )


PEERS = {"nvidia": Nvidia, "rosinality": Rosinality}


# ---------------------------------------------------------------------------------------------------------------------


def measure_generator(peer, args, device) -> dict:
    """Seconds of mapping, of synthesis, of both, and of the gradient with respect to w, weights frozen."""
    peer.g.eval().requires_grad_(False)
    z = torch.randn(args.batch, 512, device=device)
    with torch.no_grad():
        w = peer.mapping(z)
        calls = {
            "mapping": lambda: peer.mapping(z),
            "synthesis": lambda: peer.synthesis(w),
            "forward": lambda: peer.synthesis(peer.mapping(z)),
            "latent": lambda: latent_gradient(peer.synthesis, w),
        }
        seconds = {name: median_seconds(call, args.repeats, device) for name, call in calls.items()}
    return {"seconds": seconds, "images_per_s": args.batch / seconds["forward"], "peak_bytes": peak_memory(device)}


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.folder.is_dir():
        raise FileNotFoundError(f"{args.folder}: there is no such folder with the {args.peer} repository")
    for ours in [name for name in sys.modules if name.partition(".")[0] in ("model", "op", "training")]:
        del sys.modules[ours]
    sys.path.insert(0, str(args.folder.resolve()))  # before ours: its `model`, `op`, `training` are meant
    device = torch.device(args.device)
    forget_peak(device)
    peer = PEERS[args.peer](args, device)
    if args.part == "generator":
        found = measure_generator(peer, args, device)
    else:
        found = measure_schedule(peer.schedule(), args.batch, repeats=args.repeats, steps=args.steps, device=device)
    print(json.dumps(found))


if __name__ == "__main__":
    run_script(main, build_parser())
