"""The two operations StyleGAN2 adds to a plain convolutional network.

Each has one public function with the ecosystem's signature. The reference is plain PyTorch with correct derivatives of
every order, runs on any device and needs no compiler; faster kernels slot in behind the same functions.
"""

from op.conv import conv3x3, up_conv3x3
from op.fused_act import FusedLeakyReLU, fused_leaky_relu, noise_bias_act
from op.modulation import mix_channels, modulate
from op.upfirdn2d import upfirdn2d

__all__ = ["FusedLeakyReLU", "conv3x3", "fused_leaky_relu", "mix_channels", "modulate", "noise_bias_act",
           "up_conv3x3", "upfirdn2d"]  # fmt: skip
