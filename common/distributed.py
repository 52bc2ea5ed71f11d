"""Devices, ranks and the few collectives the toolkit needs. Ranks come from the environment (RANK, WORLD_SIZE,
LOCAL_RANK) that torchrun and `torch.distributed.launch` set; without it this is rank 0 of 1, alone."""

import ctypes
import itertools
import os
import platform
import re
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from common.cli import TIMEOUT, UsageError
from common.lock import lock_folder
from op import dispatch

BEAT = 2.0  # seconds between two signs of life
WORK = timedelta(days=7)  # how long ranks wait for each other's work, as long as all show signs of life
_watch = None
_control = None  # gloo group for barriers and Python objects: it names the missing rank, which nccl cannot


class DistributedError(ConnectionError):
    """A collective failed or timed out: another rank died, hangs, or never started."""


@dataclass(frozen=True)
class Distributed:
    """Place of this process among all; a context that ends with `shutdown`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutdown()

    def any_stops(self, stops, meeting):
        """Whether a rank stops. All ranks must call it. GPUs, of which none must wait for it at every step, are asked
        at a `meeting`, processors always: torchrun kills its ranks 30 seconds after SIGTERM."""
        if self.world_size == 1:
            return stops
        return (meeting or self.device.type == "cpu") and any(gather_list(stops))

    @contextmanager
    def lock(self, folder, what):
        """`lock_folder` for all ranks: held by the first, and none goes on before it is."""
        with lock_folder(folder, what) if self.is_main else nullcontext():
            barrier()
            yield


def resolve_device(name, *, ops=None):
    """torch.device for auto (cuda, then mps, then cpu), cpu, cuda, cuda:1 or mps. ops: kernels for the whole process
    from here on (`op.dispatch.choose`). Raises UsageError for another name, ValueError for a device this machine lacks,
    or one that cannot run these `ops`."""
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
    if ops is not None:
        dispatch.choose(ops)
    dispatch.require(torch.device(name))
    return torch.device(name)


def tune_allocator():
    """Keep freed memory in the process (glibc), which stays at its peak size in return. By default glibc maps new
    memory for every large tensor: an elementwise operation pays a page fault per 4 KiB, more than its arithmetic."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def setup(device="auto", *, ops=None, timeout=TIMEOUT):
    """Join the other processes, if there are any, and return this one's Distributed. device, ops: of `resolve_device`.
    An all-reduce that waits longer than `timeout` seconds raises DistributedError; so does what waits for work when a
    rank has died. A rank without a sign of life for `timeout` seconds ends this process, with a line that names it."""
    global _control, _watch
    rank, world_size = _env_int("RANK", 0), _env_int("WORLD_SIZE", 1)
    device = resolve_device(device, ops=ops)
    if device.type == "cpu":
        tune_allocator()
    if device.type == "cuda":
        if world_size > 1 and device.index is None:
            device = resolve_device(f"cuda:{_env_int('LOCAL_RANK', 0)}")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if world_size == 1:
        return Distributed(rank, world_size, device)

    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    limit = timedelta(seconds=timeout)
    with _named("joining the process group"):
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=limit))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        _control = dist.new_group(backend="gloo", timeout=WORK)
    _watch = _Watch(dist.PrefixStore("watch", store), rank, world_size, timeout)
    return Distributed(rank, world_size, device)


def _env_int(name, default):
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError as error:
        raise ValueError(f"environment variable {name}={text!r}: expected an integer") from error


