"""benchmarks/count_work.py: operations and bytes of layers whose numbers are known, and the limits that follow."""

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import count_work
from benchmarks.count_work import MACHINES, Work, counted, n_bytes, ring_seconds
from common.cli import run
from op import dispatch


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_convolution():
    x, weight = meta(2, 4, 8, 8, dtype=torch.bfloat16), meta(6, 4, 3, 3, dtype=torch.bfloat16)
    work = counted(lambda: F.conv2d(x, weight, padding=1))
    assert work.macs == {"half": 2 * 6 * 64 * 4 * 9, "tf32": 0, "fp32": 0}
    assert work.moved == 2 * (2 * 4 * 64 + 6 * 4 * 9 + 2 * 6 * 64)
    work = counted(lambda: F.conv_transpose2d(x.float(), weight.float().transpose(0, 1), stride=2))
    assert work.macs["tf32"] == 2 * 4 * 64 * 6 * 9


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_a_convolution_cost_as_much_as_it(groups):
    """Groups too, which flop_counter counts wrong."""
    x, weight = meta(2, 4, 8, 8).requires_grad_(), meta(6, 4 // groups, 3, 3).requires_grad_()
    forward = counted(lambda: F.conv2d(x, weight, padding=1, groups=groups)).macs["tf32"]
    assert forward == 2 * 6 * 64 * 4 // groups * 9
    y = F.conv2d(x, weight, padding=1, groups=groups)
    assert counted(lambda: torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)).macs["tf32"] == 2 * forward
    assert counted(lambda: torch.autograd.grad(y.sum(), x)).macs["tf32"] == forward


def test_a_matrix_product_and_what_costs_nothing():
    a, b = meta(3, 5), meta(5, 7)
    work = counted(lambda: a @ b)
    assert work.macs["fp32"] == 3 * 5 * 7 and work.moved == 4 * (15 + 35 + 21)
    assert counted(lambda: a.t().reshape(15)[3:].detach()).moved == 4 * 30  # a copy, which reshape needs
    assert counted(lambda: a.view(15)[2:].unsqueeze(0).expand(4, -1).detach()).moved == 0
    assert n_bytes(meta(1, 5).expand(100, 5)) == 4 * 5 and n_bytes(meta()) == 4
    assert counted(lambda: a.add_(1)).moved == 2 * 4 * 15 and counted(lambda: a.normal_()).moved == 4 * 15


def test_limits():
    sheet = {"half": 1000.0, "tf32": 100.0, "fp32": 10.0, "memory": 5.0}
    work = Work()
    work.add("convolution", "half", 2000, 5)  # 2 s of operations, 1 s of bytes
    work.add("add", "fp32", 0, 15)  # 3 s of bytes
    assert work.seconds(sheet) == {"operations": 2, "bytes": 4, "both": 2 + 3}
    assert list(work.by_name(sheet).items()) == [("add", 3), ("convolution", 2)]
    assert ring_seconds(450e9, 8, 1.0) == pytest.approx(2 * 7 / 8)  # NVLink, whatever the network
    assert ring_seconds(50e9, 64, 50e9) == pytest.approx(2 * 63 / 64)
    one_nic, eight = (row["share_of_linear"] for row in reversed(count_work.scaling(0.1, 300e6)[1:]))
    assert one_nic < eight < 1


@pytest.fixture
def choose_again():
    before = dispatch.chosen()
    yield
    dispatch.choose(before)


def test_the_whole_count(capsys, choose_again):
    """The fixed ratios of the game: D is played on two batches and backwards, path length on half a batch."""
    flags = [
        "--sizes",
        "16",
        "32",
        "--batch",
        "8",
        "4",
        "--ops",
        "ref",
        "--channel_max",
        "16",
        "--n_mlp",
        "1",
        "--top",
        "2",
    ]
    assert run(count_work.main, count_work.build_parser(), flags) == 0
    *table, last = capsys.readouterr().out.splitlines()
    small, large = json.loads(last)["results"]
    assert (small["size"], small["batch"], large["size"], large["batch"]) == (16, 8, 32, 4)
    phases = small["phases"]
    half = {name: phase["gmac_by_kind"]["half"] for name, phase in phases.items()}
    assert half["d"] > half["g"] > half["sampling"] > 0 and half["r1"] < half["d"] / 10  # R1 is in float32
    assert phases["r1"]["gmac_by_kind"]["tf32"] > phases["path"]["gmac_by_kind"]["tf32"] > 0
    assert phases["average"]["megabytes"] * 8 * 1e6 == pytest.approx(12 * small["parameters"]["g"])
    for machine in MACHINES:
        limits = small["limits"][machine]["training"]
        assert limits["both"] <= min(limits["operations"], limits["bytes"])
    assert small["limits"]["H200"]["training"]["bytes"] > small["limits"]["H100"]["training"]["bytes"]
    reduced = 4 * (small["parameters"]["d"] * (1 + 1 / 16) + small["parameters"]["g"] * (1 + 1 / 4))
    assert small["limits"]["H100"]["all_reduce_bytes"] == pytest.approx(reduced)
    assert sum("training at most" in line for line in table) == 4 and sum("%, " in line for line in table) == 10
