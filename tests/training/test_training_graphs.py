"""training/graphs.py: graphed training equals plain training bit for bit, through the recorder of test_graphs.py that
fails where a graph would not follow: W and W++, micro-batches, augmentation, resume, rollback, fallback, flags."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from test_graphs import Refusing, StandIn, needs_cuda
from test_training import ALONE, assert_equal_states, pictures, tensors_of

import train
import training.augment
import training.graphs
from common.checkpoint import load_checkpoint
from common.cli import UserError, run
from common.distributed import Distributed, GradientBucket
from common.graphs import WARM_UPS, CaptureError, Recorder
from dataset import InfiniteSampler, data_loader, open_dataset
from model import GeneratorConfig
from training.graphs import PhaseGraphs, find_recorder
from training.trainer import PHASES, Trainer, TrainSettings

CONFIG = GeneratorConfig(8, style_dim=16, n_mlp=1, channel_max=4)
STEPS = 10
OFTEN = {"d_reg_every": 2, "g_reg_every": 2, "batch": 4}  # ten steps play R1 and path length five times
AUGMENT = {"augment": True, "ada_length": 60}
IN_WORDS = {
    "w++": {},
    "bf16": {"precision": "bf16"},
    "augmentation": AUGMENT,
    "w, mixed, in micro-batches": {"w_space": True, "micro_batch": 2, "mixing": 0.5} | AUGMENT,
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Augmentation with fixed shapes and p unread, which is its default where p lives on a GPU."""

    def call(self, images):
        return training.augment.augment(images, self.p, transforms=self.transforms, static=True)

    monkeypatch.setattr(training.augment.AdaptiveAugment, "__call__", call)


def make(recorder=None, w_space=False, device=None, **settings):
    place = ALONE if device is None else Distributed(0, 0, 1, torch.device(device), None)
    trainer = Trainer(replace(CONFIG, w_space=w_space), TrainSettings(**OFTEN | settings), place)
    trainer.ada.p.fill_(0.5)
    if recorder is not None:
        trainer.graphs = PhaseGraphs(trainer, recorder)
    return trainer


def play(trainer, steps):
    for step in steps:
        trainer.train_step(pictures(trainer.settings.batch, size=8, seed=step))


