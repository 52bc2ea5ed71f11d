"""common/distributed.py: one process, two processes over gloo, and a rank that does not come."""

import os
import sys
import time
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from processes import launch, start_ranks

from common import distributed
from common.cli import ArgumentParser, UsageError, add_device_flags

WORKER = """
import torch
from common import distributed as d
here = d.setup("cpu", timeout=60)
assert (here.world_size, here.is_main) == (2, here.rank == 0)

gradients = [torch.full((2, 3), float(here.rank)), torch.tensor(10.0 * here.rank), torch.empty(0),
             torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last) * here.rank,
             torch.full((3,), here.rank, dtype=torch.float64)]
d.all_reduce_mean(gradients)
assert torch.equal(gradients[0], torch.full((2, 3), 0.5)) and gradients[1] == 5
assert torch.equal(gradients[3], torch.arange(24.0).view(1, 2, 3, 4) / 2)
assert gradients[4].dtype == torch.float64 and gradients[4].tolist() == [0.5] * 3
weight = torch.nn.Parameter(torch.tensor([float(here.rank)]))
d.all_reduce_mean([weight])
assert weight.item() == 0.5

assert d.gather_list({"rank": here.rank}) == [{"rank": 0}, {"rank": 1}]
assert d.broadcast_object(f"from {here.rank}") == "from 0"
d.barrier()
d.shutdown()
d.shutdown()
print("done", here.rank)
"""


def test_two_processes():
    assert launch(WORKER, 2) == ["done 0\n", "done 1\n"]


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_alone(alone):
    here = distributed.setup("cpu")
    assert (here.rank, here.world_size, here.is_main) == (0, 1, True)
    assert here.device == torch.device("cpu") and not torch.distributed.is_initialized()
    tensor = torch.ones(3)
    distributed.all_reduce_mean([tensor])
    distributed.barrier()
    distributed.shutdown()
    assert tensor.tolist() == [1, 1, 1]
    assert distributed.gather_list("a") == ["a"] and distributed.broadcast_object("a") == "a"


def test_one_process_under_a_launcher(alone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert distributed.setup("cpu").world_size == 1 and not torch.distributed.is_initialized()


def test_bad_environment(alone, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK='first'"):
        distributed.setup("cpu")


@pytest.mark.parametrize("arguments", [[], ["--local_rank=1"], ["--local-rank", "1"]])
def test_flags(arguments):
    parser = ArgumentParser()
    add_device_flags(parser)
    assert parser.parse_args(arguments).device == "auto"


def test_resolve_device(monkeypatch):
    assert distributed.resolve_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:", "cuda:x", "cpu:1", "mps:0", ""):
        with pytest.raises(UsageError, match="expected auto"):
            distributed.resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert distributed.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="sees 0 CUDA devices"):
        distributed.resolve_device("cuda")
    with pytest.raises(ValueError, match="Metal"):
        distributed.resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.resolve_device("auto") == torch.device("cuda")
    assert distributed.resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:2: .* sees 2 CUDA devices"):
        distributed.resolve_device("cuda:2")


@pytest.mark.parametrize("n_items", [0, 1, 7, 8, 1000])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_shard(n_items, world_size):
    shards = [distributed.shard(n_items, rank, world_size) for rank in range(world_size)]
    assert [index for part in shards for index in part] == list(range(n_items))
    sizes = [len(part) for part in shards]
    assert max(sizes) - min(sizes) <= 1


SILENT = """
import os, signal, sys, time, torch
from common import distributed as d
from common.cli import ArgumentParser, run_script
def main(args):
    d.BEAT = 0.3
    here = d.setup("cpu", timeout=4)
    d.barrier()
    if here.rank == 1:
        {fault}
    if here.rank == 0:
        time.sleep({work})
    {collective}
    print("through", flush=True)
    d.shutdown()
run_script(main, ArgumentParser())
"""


SHORT = "torch.distributed.distributed_c10d.default_pg_timeout = __import__('datetime').timedelta(seconds=2); "
FAULTS = [  # (what rank 1 does before the collective, the collective, what rank 0 says)
    # the whole process stops, as behind a cut cable: no packet comes, no connection closes
    ("os.kill(os.getpid(), signal.SIGSTOP)", "d.gather_list(1)", "error: no sign of life of rank 1 for 4 s"),
    ("os.kill(os.getpid(), signal.SIGSTOP)", "d.all_reduce_mean([torch.ones(3)])", "rank 1"),
    # it lives and does something else
    ("time.sleep(60)", "d.all_reduce_mean([torch.ones(3)])", "all-reduce failed, rank 1 has stopped or hangs"),
    # it dies
    ("os._exit(9)", "d.barrier()", "error: rank 0 of 2: barrier failed, "),
    ("os._exit(9)", "d.gather_list(1)", "error: rank 0 of 2: gather failed, "),
]
WAITS = [("pass", "d.gather_list(1)", 6), ("time.sleep(6)", f"{SHORT}d.barrier()", 0)]  # (rank 1, collective, rank 0)


@pytest.fixture(scope="module")
def groups():
    """{(fault, collective, seconds of rank 0): two processes}, all of which wait at the same time."""
    cases = [*((fault, collective, 0) for fault, collective, _ in FAULTS), *WAITS]
    found = {}
    for fault, collective, work in cases:
        program = SILENT.format(fault=fault, collective=collective, work=work)
        found[fault, collective, work] = start_ranks([sys.executable, "-c", program])
    yield found
    for worker in sum(found.values(), []):
        worker.kill()


@pytest.mark.parametrize("fault, collective, message", FAULTS)
def test_a_silent_rank_is_named_and_nobody_waits_for_ever(groups, fault, collective, message):
    rank_0 = groups[fault, collective, 0][0]
    began = time.monotonic()
    out, err = rank_0.communicate(timeout=60)
    assert rank_0.returncode == 1 and out == "", err
    assert message in err and "Traceback" not in err
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("fault, collective, work", WAITS)
def test_ranks_wait_for_work_that_takes_longer_than_the_timeout(groups, fault, collective, work):
    """Longer than torch's own default too, by which rank 0 gives up a barrier whatever the group's timeout is."""
    results = [worker.communicate(timeout=60) for worker in groups[fault, collective, work]]
    assert [out for out, _ in results] == ["through\n"] * 2, results


@pytest.mark.parametrize("waits, ending", [([600], nullcontext()), ([2] * 200, pytest.raises(SystemExit))])
def test_ranks_that_were_suspended_go_on(waits, ending, monkeypatch):
    """After Ctrl-Z, `scontrol suspend` or `docker pause` nobody's sign of life is new. A process that ran all the time
    ends."""
    now, left, watch = [0.0], list(waits), object.__new__(distributed._Watch)

    def wait(_):
        now[0] += left[-1] if left else 0
        return not (left and left.pop())

    watch.rank, watch.timeout, watch.seen, watch.failing, watch.ended = 1, 300.0, [0.0, 0.0], False, Mock(wait=wait)
    monkeypatch.setattr(distributed, "time", Mock(monotonic=lambda: now[0]))
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit))
    with ending:
        watch._guard()


def test_ops_are_chosen_for_the_process(monkeypatch):
    from op import dispatch

    monkeypatch.setattr(dispatch, "_mode", None)
    parser = ArgumentParser()
    add_device_flags(parser)
    args = parser.parse_args(["--ops", "ref", "--dist_timeout", "60"])
    assert dispatch._mode is None, "parsing changes nothing"
    distributed.setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    assert dispatch.chosen() == "ref"
