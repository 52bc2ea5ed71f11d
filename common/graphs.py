"""CUDA graphs: the kernels of a function recorded once and launched again as one, where shapes never change.

A generator at 64 px is some hundred small kernels, each launched by Python in more time than it runs. A graph launches
them all at once, but only as they were: same addresses, same shapes, no decision on the host. So inputs are copied into
buffers that stay, and what cannot be recorded is called as before, with one warning. Recording follows PyTorch's notes
(docs, "CUDA semantics", section "CUDA Graphs"): some plain calls on a side stream first, one memory pool for all graphs
that are never launched at the same time. Random numbers: a launch reads seed and offset of the default generator, so
that torch.manual_seed before it has the effect that it has before a plain call.

    graph_forward(generator, recorder_for("on", device))      # calls without gradients are launched from now on
    objective = Graphed(function, Recorder(device))
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from common.cli import UserError

GRAPHS = ("off", "on")
WARM_UPS = 3  # plain calls before a recording: libraries choose algorithms, kernels are compiled, constants are made
LOST = "every kernel is launched by itself, which costs small networks most of their speed"


def add_graphs_flag(parser, what: str) -> None:
    """Add `--graphs`; what: the part of the work that it records, as a phrase."""
    parser.add_argument(
        "--graphs",
        choices=GRAPHS,
        default="off",
        help=f"on: record {what} as CUDA graphs, launched as a whole (for CUDA; off by default, since "
        "no GPU has run it yet)",
    )


def recorder_for(graphs: str, device: torch.device) -> Recorder | None:
    """What `--graphs` asks for on a device; None for off. Raises UserError where there is no CUDA."""
    if graphs == "off":
        return None
    if torch.device(device).type != "cuda":
        raise UserError(f"--graphs on needs a CUDA device, this is {device}: leave it out")
    return Recorder(device)


class CaptureError(RuntimeError):
    """A function could not be recorded; the message is one line."""


class Recorder:
    """Records on one side stream of a CUDA device, into one pool of memory that all its graphs share."""

    def __init__(self, device: torch.device):
        self.device = torch.device(device)
        self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable):
        """The result of call(), computed where recordings are made."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def record(self, call: Callable) -> Callable:
        """Records call() without computing anything. The function that is returned computes: the same kernels on the
        same addresses, and the same result tensors, overwritten each time. Raises CaptureError."""
        torch.clear_autocast_cache()  # a weight that was cast before belongs to no graph and will be freed
        graph = torch.cuda.CUDAGraph()
        try:  # thread_local: the loader's pinning thread and NCCL's watchdog may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = call()
        except RuntimeError as error:
            self.recover()
            raise CaptureError(str(error).strip().partition("\n")[0] or type(error).__name__) from error

        def replay():
            graph.replay()
            return result

        return replay

    def recover(self) -> None:
        """After a failed recording: up to torch 2.11 or so the default generator believes that it still goes on, and
        refuses to draw. A new state in its place does not; graphs recorded before would read the old one."""
        fresh = torch.Generator(self.device)
        torch.cuda.default_generators[self.device.index or 0].graphsafe_set_state(fresh.graphsafe_get_state())


class Graphed:
    """A function of tensors, in any nesting of lists, tuples and dicts, together with plain hashable values.

    Each combination of shapes and plain values is recorded after WARM_UPS calls of its kind; a smaller last batch comes
    once and is called plainly. Results are new tensors. The function must not read tensors on the host, and what it
    reads besides its arguments (weights) must stay where it is. After one failure all calls are plain ones.
    """

    def __init__(self, function: Callable, recorder: Recorder):
        self.function, self.recorder = function, recorder
        self.counts: dict[tuple, int] = {}
        self.recordings: dict[tuple, tuple] = {}  # kind of call -> its input tensors, its replay
        self.failed = False

    def __call__(self, *args, **kwargs):
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kind = (str(structure), self._mode(tensors), *map(_describe, leaves))
        if kind not in self.recordings:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if self.failed:
                return self.function(*args, **kwargs)
            if self.counts[kind] <= WARM_UPS or not self._record(kind, leaves, structure):
                return self.recorder.warm_up(functools.partial(self.function, *args, **kwargs))
        inputs, replay = self.recordings[kind]
        for buffer, tensor in zip(inputs, tensors, strict=True):
            buffer.copy_(tensor)
        return tree_map_only(torch.Tensor, torch.clone, replay())

    @staticmethod
    def _mode(tensors) -> tuple:
        """What decides about a call besides its arguments."""
        device = tensors[0].device.type if tensors else "cpu"
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return autocast, torch.is_grad_enabled()

    def _record(self, kind: tuple, leaves: list, structure) -> bool:
        held = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = structure.unflatten(held)
        try:
            replay = self.recorder.record(functools.partial(self.function, *args, **kwargs))
        except CaptureError as error:
            self.failed = True
            self.recordings.clear()  # see Recorder.recover
            warn_of_failure("this function", error)
            return False
        self.recordings[kind] = [leaf for leaf in held if isinstance(leaf, torch.Tensor)], replay
        return True


def _describe(leaf):
    """What must not change from the recording to a launch."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def warn_of_failure(what: str, error: CaptureError) -> None:
    warnings.warn(f"--graphs on: {what} could not be recorded ({error}): {LOST}", stacklevel=4)


def graph_forward(network: torch.nn.Module, recorder: Recorder | None) -> None:
    """From now on calls of a network without gradients are launched as graphs (recorder None: nothing changes).

    Its weights must stay where they are.
    """
    if recorder is None:
        return
    plain = network.forward
    graphed = Graphed(plain, recorder)

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        return plain(*args, **kwargs) if torch.is_grad_enabled() else graphed(*args, **kwargs)

    network.forward = forward
