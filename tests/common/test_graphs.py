"""common/graphs.py: what is recorded and when, what happens where recording fails, and the flags of the scripts.

No GPU is needed: `StandIn` takes the Recorder's place. It computes the call again at every launch, and fails where a
graph would give something else: another sequence of operations, other constants, other addresses from outside, or a
tensor that the host reads or fills. The tests at the end repeat the promises on a GPU where there is one."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common.graphs as graphs
from common.cli import ArgumentParser, UserError
from common.graphs import WARM_UPS, CaptureError, Graphed, Recorder, add_graphs_flag, graph_forward, recorder_for
from model import Generator

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_THE_HOST = {"_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero"}  # a graph cannot hold these


class Trace(TorchDispatchMode):
    """Operations with their constants, and the addresses of what they read or write that was made outside."""

    def __init__(self):
        super().__init__()
        self.operations, self.outside, self.inside, self.alive = [], set(), set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        given = list(_leaves((args, kwargs)))
        masks = name == "index" and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in given[1:])
        if name in ON_THE_HOST or masks:  # a mask is counted on the host
            raise CaptureError(f"{name} waits for the device")
        self.outside |= {address_of(x) for x in given if isinstance(x, torch.Tensor)} - self.inside - {0}
        self.operations.append((function, *(x for x in given if not isinstance(x, torch.Tensor))))
        result = function(*args, **kwargs)
        for tensor in _leaves(result):
            if isinstance(tensor, torch.Tensor) and address_of(tensor) not in self.outside:
                self.inside.add(address_of(tensor))
                self.alive.append(tensor)  # so that no address is given twice
        return result


def address_of(tensor):
    return tensor.untyped_storage().data_ptr()


def _leaves(value):
    """As torch's tree_leaves, for what operations take and give, several times as fast."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for item in value:
        yield from _leaves(item)


class StandIn:
    """A Recorder without CUDA: see the head of this file."""

    def __init__(self):
        self.warm_ups = self.recordings = self.launches = 0

    def warm_up(self, call):
        self.warm_ups += 1
        return call()

    def record(self, call):
        self.recordings += 1
        first = None

        def replay():
            nonlocal first
            self.launches += 1
            with Trace() as trace:
                result = call()
            first = first or trace
            assert trace.operations == first.operations, "another sequence of kernels, or other constants"
            assert trace.outside == first.outside, "other addresses"
            return result

        return replay


class Refusing(StandIn):
    """Recording fails, as it does on a device that cannot."""

    def record(self, call):
        raise CaptureError("operation not permitted when stream is capturing")


# -- what is recorded ----------------------------------------------------------------------------------------------


def test_calls_are_recorded_after_the_warm_ups():
    recorder = StandIn()
    double = Graphed(lambda x, *, rest, factor: (x * factor, [rest["bias"] + x]), recorder)
    for k in range(WARM_UPS + 3):
        x, bias = torch.full((2, 3), float(k)), torch.ones(3)
        product, (total,) = double(x, rest={"bias": bias, "unused": None}, factor=2.0)
        assert torch.equal(product, 2 * x) and torch.equal(total, x + 1)
    assert (recorder.warm_ups, recorder.recordings, recorder.launches) == (WARM_UPS, 1, 3)
    double(torch.zeros(1, 3), rest={"bias": torch.ones(3), "unused": None}, factor=2.0)  # a last, smaller batch
    double(torch.zeros(2, 3), rest={"bias": torch.ones(3), "unused": None}, factor=3.0)  # another constant
    with torch.autocast("cpu", torch.bfloat16):
        double(torch.zeros(2, 3), rest={"bias": torch.ones(3), "unused": None}, factor=2.0)
    assert (recorder.warm_ups, recorder.recordings, recorder.launches) == (WARM_UPS + 3, 1, 3)


def test_results_outlive_the_next_launch():
    recorder, kept = StandIn(), torch.zeros(2)

    def function(x):  # as a graph does: into the same tensor each time
        return kept.copy_(x)

    graphed = Graphed(function, recorder)
    for _ in range(WARM_UPS):
        graphed(torch.zeros(2))
    first, second = graphed(torch.ones(2)), graphed(torch.full((2,), 2.0))
    assert first.tolist() == [1, 1] and second.tolist() == [2, 2] and recorder.launches == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x[0]),
        lambda x: x if x.sum() > 2 else -x,
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x[x > 0],
    ],
)
def test_the_stand_in_sees_what_a_graph_cannot_hold(function):
    with pytest.raises(CaptureError, match="waits for the device"):
        StandIn().record(lambda: function(torch.ones(2)))()


def test_the_stand_in_sees_constants_and_addresses_that_change():
    counter, tensors = iter(range(9)), iter([torch.zeros(2), torch.ones(2)])
    replay = StandIn().record(lambda: torch.ones(2) * next(counter))
    replay()
    with pytest.raises(AssertionError, match="other constants"):
        replay()
    replay = StandIn().record(lambda: next(tensors) * 2)
    replay()
    with pytest.raises(AssertionError, match="other addresses"):
        replay()