class _Watch:
    """Signs of life of all ranks, exchanged by a thread through the store, and how many collectives each has entered.
    A second thread ends the process when a rank is silent: gloo and nccl never give up on a cut network."""

    def __init__(self, store, rank, world_size, timeout):
        self.store, self.rank, self.timeout = store, rank, timeout
        self.entered, self.ended, self.failing = 0, threading.Event(), False
        self.beats = [("", 0)] * world_size  # (last sign of life, collectives entered)
        self.seen = [time.monotonic()] * world_size
        for work in (self._exchange, self._guard):
            threading.Thread(target=work, daemon=True).start()

    def _exchange(self):
        keys = [str(rank) for rank in range(len(self.beats))]
        for beat in itertools.count():
            try:
                self.store.set(str(self.rank), f"{beat} {self.entered}")
                values = [value.decode() for value in self.store.multi_get(keys)]
            except RuntimeError:  # the process that keeps the store has ended
                return self.ended.set()
            for rank, value in enumerate(values):
                if value != self.beats[rank][0]:
                    self.beats[rank], self.seen[rank] = (value, int(value.split()[1])), time.monotonic()
            if self.ended.wait(BEAT):
                return None

    def silent(self, seconds):
        """Ranks without a sign of life for so long."""
        return [rank for rank, seen in enumerate(self.seen) if time.monotonic() - seen > seconds]

    def _guard(self):
        last = time.monotonic()
        while not self.ended.wait(BEAT) and not self.failing:
            before, last = last, time.monotonic()
            if last - before > self.timeout / 2:  # this process did not run: Ctrl-Z, scontrol suspend, docker pause
                self.seen = [last] * len(self.seen)
            if silent := self.silent(self.timeout):
                names = "0" if self.rank in silent else ", ".join(map(str, silent))  # no answer from rank 0's store
                print(f"error: no sign of life of rank {names} for {self.timeout:g} s", file=sys.stderr, flush=True)
                os._exit(1)

    def behind(self):
        """Ranks that have not entered this rank's last collective, or have stopped to show signs of life."""
        self.failing = True  # the collective's own error is about to be told
        time.sleep(2 * BEAT)
        late = [rank for rank, (_, entered) in enumerate(self.beats) if entered < self.entered]
        return late or self.silent(3 * BEAT)


def shutdown():
    """Leave the process group; harmless when there is none or it has been left already."""
    global _control, _watch
    _control = None
    if _watch is not None:
        _watch.ended.set()
        _watch = None
    if _joined():
        dist.destroy_process_group()


def _joined():
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _named(what):
    """Turn torch's error in a collective into one that says which rank stood where."""
    if _watch is not None:
        _watch.entered += 1
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        behind = _watch.behind() if _watch is not None else ()
        who = f"rank {', '.join(map(str, behind))}" if behind else "another rank"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        failed = f"rank {rank} of {world_size}: {what} failed, {who} has stopped or hangs ({reason})"
        raise DistributedError(failed) from error


def barrier():
    """Wait for all ranks as long as they live. Rank 0's error names who is missing."""
    if _joined():
        with _named("barrier"):
            dist.monitored_barrier(_control, WORK)  # by default 30 minutes, whatever the group's own


@torch.no_grad()
def all_reduce_mean(tensors):
    """Replace each floating-point tensor by its mean over ranks, in place: one flat buffer per dtype, one collective.
    The list must have the same shapes in the same order on every rank (gradients: fill absent ones with zeros)."""
    tensors = list(tensors) if _joined() else []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        with _named("all-reduce"):
            dist.all_reduce(flat)
        parts = flat.div_(dist.get_world_size()).split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)])


class Stats:
    """Means of scalars, added up on the device; `read` is the one place that waits for it."""

    def __init__(self, device: torch.device):
        self.device, self.sums = device, {}  # name: [sum, count]

    def report(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            total = self.sums.setdefault(name, torch.zeros(2, device=self.device))
            total[0] += value.detach()
            total[1] += 1

    def read(self) -> dict[str, float]:
        """Means since the last call, over ranks. All ranks must call it."""
        names = sorted(self.sums)
        if not names:
            return {}
        sums = torch.stack([self.sums[name] for name in names])  # [names, 2]
        self.sums.clear()
        all_reduce_mean([sums])
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True)}


def gather_list(item):
    """[item of rank 0, item of rank 1, ...] on every rank; any picklable item (tensors: on the CPU)."""
    if not _joined():
        return [item]
    items = [None] * dist.get_world_size()
    with _named("gather"):
        dist.all_gather_object(items, item, group=_control)
    return items


def broadcast_object(item):
    """Rank 0's `item`, on every rank; any picklable item."""
    if not _joined():
        return item
    box = [item]
    with _named("broadcast"):
        dist.broadcast_object_list(box, group=_control)
    return box[0]


def shard(n_items, rank, world_size):
    """The indices of rank `rank`: contiguous, together covering range(n_items), sizes equal but for one."""
    return range(n_items * rank // world_size, n_items * (rank + 1) // world_size)


def mix_seeds(*numbers: int) -> int:
    """One seed, 63 bits, of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
