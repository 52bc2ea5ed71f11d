"""Largest differences between this repository's numbers and those of other programs' own code, as a Markdown table.

The folder holds checkouts: stylegan2-pytorch (rosinality), TransStyleGAN (AnonSubm2021; its CUDA-only operations are
replaced by rosinality's), stylegan2-ada-pytorch (NVIDIA's reference operations). Each runs in a process of its own,
because their modules have the names of ours. Beside them the installed packages prdc, lpips and torch-fidelity.

    python benchmarks/parity.py --folder ../peers
"""

import importlib
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import ArgumentParser, run_script  # noqa: E402

QUANTITIES = ("images", "w", "logits", "path lengths", "path gradient", "r1 gradient")
REPOSITORIES = {"rosinality": "stylegan2-pytorch", "transstylegan": "TransStyleGAN", "nvidia": "stylegan2-ada-pytorch"}
SIZE, N_MLP = 32, 4


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder with the checkouts")
    parser.add_argument("--peer", choices=list(REPOSITORIES), help="only run this one's code and write --out")
    parser.add_argument("--out", type=Path, help="file of its results")
    return parser


# -- the others' code ----------------------------------------------------------------------------------------------


def run_peer(name: str, folder: Path) -> dict:
    """State and results of a peer's code; the caller's process has none of our modules of the same names."""
    import torch.utils.cpp_extension

    torch.utils.cpp_extension.load = lambda *args, **kwargs: None  # extensions that a CPU never calls
    for part in ("model", "op", "training"):
        sys.modules.pop(part, None)
    sys.path.insert(0, str(folder / REPOSITORIES[name]))
    if name == "nvidia":
        return run_nvidia()
    if name == "transstylegan":
        sys.path.insert(1, str(folder / REPOSITORIES["rosinality"]))
        sys.modules["utils.op"] = importlib.import_module("op")
    model = importlib.import_module("model")
    torch.manual_seed(0)
    if name == "rosinality":
        g, z = model.Generator(SIZE, 512, N_MLP), torch.randn(4, 512)
    else:
        tokens = 2 * (SIZE.bit_length() - 2)
        g, z = model.Generator(SIZE, 512, tokens, N_MLP), torch.randn(4, tokens, 512)
        g.w_space = False  # its constructor forgets it
    d = model.Discriminator(SIZE)
    for parameter in (*g.parameters(), *d.parameters()):  # biases and noise strengths begin at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    images, w = g([z] if name == "rosinality" else z, return_latents=True, randomize_noise=False)
    noise = torch.randn_like(images) / SIZE
    (gradient,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
    lengths = gradient.square().sum(2).mean(1).sqrt()
    (path,) = torch.autograd.grad(lengths.square().mean(), g.convs[0].conv.weight)
    real = images.detach().requires_grad_()
    logits = d(real)
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    (r1,) = torch.autograd.grad(slope.square().flatten(1).sum(1).mean(), d.convs[0][0].weight)
    found = dict(zip(QUANTITIES, (images, w, logits, lengths, path, r1), strict=True))
    return {"g": g.state_dict(), "d": d.state_dict(), "z": z, "noise": noise, "found": found}


def run_nvidia() -> dict:
    """Inputs, and results of bias_act and upfirdn2d by their reference implementations."""
    sys.modules.setdefault("requests", types.ModuleType("requests"))  # for downloads, of which there are none here
    bias_act, upfirdn2d = (importlib.import_module(f"torch_utils.ops.{name}") for name in ("bias_act", "upfirdn2d"))
    torch.manual_seed(0)
    x, b = torch.randn(2, 5, 16, 16, requires_grad=True), torch.randn(5)
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    found = {"bias_act": bias_act.bias_act(x, b, act="lrelu", impl="ref")}
    for key, options in {
        "upsample2d": {"up": 2, "padding": [2, 1, 2, 1], "gain": 4},
        "downsample2d": {"down": 2, "padding": [1, 1, 1, 1]},
        "filter2d": {"padding": [2, 1, 2, 1]},
    }.items():
        y = upfirdn2d.upfirdn2d(x, f, impl="ref", **options)
        found[key] = y
        (found[f"{key}, gradient"],) = torch.autograd.grad(y.square().sum(), x)
    return {"x": x, "b": b, "f": f, "found": found}


# -- ours ----------------------------------------------------------------------------------------------------------


def ours_of_networks(peer: dict, w_space: bool) -> dict:
    from common.checkpoint import load_strictly
    from model import Discriminator, Generator, GeneratorConfig
    from training.losses import r1_penalty

    config = GeneratorConfig(SIZE, 512, N_MLP, w_space=w_space)
    g, d = Generator(config), Discriminator(config)
    load_strictly(g, {"token": g.token, **peer["g"]} if w_space else peer["g"], "peer")
    load_strictly(d, peer["d"], "peer")
    images, w = g(peer["z"], randomize_noise=False)
    (gradient,) = torch.autograd.grad((images * peer["noise"]).sum(), w, create_graph=True)
    lengths = gradient.square().sum(2).mean(1).sqrt()
    (path,) = torch.autograd.grad(lengths.square().mean(), g.convs[0].conv.weight)
    real = peer["found"]["images"].detach().requires_grad_()
    logits = d(real)
    (r1,) = torch.autograd.grad(r1_penalty(logits, real), d.convs[0][0].weight)
    return dict(zip(QUANTITIES, (images, w, logits, lengths, path, r1), strict=True))


def ours_of_operations(peer: dict) -> dict:
    from op import fused_leaky_relu, upfirdn2d

    x, kernel, found = peer["x"].requires_grad_(), peer["f"], {}
    found["bias_act"] = fused_leaky_relu(x, peer["b"])
    for key, k, options in (
        ("upsample2d", kernel * 4, {"up": 2, "pad": (2, 1)}),
        ("downsample2d", kernel, {"down": 2, "pad": (1, 1)}),
        ("filter2d", kernel, {"pad": (2, 1)}),
    ):
        found[key] = upfirdn2d(x, k, **options)
        (found[f"{key}, gradient"],) = torch.autograd.grad(found[key].square().sum(), x)
    return found


def packages() -> list[tuple]:
    """(program, what, ours, theirs) of prdc, lpips and torch-fidelity."""
    import lpips
    import prdc
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    from common.weights import find, require
    from metrics.distance import compute_fid, compute_kid
    from metrics.manifold import compute_prdc
    from perceptual.lpips import build_perceptual

    torch.manual_seed(0)
    real, fake = torch.randn(1500, 64), torch.randn(1200, 64) * 1.1 + 0.1
    rows, theirs = [], prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    for name, value in compute_prdc(real, fake, nearest_k=5).items():
        rows.append(("prdc", name, value, theirs[name]))
    statistics = [fid_features_to_statistics(features) for features in (fake, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    kid = kid_features_to_metric(fake, real, kid_subsets=100, kid_subset_size=1000, rng_seed=2020, verbose=False)
    rows.append(("torch-fidelity", "FID of features", compute_fid(real, fake)[0], fid))
    rows.append(
        ("torch-fidelity", "KID of features", compute_kid(real, fake)[0], kid["kernel_inception_distance_mean"])
    )
    package = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    weights = torch.load(find("squeezenet1_1_features") or require("squeezenet1_1"), weights_only=True)
    weights = {name.removeprefix("features."): value for name, value in weights.items()}
    for name, value in package.net.state_dict().items():
        value.copy_(weights[name.partition(".")[2]])
    a, b = torch.rand(4, 3, 64, 64) * 2 - 1, torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        rows.append(("lpips", "squeeze, 64 px", build_perceptual("squeeze")(a, b), package(a, b).flatten()))
    return rows


def main(args):
    if args.peer:
        found = run_peer(args.peer, args.folder)
        torch.save(found, args.out)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in REPOSITORIES:
            out = Path(folder) / "peer.pt"
            command = [sys.executable, __file__, "--folder", args.folder, "--peer", name, "--out", out]
            subprocess.run([str(part) for part in command], check=True)
            peer = torch.load(out, weights_only=True)
            ours = ours_of_operations(peer) if name == "nvidia" else ours_of_networks(peer, name == "rosinality")
            rows += [(name, key, ours[key], value) for key, value in peer["found"].items()]
    print("| program | what | largest difference | largest value |\n|---|---|---|---|")
    for program, what, mine, theirs in rows + packages():
        mine, theirs = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (mine, theirs))
        print(f"| {program} | {what} | {(mine - theirs).abs().max():.1e} | {theirs.abs().max():.3g} |")


if __name__ == "__main__":
    run_script(main, build_parser())
