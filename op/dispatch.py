"""Choice of an operation's implementation: the plain PyTorch reference, or the Triton kernels.

`auto` takes the kernels on CUDA and the reference elsewhere, call by call; `ref` and `triton` allow one of them only.
Chosen by `--ops` of every script (common/distributed.py), else by the environment variable WPP_OPS. Triton is imported
at the first call that needs it, and compiles a kernel at its first launch: importing `op` does neither.

    fast = kernels(x)
    return reference(x) if fast is None else fast.noise_bias_act(x, ...)
"""

import importlib.util
import os
import warnings

import torch

OPS = ("auto", "ref", "triton")
PERF_WARNING = (
    "bias, noise, activation and FIR filters run as separate PyTorch operations, with two to three times the memory "
    "traffic of the fused kernels"
)

_mode = None  # None: not chosen yet
_module = None  # op.triton, once it is needed; False when it cannot be


def choose(mode: str) -> None:
    """Set the implementation of this process. Raises ValueError for an unknown name."""
    global _mode
    if mode not in OPS:
        raise ValueError(f"--ops {mode}: expected one of {', '.join(OPS)} (the environment's default is WPP_OPS)")
    _mode = mode


def chosen() -> str:
    if _mode is None:
        choose(os.environ.get("WPP_OPS") or "auto")
    return _mode


def require(device: torch.device) -> None:
    """Raise ValueError when the implementation that was asked for cannot run on this device."""
    if chosen() == "triton":
        reason = obstacle(device)
        if reason:
            raise ValueError(f"--ops triton: {reason}; use --ops auto")


def kernels(x: torch.Tensor):
    """The module of Triton kernels when it is to take `x`, else None: the reference."""
    mode = _mode or chosen()
    if mode == "ref" or (mode == "auto" and x.device.type != "cuda") or not x.is_floating_point():
        return None
    if _module is None:
        _load(x.device)
    return _module or None


def _load(device):
    global _module
    require(device)
    reason = obstacle(device)
    if reason:
        warnings.warn(f"{reason}: {PERF_WARNING}", stacklevel=4)
        _module = False
    else:
        import op.triton as module

        _module = module


def obstacle(device: torch.device) -> str | None:
    """The reason, in words, for which the kernels cannot run on a device; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device, not {device.type} (in tests TRITON_INTERPRET=1 stands in for it)"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton needs compute capability 7.0, {torch.cuda.get_device_name(device)} has less"
    return None
