"""The two operations of `op` as Triton kernels, with the reference's results up to rounding. See op/dispatch.py."""

from op.triton.act import noise_bias_act
from op.triton.fir import resample

__all__ = ["noise_bias_act", "resample"]
