"""Devices, ranks and the few collectives the toolkit needs: torchrun, `torch.distributed.launch`, or a single process.

Ranks come from the environment (RANK, WORLD_SIZE, LOCAL_RANK), as both launchers set it; without it every function
here works as rank 0 of 1 and no process group exists.
"""

import argparse
import ctypes
import os
import platform
import random
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from common.cli import UsageError
from op import dispatch

_control = None  # gloo group for barriers and Python objects: it names the missing rank, which nccl cannot


class DistributedError(ConnectionError):
    """A collective failed or timed out: another rank died, hangs, or never started."""


@dataclass(frozen=True)
class Distributed:
    """Place of this process: `rank` of `world_size` in all, `local_rank` on its machine; `backend` is None alone."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    backend: str | None

    @property
    def is_main(self):
        return self.rank == 0


def add_device_flags(parser):
    """Add `--device`, `--ops` and the `--local_rank` that `torch.distributed.launch` passes."""
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda[:i] | mps; auto takes the first there is")
    add_ops_flag(parser)
    add_rank_flag(parser)


def add_rank_flag(parser):
    """Add the `--local_rank` that `torch.distributed.launch` passes."""
    parser.add_argument("--local_rank", type=int, default=0, help="given by torch.distributed.launch; ignored")


def add_ops_flag(parser):
    """Add `--ops`. It takes effect when it is parsed, for the whole process: op/dispatch.py is asked call by call."""
    parser.add_argument(
        "--ops",
        choices=dispatch.OPS,
        action=_ChooseOps,
        help="kernels of activations and resampling: auto (Triton on CUDA, else the PyTorch reference) "
        "| ref | triton; default: $WPP_OPS, else auto",
    )


class _ChooseOps(argparse.Action):
    def __call__(self, parser, namespace, value, option_string=None):
        dispatch.choose(value)
        setattr(namespace, self.dest, value)


def resolve_device(name):
    """torch.device for 'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1' or 'mps'.

    Raises UsageError for another name, ValueError for a device this machine lacks, or one that cannot run the `--ops`
    asked for.
    """
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda, cuda:0 (1, 2 ...) or mps")
    kind, _, index = name.partition(":")
    if kind == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= found:
            raise ValueError(f"--device {name}: torch {torch.__version__} sees {found} CUDA devices; try --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this machine or PyTorch has no Metal support; try --device cpu")
    dispatch.require(torch.device(name))
    return torch.device(name)


def tune_allocator():
    """Keep freed memory in the process (glibc on Linux; elsewhere nothing happens). Call it before large work.

    By default glibc maps every large tensor anew and hands it back when freed, so that each elementwise operation pays
    a page fault per 4 KiB: several times the cost of the arithmetic. The process stays at its peak size in return.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)


def setup(device="auto", *, timeout=1800.0):
    """Join the other processes, if there are any, and return this one's Distributed.

    A `cuda` without index becomes `cuda:LOCAL_RANK`. Backend: nccl on CUDA where PyTorch has it, else gloo. A
    collective that waits for more than `timeout` seconds raises DistributedError. Call `shutdown()` at the end.
    """
    global _control
    rank, world_size, local_rank = (
        _env_int(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = resolve_device(device)
    if device.type == "cpu":
        tune_allocator()
    if device.type == "cuda":
        if world_size > 1 and device.index is None:
            device = resolve_device(f"cuda:{local_rank}")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if world_size == 1:
        return Distributed(rank, local_rank, world_size, device, None)

    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    limit = timedelta(seconds=timeout)
    with _named("joining the process group"):
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=limit)
        _control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=limit)
    return Distributed(rank, local_rank, world_size, device, backend)


def _env_int(name, default):
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError as error:
        raise ValueError(f"environment variable {name}={text!r}: expected an integer") from error


def shutdown():
    """Leave the process group; harmless when there is none or it has been left already."""
    global _control
    _control = None
    if _joined():
        dist.destroy_process_group()


def _joined():
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _named(what):
    """Turn torch's error in a collective into one that says which rank stood where."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DistributedError(
            f"rank {rank} of {world_size}: {what} failed, another rank has stopped or hangs ({reason})"
        ) from error


def barrier(timeout=None):
    """Wait for all ranks, at most `timeout` seconds (default: that of `setup`).

    Raises DistributedError, on rank 0 with the name of the rank that did not come.
    """
    if _joined():
        with _named("barrier"):
            dist.monitored_barrier(_control, None if timeout is None else timedelta(seconds=timeout))


@torch.no_grad()
def all_reduce_mean(tensors):
    """Replace each floating-point tensor by its mean over ranks, in place: one flat buffer per dtype, one collective.
    A single contiguous tensor is its own buffer.

    The list must have the same shapes in the same order on every rank (gradients: fill absent ones with zeros).
    """
    tensors = list(tensors)
    if not _joined():
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        if len(group) == 1 and group[0].is_contiguous():
            with _named("all-reduce"):
                dist.all_reduce(group[0])
            group[0] /= dist.get_world_size()
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        with _named("all-reduce"):
            dist.all_reduce(flat)
        flat /= dist.get_world_size()
        pieces = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [piece.view(tensor.shape) for piece, tensor in zip(pieces, group, strict=True)])


def gather_list(item):
    """[item of rank 0, item of rank 1, ...] on every rank; any picklable item (tensors: on the CPU)."""
    if not _joined():
        return [item]
    items = [None] * dist.get_world_size()
    with _named("gather"):
        dist.all_gather_object(items, item, group=_control)
    return items


def broadcast_object(item, source=0):
    """Rank `source`'s `item`, on every rank; any picklable item."""
    if not _joined():
        return item
    box = [item]
    with _named("broadcast"):
        dist.broadcast_object_list(box, src=source, group=_control)
    return box[0]


def shard(n_items, rank, world_size):
    """The indices of rank `rank`: contiguous, together covering range(n_items), sizes equal but for one."""
    return range(n_items * rank // world_size, n_items * (rank + 1) // world_size)


def mix_seeds(*numbers: int) -> int:
    """One seed, 63 bits, of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(seed, rank=0):
    """Seed `random`, numpy and torch (all devices); another stream per rank, the same for the same (seed, rank)."""
    seed = (seed + 1_000_003 * rank) % 2**32  # numpy takes 32 bits
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
