"""The original formulation, as the yardstick of the benchmarks: per-sample grouped convolutions on NCHW float32, and
upfirdn by zero insertion over [N*C, 1, H, W], as TransStyleGAN and rosinality/stylegan2-pytorch compute without CUDA
kernels. Same parameters and tensor names as ours, so that results can be compared number by number.

    generator = BaselineGenerator(config); generator.load_state_dict(ours.state_dict())
"""

import torch
import torch.nn.functional as F

from model import Discriminator, Generator, stddev_group


def upfirdn(x, kernel, up=1, down=1, pad=(0, 0)):
    n, c, h, w = x.shape
    x = x.reshape(n * c, h, 1, w, 1)
    x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).view(n * c, 1, h * up, w * up)  # zeros between pixels
    x = F.pad(x, (*pad, *pad))
    x = F.conv2d(x, kernel.flip(0, 1)[None, None])[:, :, ::down, ::down]
    return x.reshape(n, c, *x.shape[2:])


def linear(layer, x):
    out = F.linear(x, layer.weight * layer.scale, None if layer.activation else layer.bias * layer.lr_mul)
    return activate(out, layer.bias * layer.lr_mul) if layer.activation else out


def activate(x, bias):
    return F.leaky_relu(x + bias.view(1, -1, *[1] * (x.ndim - 2)), 0.2) * 2**0.5


def modulated_conv(conv, x, style, demodulate=True):
    n, c, h, w = x.shape
    out_channels, kernel_size = conv.weight.shape[1], conv.weight.shape[3]
    style = linear(conv.modulation, style).view(n, 1, c, 1, 1)
    weight = conv.scale * conv.weight * style  # [N, Cout, Cin, k, k]
    if demodulate:
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4)) + 1e-8).view(n, -1, 1, 1, 1)
    x = x.reshape(1, n * c, h, w)
    if conv.up:
        weight = weight.transpose(1, 2).reshape(n * c, out_channels, kernel_size, kernel_size)
        out = F.conv_transpose2d(x, weight, stride=2, groups=n)
        return upfirdn(out.view(n, out_channels, *out.shape[2:]), conv.blur.kernel, pad=conv.blur.pad)
    weight = weight.view(n * out_channels, c, kernel_size, kernel_size)
    out = F.conv2d(x, weight, padding=kernel_size // 2, groups=n)
    return out.view(n, out_channels, *out.shape[2:])


class BaselineGenerator(Generator):
    def styled(self, layer, x, style, noise):
        out = modulated_conv(layer.conv, x, style)
        if noise is None:
            noise = out.new_empty(out.shape[0], 1, *out.shape[2:]).normal_()
        return activate(out + layer.noise.weight * noise, layer.activate.bias)

    def to_rgb(self, layer, x, style, skip=None):
        out = modulated_conv(layer.conv, x, style, demodulate=False) + layer.bias
        if skip is None:
            return out
        return out + upfirdn(skip, layer.upsample.kernel, up=2, pad=layer.upsample.pad)

    def forward(self, styles, *, input_is_latent=False, noise=None, randomize_noise=True, condition=None, dtype=None):
        self.add_condition(styles, condition)  # refuses one: the original is unconditional
        latent = styles if input_is_latent else self.get_latent(styles)
        noise = noise or ([None] * self.config.n_noise if randomize_noise else self.fixed_noise())
        x = self.input.input.repeat(latent.shape[0], 1, 1, 1)
        x = self.styled(self.conv1, x, latent[:, 0], noise[0])
        image = self.to_rgb(self.to_rgb1, x, latent[:, 1])
        for i, to_rgb in enumerate(self.to_rgbs):
            x = self.styled(self.convs[2 * i], x, latent[:, 2 * i + 1], noise[2 * i + 1])
            x = self.styled(self.convs[2 * i + 1], x, latent[:, 2 * i + 2], noise[2 * i + 2])
            image = self.to_rgb(to_rgb, x, latent[:, 2 * i + 3], image)
        return image, latent


class BaselineDiscriminator(Discriminator):
    def conv(self, layer, x):
        """conv1 of a block, fromRGB, final_conv: convolution and activation."""
        conv = layer[0]
        weight = conv.weight / (conv.weight[0].numel()) ** 0.5
        return activate(F.conv2d(x, weight, padding=conv.padding), layer[1].bias)

    def down(self, layer, x):
        """conv2 and skip of a block: blur at full resolution, then a convolution of stride 2."""
        conv = layer[1]
        kernel_size = conv.weight.shape[2]
        pad = (2, 2) if kernel_size == 3 else (1, 1)
        weight = conv.weight / (conv.weight[0].numel()) ** 0.5
        out = F.conv2d(upfirdn(x, layer[0].kernel, pad=pad), weight, stride=2)
        return activate(out, layer[2].bias) if kernel_size == 3 else out

    def forward(self, images, dtype=None):
        x = self.conv(self.convs[0], images)
        for block in self.convs[1:]:
            x = (self.down(block.conv2, self.conv(block.conv1, x)) + self.down(block.skip, x)) / 2**0.5
        n, c, h, w = x.shape
        group = stddev_group(n)
        std = torch.sqrt(x.view(group, n // group, c, h, w).var(0, unbiased=False) + 1e-8)
        std = std.mean((1, 2, 3)).repeat(group).view(n, 1, 1, 1).expand(-1, 1, h, w)
        x = self.conv(self.final_conv, torch.cat((x, std), 1))
        return linear(self.final_linear[1], linear(self.final_linear[0], x.flatten(1)))
