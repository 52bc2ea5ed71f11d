"""The stages after training beside the code they come from, in one run: median seconds, ratio, agreement of results.

    encoder   pSp's encoder, IR-SE 50, on --batch images of 256 px (eladrich/pixel2style2pixel), with the same weights
    boundary  one attribute from --samples latents of 512 numbers (genforce/interfacegan: linear SVC on the extremes)
    prdc      precision, recall, density and coverage of --features real and as many generated features (package prdc)

FID and KID are computed by torch-fidelity itself, and the frames of a sweep are the generator's forward pass
(bench_generate.py). --peer_psp and --peer_interfacegan name checkouts of the repositories. The last line is JSON.

    python benchmarks/bench_stages.py --peer_psp pixel2style2pixel --peer_interfacegan interfacegan
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measuring import Table, circumstances, headline, median_seconds  # noqa: E402
from common.cli import ArgumentParser, run_script  # noqa: E402
from common.distributed import resolve_device, tune_allocator  # noqa: E402
from editing.fit import fit_boundary  # noqa: E402
from metrics.manifold import PRDC, compute_prdc  # noqa: E402
from pSp.encoders import EncoderConfig, GradualStyleEncoder  # noqa: E402

CPU = torch.device("cpu")
RATIO = 0.02  # InterFaceGAN's share of the samples at either end
NEAREST_K = 5
PSP_SIZE, PSP_TOKENS = 256, 18


def build_parser():
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--peer_psp", type=Path, help="checkout of eladrich/pixel2style2pixel")
    add("--peer_interfacegan", type=Path, help="checkout of genforce/interfacegan")
    add("--batch", type=int, default=4, help="images of the encoder's pass")
    add("--samples", type=int, default=100_000, help="latents of the boundary (published: 100,000)")
    add("--features", type=int, default=10_000, help="features on either side of prdc")
    add("--repeats", type=int, default=5, help="timed runs per number")
    add("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    return parser


def encoder_calls(folder: Path, batch: int) -> tuple:
    """{name: call} of both encoders, and what their results are compared by."""
    sys.path.insert(0, str(folder))
    from torch.utils import cpp_extension

    cpp_extension.load = lambda *args, **kwargs: None  # it builds CUDA code at import, though a CPU never calls it
    from models.encoders.psp_encoders import GradualStyleEncoder as PeerEncoder

    torch.manual_seed(0)
    ours = GradualStyleEncoder(EncoderConfig(n_styles=PSP_TOKENS, style_dim=512, input_size=PSP_SIZE)).eval()
    peer = PeerEncoder(50, "ir_se", argparse.Namespace(input_nc=3, n_styles=PSP_TOKENS)).eval()
    peer.load_state_dict(ours.state_dict())
    images = torch.rand(batch, 3, PSP_SIZE, PSP_SIZE) * 2 - 1
    networks = {"peer": peer, "ours": ours}
    calls = {
        name: torch.inference_mode()(lambda network=network: network(images)) for name, network in networks.items()
    }
    return calls, lambda a, b: f"largest difference {float((a - b).abs().max() / a.abs().max()):.1e} of the largest"


def boundary_calls(folder: Path, n: int) -> tuple:
    """Latents whose attribute is linear in 512 numbers, with as much noise; results compared by their cosine."""
    sys.path.insert(0, str(folder))
    np.int = int  # gone from numpy since
    from utils.manipulator import train_boundary

    draw, logger = np.random.default_rng(0), logging.getLogger("quiet")
    logger.setLevel(logging.CRITICAL)
    latents = draw.standard_normal((n, 512), np.float32)
    scores = latents @ (direction := draw.standard_normal(512) / 512**0.5) + draw.standard_normal(n)
    calls = {"peer": lambda: train_boundary(latents, scores[:, None], RATIO, logger=logger)[0]}
    for fit in ("svc", "ridge"):
        calls[f"ours, {fit}"] = lambda fit=fit: fit_boundary(latents, scores, fit=fit, ratio=RATIO).normal[0]

    def agreement(peer, ours):
        cosines = [float(normal @ direction / np.linalg.norm(direction)) for normal in (peer, ours)]
        return f"cosine with the true direction {cosines[0]:.3f} and {cosines[1]:.3f}"

    return calls, agreement


def prdc_calls(n: int) -> tuple:
    from prdc import compute_prdc as peer_prdc

    torch.manual_seed(0)
    real, fake = torch.randn(n, 512), torch.randn(n, 512) * 0.9 + 0.02
    calls = {"peer": lambda: peer_prdc(real.numpy(), fake.numpy(), NEAREST_K)}
    calls["ours"] = lambda: compute_prdc(real, fake, nearest_k=NEAREST_K)
    return calls, lambda a, b: f"largest difference {max(abs(a[name] - b[name]) for name in PRDC):.1e}"


def main(args) -> None:
    device = resolve_device("cpu")
    tune_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(headline(device))
    stages = {"prdc": prdc_calls(args.features)}
    if args.peer_psp:
        stages["encoder"] = encoder_calls(args.peer_psp, args.batch)
    if args.peer_interfacegan:
        stages["boundary"] = boundary_calls(args.peer_interfacegan, args.samples)
    rows, table = [], Table(stage=24, seconds=10, peer_over_it=14, agreement=64)
    for stage, (calls, agreement) in stages.items():
        reference, peer_seconds = calls["peer"](), None
        for name, call in calls.items():
            seconds = median_seconds(call, args.repeats, CPU)
            peer_seconds = peer_seconds or seconds
            text = "" if name == "peer" else agreement(reference, call())
            rows.append({"stage": stage, "of": name, "seconds": seconds, "ratio": peer_seconds / seconds, "note": text})
            table.row(f"{stage}, {name}", seconds, peer_seconds / seconds, text)
    print(json.dumps({"benchmark": "stages", **circumstances(device), "rows": rows}))


if __name__ == "__main__":
    run_script(main, build_parser())
