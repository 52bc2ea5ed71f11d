"""The two operations StyleGAN2 adds to a plain convolutional network, each with the ecosystem's signature.

The reference is plain PyTorch with correct derivatives of every order, runs on any device and needs no compiler. On
CUDA the Triton kernels (triton/) stand behind the same functions: dispatch.py.
"""

from op.fused_act import FusedLeakyReLU, fused_leaky_relu, noise_bias_act
from op.upfirdn2d import upfirdn2d

__all__ = ["FusedLeakyReLU", "fused_leaky_relu", "noise_bias_act", "upfirdn2d"]
