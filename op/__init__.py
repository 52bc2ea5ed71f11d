"""The two operations StyleGAN2 adds to a plain convolutional network.

Each has one public function with the ecosystem's signature, and two functions join them to each other. The reference
is plain PyTorch with correct derivatives of every order, runs on any device and needs no compiler. On CUDA the Triton
kernels (triton_act.py, triton_fir.py) stand behind the same functions: dispatch.py.
"""

from op.conv import conv3x3, transposed_conv3x3
from op.fused_act import FusedLeakyReLU, act_blur, blur_noise_bias_act, fused_leaky_relu, noise_bias_act
from op.modulation import mix_channels, modulate
from op.upfirdn2d import upfirdn2d

__all__ = [
    "FusedLeakyReLU",
    "act_blur",
    "blur_noise_bias_act",
    "conv3x3",
    "fused_leaky_relu",
    "mix_channels",
    "modulate",
    "noise_bias_act",
    "transposed_conv3x3",
    "upfirdn2d",
]