@pytest.mark.parametrize("settings", IN_WORDS.values(), ids=IN_WORDS.keys())
def test_graphed_training_is_plain_training(settings):
    recorder = StandIn()
    plain, graphed = make(**settings), make(recorder, **settings)
    for first in (0, STEPS // 2):
        for trainer in (plain, graphed):
            play(trainer, range(first, first + STEPS // 2))
        assert graphed.read_metrics() == plain.read_metrics()
    assert_equal_states(graphed.state_dict(), plain.state_dict())
    assert float(graphed.ada.p) != 0.5 or not graphed.settings.augment
    n_micro = graphed.settings.n_micro
    assert recorder.recordings == len(PHASES), "each phase once, whatever the number of micro-batches"
    assert recorder.warm_ups == WARM_UPS * len(PHASES)
    assert recorder.launches == (2 * STEPS + 2 * STEPS // 2) * n_micro - recorder.warm_ups


def test_plays_that_count_the_host_are_caught():
    """The test above would notice: what p is read for, the CPU's own way of augmenting, cannot be recorded."""

    class Wakeful(Trainer):
        def g_phase(self, real, weight):
            super().g_phase(real * (1.0 if float(self.ada.p) < 2 else 0.5), weight)

    trainer = Wakeful(CONFIG, TrainSettings(**OFTEN), ALONE)
    trainer.graphs = PhaseGraphs(trainer, StandIn())
    with pytest.raises(CaptureError, match="waits for the device"):
        play(trainer, range(WARM_UPS + 1))

    class Stepping(Trainer):
        def g_phase(self, real, weight):
            super().g_phase(real, weight * (1 + self.step))

    trainer = Stepping(CONFIG, TrainSettings(**OFTEN), ALONE)
    trainer.graphs = PhaseGraphs(trainer, StandIn())
    with pytest.raises(AssertionError, match="other constants"):
        play(trainer, range(WARM_UPS + 2))


def test_resume_and_rollback_leave_the_addresses(tmp_path):
    """Loading a state between launches: the same graphs go on, and play what a plain trainer plays."""
    settings = AUGMENT
    recorder = StandIn()
    plain, graphed = make(**settings), make(recorder, **settings)
    play(plain, range(4))
    saved = copy.deepcopy(plain.state_dict())
    play(graphed, range(8))
    graphed.note(g=torch.tensor(float("nan")))
    with torch.no_grad():
        for parameter in graphed.g.parameters():
            parameter.fill_(float("nan"))
    assert graphed.broken_networks() == ["g"] and graphed.read_metrics()["g"] != 0
    for trainer in (plain, graphed):
        trainer.load_state_dict(copy.deepcopy(saved), "4.pt")
        trainer.salt += 1
        trainer.read_metrics()
        play(trainer, range(4, 10))
    assert recorder.recordings == len(PHASES)
    assert_equal_states(graphed.state_dict(), plain.state_dict())
    assert graphed.read_metrics() == plain.read_metrics()

    resumed = make(StandIn(), **settings)
    resumed.load_state_dict(saved, "4.pt")
    resumed.salt += 1
    play(resumed, range(4, 10))
    assert_equal_states(resumed.state_dict(), plain.state_dict())


def test_a_failure_is_one_warning_and_plain_training():
    plain, graphed = make(micro_batch=2), make(Refusing(), micro_batch=2)
    play(plain, range(STEPS))
    with pytest.warns(UserWarning, match=r"--graphs on: phase d could not be recorded \(operation not") as seen:
        play(graphed, range(STEPS))
    assert len(seen) == 1
    assert_equal_states(graphed.state_dict(), plain.state_dict())


def test_what_was_recorded_before_a_failure_is_not_launched_again():
    """A failed recording takes away the generator state that the graphs before it read."""

    class Second(StandIn):
        def record(self, call):
            if self.recordings == 1:
                raise CaptureError("out of memory")
            return super().record(call)

    recorder = Second()
    plain, graphed = make(), make(recorder)
    play(plain, range(STEPS))
    with pytest.warns(UserWarning, match="phase g could not be recorded"):
        play(graphed, range(STEPS))
    assert recorder.recordings == recorder.launches == 1 and graphed.graphs.replays == {}
    assert_equal_states(graphed.state_dict(), plain.state_dict())


# -- the gradients' buffer -----------------------------------------------------------------------------------------


def test_bucket():
    a, b, c = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3,), (5, 7), (2,)))
    bucket = GradientBucket([a, b, c])
    for _ in range(2):
        bucket.open("phase")
        for _ in range(2):
            (a.sum() + (2 * c).sum()).backward()
        flat = bucket.close("phase")
        assert b.grad is None and torch.equal(a.grad, torch.full((3,), 2.0)), "b takes no part: Adam leaves it alone"
        assert {p.grad.untyped_storage().data_ptr() for p in (a, c)} == {flat.untyped_storage().data_ptr()}
        assert all(p.grad.data_ptr() % 128 == flat.data_ptr() % 128 for p in (a, c)), "aligned"
        assert flat.sum() == 6 + 8
        flat /= 2
        assert a.grad[0] == 1 and c.grad[0] == 2
        for parameter in (a, b, c):
            parameter.grad = None
    bucket.open("another")
    assert a.grad is None and bucket.flat.sum() == 0


# -- the command line ----------------------------------------------------------------------------------------------


def start(lmdb, folder, *flags):
    argv = [
        "--path",
        lmdb,
        "--exp_name",
        folder,
        "--device",
        "cpu",
        "--workers",
        "0",
        "--n_sample",
        "4",
        "--batch",
        "4",
        "--log_every",
        "1",
        "--size",
        "8",
        "--style_dim",
        "16",
        "--n_mlp",
        "1",
        "--channel_max",
        "4",
        "--iter",
        "6",
        "--d_reg_every",
        "2",
        "--g_reg_every",
        "1",
        "--save_every",
        "3",
        *flags,
    ]
    return run(train.main, train.build_parser(), list(map(str, argv)))


def test_command_line(face_lmdb, tmp_path, monkeypatch):
    """The whole program: micro-batches found first, then graphs; resumed in the middle."""
    assert start(face_lmdb, tmp_path / "plain", "--micro_batch", "2") == 0
    recorders = []
    original = Trainer.rehearse

    def rehearse(self, images):
        assert self.graphs is None, "what may fail for memory is not recorded"
        original(self, images)
        if self.settings.micro_batch > 2:
            raise torch.OutOfMemoryError("no memory")

    def find(graphs, device, *, conditional):
        assert graphs == "on" and not conditional
        recorders.append(StandIn())
        return recorders[-1]

    monkeypatch.setattr(Trainer, "rehearse", rehearse)
    monkeypatch.setattr(train, "find_recorder", find)
    flags = ("--graphs", "on", "--micro_batch", "auto")
    assert start(face_lmdb, tmp_path / "graphed", *flags) == 0
    assert recorders[0].launches > 6 and recorders[0].recordings >= 3
    (tmp_path / "graphed" / "checkpoint" / "000006.pt").unlink()
    assert start(face_lmdb, tmp_path / "graphed", *flags, "--resume", "auto") == 0
    states = [
        tensors_of(load_checkpoint(tmp_path / name / "checkpoint" / "000006.pt")) for name in ("plain", "graphed")
    ]
    for name, value in states[0].items():
        if ".options." not in name:
            same = torch.equal(value, states[1][name]) if isinstance(value, torch.Tensor) else value == states[1][name]
            assert same, name


def test_refusals(face_lmdb, tmp_path, capsys):
    assert start(face_lmdb, tmp_path / "run", "--graphs", "on") == 1
    error = capsys.readouterr().err
    assert error == "error: --graphs on needs a CUDA device, this is cpu: leave it out\n"
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"--graphs on does not cover the conditional GAN \(--condition\)"):
        find_recorder("on", torch.device("cuda"), conditional=True)
    assert find_recorder("off", torch.device("cuda"), conditional=True) is None
    assert training.graphs.find_recorder("off", torch.device("cpu"), conditional=False) is None


# -- on a GPU ------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.gpu
def test_batches_arrive_whole_while_the_device_computes(face_lmdb):
    dataset, busy = open_dataset(face_lmdb, 8), torch.randn(2000, 2000, device="cuda")
    streams = [data_loader(dataset, 5, InfiniteSampler(len(dataset)), workers=1, device=d) for d in ("cpu", "cuda:0")]
    copies = []
    for _ in range(30):
        busy = busy @ busy / 2000
        copies.append((next(streams[0]), next(streams[1]) + 0))
    assert all(torch.equal(a, b.cpu()) for a, b in copies)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("settings", IN_WORDS.values(), ids=IN_WORDS.keys())
def test_graphed_training_on_the_gpu(settings):
    """Equal up to the order in which CUDA adds: the first losses after the recordings agree closely."""
    plain = make(device="cuda:0", **settings)
    graphed = make(Recorder("cuda:0"), device="cuda:0", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for trainer in (plain, graphed):
            play(trainer, range(STEPS))
    assert set(graphed.graphs.replays) == set(PHASES)
    a, b = plain.read_metrics(), graphed.read_metrics()
    assert b == pytest.approx(a, rel=0.1 if settings.get("precision") == "bf16" else 0.01, abs=1e-3)
