"""training/resume.py and the resolution of flags against the file that a run starts from, by tables."""

import pytest
import torch
from trainers import make_trainer

from common.checkpoint import CheckpointError, save_checkpoint
from common.cli import UsageError, UserError
from editing.attributes import Condition
from model import GeneratorConfig
from training.resume import (
    Start,
    init_from,
    read_checkpoint,
    read_start,
    resolve,
    resolve_architecture,
    resolve_condition,
)
from training.settings import ARCHITECTURE

PLAIN = GeneratorConfig(16, 32, 2, channel_max=8)
CONDITIONAL = GeneratorConfig(16, 32, 2, channel_max=8, condition_dim=2)
FLAGS = dict.fromkeys((*ARCHITECTURE, "condition", "attributes", "light", "noise", "vision_aided"))
STORED = Condition(("smile", "age"), ("probability", "years"), (0.5, 0.4), (1.0, 60.0), "/x/scorer", "f1")


def start(continues, config=PLAIN, **state):
    return Start("7.pt", continues, config, state)


def conditional(continues, light=False):
    condition = STORED.to_dict() | {"light": light}
    return start(continues, CONDITIONAL, condition=condition)


@pytest.mark.parametrize(
    "given, of, result",
    [
        ({}, Start(), GeneratorConfig()),
        ({"size": 64, "w_space": True}, Start(), GeneratorConfig(64, w_space=True)),
        ({"size": None}, start(True), PLAIN),
        ({"size": 16}, start(True), PLAIN),
        ({"channel_multiplier": 1}, start(True), GeneratorConfig(16, 32, 2, channel_max=8, channel_multiplier=1)),
        ({"size": 32}, start(False), GeneratorConfig(32, 32, 2, channel_max=8)),
        ({"size": 32}, start(True), "7.pt holds another architecture: --size 32 here, 16 in the file"),
        ({"size": 100}, Start(), "power of two"),
    ],
)
def test_architecture(given, of, result):
    if isinstance(result, str):
        with pytest.raises((UsageError, CheckpointError), match=result):
            resolve_architecture(given, of)
    else:
        assert resolve_architecture(given, of) == result


@pytest.mark.parametrize(
    "given, of, result",
    [
        (None, Start(), "random"),
        ("none", Start(), "none"),
        (None, start(True, options={"noise": "none"}), "none"),
        (None, start(True, options={}), "random"),
        ("none", start(True), "none"),
        ("random", start(False, options={"noise": "none"}), "random"),
        (None, start(False, options={"noise": "none"}), "none"),
        (None, start(False, noise="none"), "none"),  # as convert.py writes it
        ("random", start(True, options={"noise": "none"}), "7.pt was trained with --noise none, not random"),
    ],
)
def test_noise(given, of, result):
    if len(result) > 6:
        with pytest.raises(CheckpointError, match=result):
            resolve(FLAGS | {"noise": given}, of)
    else:
        assert resolve(FLAGS | {"noise": given}, of)[1]["noise"] == result


@pytest.mark.parametrize(
    "flags, of, result",
    [
        ((None, None, None), Start(), (None, None, False)),
        ((None, None, None), start(True), (None, None, False)),
        (("s", None, None), Start(), ("s", "smile,eyes_open,mouth_open", False)),
        (("s", "age, hat", None), start(False), ("s", "age,hat", False)),
        (("s", "age", True), start(False), ("s", "age", True)),
        ((None, None, None), conditional(True), ("/x/scorer", "smile,age", False)),
        ((None, None, None), conditional(True, True), ("/x/scorer", "smile,age", True)),
        (("s", None, None), conditional(True), ("s", "smile,age", False)),
        (("s", "smile,age", True), conditional(False), ("s", "smile,age", True)),
        (("s", None, True), Start(), "--light trains what the condition adds"),
        ((None, "age", None), Start(), "pass --condition SCORER"),
        ((None, None, True), start(False), "pass --condition SCORER"),
        (("s", None, None), start(True), r"7.pt was trained with --condition \(none\), not s: --init_from"),
        ((None, None, True), conditional(True), r"7.pt was trained with --light \(none\), not True: --init_from"),
        ((None, None, None), conditional(False), "is a conditional generator: pass --condition"),
        (("s", "age", None), conditional(True), "was trained for smile,age"),
    ],
)
def test_condition(flags, of, result):
    if isinstance(result, str):
        with pytest.raises((UserError, CheckpointError), match=result):
            resolve_condition(*flags, of)
    else:
        assert resolve_condition(*flags, of) == dict(zip(("condition", "attributes", "light"), result, strict=True))


def test_which_file_a_run_starts_from(tmp_path, tiny_config):
    state = make_trainer(tiny_config).state_dict()
    folder, other = tmp_path / "run" / "checkpoint", tmp_path / "other.pt"
    for path in (folder / "000003.pt", folder / "000012.pt", other):
        save_checkpoint(path, state | {"step": int(path.stem[-2:]) if path.stem.isdecimal() else 5})
    run = tmp_path / "run"
    assert read_start(run, resume="auto").path == folder / "000012.pt"
    assert read_start(run, resume="auto", init_from=other).state["step"] == 12, "weights only where there is no run yet"
    assert read_start(tmp_path / "new", resume="auto") == read_start(tmp_path / "new") == Start()
    begun = read_start(tmp_path / "new", resume="auto", init_from=other)
    assert (begun.path, begun.continues, begun.config) == (other, False, tiny_config)
    assert read_start(tmp_path / "new", resume=str(other)).continues
    for flags in ({}, {"init_from": other}, {"resume": str(other)}, {"resume": str(folder / "000003.pt")}):
        with pytest.raises(UserError, match="already holds a run"):
            read_start(run, **flags)


def test_files_of_other_programs(tmp_path, tiny_w_config):
    """Five state dicts, the step in the name; bare weights."""
    state = make_trainer(tiny_w_config).state_dict()
    published = {name: state[name] for name in ("g", "d", "g_ema", "g_optim", "d_optim")}
    torch.save(published, tmp_path / "stylegan2-230000.pt")
    start = read_start(tmp_path / "new", resume=str(tmp_path / "stylegan2-230000.pt"))
    assert start.state["step"] == 230_000 and start.config.widths == tiny_w_config.widths and start.options == {}
    torch.save(state["g_ema"], tmp_path / "7.pt")
    assert read_checkpoint(tmp_path / "7.pt", continues=False).config.w_space
    parallel = {name: {f"module.{n}": tensor for n, tensor in state[name].items()} for name in ("g", "d", "g_ema")}
    for file in (published, parallel, {"state_dict": state["g_ema"], "epoch": 3}, parallel["g_ema"]):
        torch.save(file, tmp_path / "7.pt")
        start, trainer = read_checkpoint(tmp_path / "7.pt", continues=False), make_trainer(tiny_w_config, seed=1)
        init_from(trainer, start)
        for name in {"g", "d", "g_ema"} & file.keys() or {"g_ema"}:
            found = getattr(trainer, name).state_dict()
            assert all(torch.equal(found[n], tensor) for n, tensor in state[name].items()), name
    torch.save({"g_ema": {"a": torch.zeros(1)}}, tmp_path / "8.pt")
    with pytest.raises(CheckpointError, match="8.pt: these tensors"):
        read_checkpoint(tmp_path / "8.pt", continues=False)