def test_a_network_is_launched_without_gradients_only(tiny_config):
    torch.manual_seed(0)
    generator = Generator(tiny_config).eval()
    codes = [generator.get_latent(generator.draw_z(2)).detach() for _ in range(WARM_UPS + 3)]
    with torch.no_grad():
        plain = [generator(w, input_is_latent=True, noise=generator.fixed_noise())[0] for w in codes]
    recorder = StandIn()
    graph_forward(generator, recorder)
    graph_forward(generator, None)  # changes nothing
    with torch.no_grad():
        found = [generator(w, input_is_latent=True, noise=generator.fixed_noise())[0] for w in codes]
    assert recorder.launches == 3
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    image, _ = generator(codes[0].requires_grad_(), input_is_latent=True, noise=generator.fixed_noise())
    image.sum().backward()
    assert codes[0].grad is not None and recorder.launches == 3


# -- where it does not work ----------------------------------------------------------------------------------------


def test_a_failure_is_one_warning_and_plain_calls():
    recorder = Refusing()
    graphed = Graphed(lambda x: x + 1, recorder)
    with pytest.warns(UserWarning, match="--graphs on: .*operation not permitted.* is launched by itself") as seen:
        results = [graphed(torch.full((2,), float(k))) for k in range(WARM_UPS + 4)]
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert [r[0].item() for r in results] == [k + 1 for k in range(WARM_UPS + 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(WARM_UPS + 2):
            graphed(torch.zeros(3))  # another kind of call is not tried


def test_a_mistake_is_no_failure_to_record():
    def function(x):
        raise ValueError("of the program")

    with pytest.raises(ValueError, match="of the program"):
        Graphed(function, StandIn())(torch.zeros(1))


def test_recording_that_fails_resets_the_generator(monkeypatch):
    """The Recorder's own handling, with CUDA's parts replaced: one line of reason, and a fresh generator state."""
    states = []

    class Graph:
        def __init__(self, *args, **kwargs):
            self.options = kwargs

        def __enter__(self):
            assert self.options["capture_error_mode"] == "thread_local" and self.options["pool"] == "pool"

        def __exit__(self, *error):
            raise torch.AcceleratorError("CUDA error: operation failed\nCompile with TORCH_USE_CUDA_DSA")

    default = SimpleNamespace(graphsafe_set_state=states.append)
    monkeypatch.setattr(graphs.torch, "Generator", lambda d: SimpleNamespace(graphsafe_get_state=lambda: ("new", d)))
    monkeypatch.setattr(torch.cuda, "default_generators", [None, default])
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    recorder = Recorder.__new__(Recorder)
    recorder.device, recorder.stream, recorder.pool = torch.device("cuda:1"), "stream", "pool"
    with pytest.raises(CaptureError) as caught:
        recorder.record(lambda: None)
    assert str(caught.value) == "CUDA error: operation failed"
    assert states == [("new", torch.device("cuda:1"))]


# -- flags ---------------------------------------------------------------------------------------------------------


def test_flag_and_refusal():
    parser = ArgumentParser()
    add_graphs_flag(parser, "everything")
    assert parser.parse_args([]).graphs == "off" and parser.parse_args(["--graphs", "on"]).graphs == "on"
    assert recorder_for("off", torch.device("cpu")) is None
    with pytest.raises(UserError, match="--graphs on needs a CUDA device, this is cpu: leave it out"):
        recorder_for("on", torch.device("cpu"))


# -- on a GPU ------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.gpu
def test_a_launch_draws_what_a_call_draws():
    """torch.manual_seed before a launch has the effect that it has before a call."""
    graphed = Graphed(lambda x: (x + torch.randn_like(x), torch.rand(3, device="cuda")), Recorder("cuda:0"))
    for seed in range(WARM_UPS + 3):
        x = torch.zeros(5, device="cuda")
        torch.manual_seed(seed)
        found = graphed(x)
        torch.manual_seed(seed)
        expected = x + torch.randn_like(x), torch.rand(3, device="cuda")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert graphed.recordings and not graphed.failed


@needs_cuda
@pytest.mark.gpu
def test_a_generator_on_the_gpu(tiny_config):
    generator = Generator(tiny_config).eval().cuda()
    codes = [generator.get_latent(generator.draw_z(2).cuda()).detach() for _ in range(WARM_UPS + 2)]
    with torch.no_grad():
        plain = [generator(w, input_is_latent=True, randomize_noise=False)[0] for w in codes]
        graph_forward(generator, Recorder("cuda:0"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [generator(w, input_is_latent=True, randomize_noise=False)[0] for w in codes]
    for a, b in zip(found, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@needs_cuda
@pytest.mark.gpu
def test_what_cannot_be_recorded_on_the_gpu_goes_on():
    graphed = Graphed(lambda x: x * float(x[0]) + torch.rand_like(x), Recorder("cuda:0"))
    x = torch.full((4,), 2.0, device="cuda")
    with pytest.warns(UserWarning, match="could not be recorded"):
        results = [graphed(x) for _ in range(WARM_UPS + 3)]
    assert all(((4 <= r) & (r <= 5)).all() for r in results)
    assert torch.randn(3, device="cuda").isfinite().all()
