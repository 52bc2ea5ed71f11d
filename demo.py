"""A page in the browser: take a photo or a drawn face, invert it, move age, gender and smile, put it back, download.

    python demo.py                                                # http://127.0.0.1:7860, with the bundled models
    python demo.py --ckpt runs/faces/export.safetensors --encoder encoder.safetensors --boundaries fitted/

Works on a CPU. Boundaries (edit_attribute.py writes them) are those in --boundaries that were fitted for this
generator. The page answers this machine only unless --host says otherwise, loads nothing from other servers, and
serves no file outside a temporary folder of its own, which is removed at the end.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.checkpoint import CheckpointError
from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.distributed import add_device_flags, resolve_device
from demo_app.expression import load_conditional
from demo_app.page import serve
from demo_app.session import Tools, load_tools
from perceptual.identity import identity_or_none
from perceptual.lpips import build_perceptual, perceptual_or_none
from pSp.psp import load_psp
from scorer.network import BUNDLED, load_scorer

ROOT = Path(__file__).resolve().parent
SMALL = 64  # pixels up to which the scorer's features find a face better than LPIPS does (docs/results.md)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", type=Path, help="generator (default: the largest checkpoints/face-wpp-SIZE)")
    parser.add_argument("--encoder", type=Path, help="pSp encoder for it (default: the one in checkpoints/ that fits)")
    parser.add_argument(
        "--conditional",
        help="conditional generator for the expression of a reference face, or none "
        "(default: the largest checkpoints/face-cgan-SIZE)",
    )
    parser.add_argument("--boundaries", type=Path, default=ROOT / "checkpoints", help="folder of boundary files (.npz)")
    parser.add_argument("--scorer", default="face-scorer", help="of attributes: face-scorer, FILE.safetensors or none")
    parser.add_argument("--identity", default="auto", help="ir_se50, mobilefacenet or none; auto: what is here")
    parser.add_argument(
        "--perceptual",
        default="auto",
        help="distance by which codes are refined: vgg, squeeze, alex, "
        f"scorer:NAME or none; auto: the scorer's features up to {SMALL} pixels, else the first "
        "that is here",
    )
    parser.add_argument("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    parser.add_argument("--host", default="127.0.0.1", help="address to answer at; 0.0.0.0: anybody in the network")
    parser.add_argument("--port", type=int, default=7860, help="port to answer at")
    parser.add_argument("--max_upload_mb", type=float, default=10, help="largest upload, in megabytes")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    add_device_flags(parser)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# From flags to networks


def largest(kind: str) -> Path | None:
    """The largest checkpoints/face-KIND-SIZE.safetensors, if any."""
    found = {
        int(match[1]): path
        for path in (ROOT / "checkpoints").glob(f"face-{kind}-*.safetensors")
        if (match := re.fullmatch(rf"face-{kind}-(\d+)", path.stem))
    }
    return found[max(found)] if found else None


def default_generator() -> Path:
    """Raises FileNotFoundError."""
    path = largest("wpp")
    if path is None:
        raise FileNotFoundError(f"{ROOT / 'checkpoints'} holds no face-wpp-SIZE.safetensors: pass --ckpt GENERATOR")
    return path


def default_encoder(generator, device):
    """(network, path) of the encoder in checkpoints/ for this generator, or (None, None)."""
    for path in sorted((ROOT / "checkpoints").glob("face-psp-*.safetensors")):
        try:
            return load_psp(path, device, generator), path
        except CheckpointError:
            continue  # for another generator
    return None, None


def read_tools(args) -> Tools:
    """Everything that the page works with; what is not here is None, with a note on stderr."""
    device = resolve_device(args.device, ops=args.ops)
    tools = load_tools(args.ckpt or default_generator(), device, args.boundaries)
    generator = tools.generator
    if args.encoder:
        tools.encoder, tools.encoder_path = load_psp(args.encoder, device, generator), args.encoder
        if tools.encoder.decoder.fingerprint != generator.fingerprint:
            raise UserError(
                f"--encoder {args.encoder} was trained for the generator "
                f"{tools.encoder.decoder.fingerprint}, this one is {generator.fingerprint}"
            )
    else:
        tools.encoder, tools.encoder_path = default_encoder(generator, device)
    tools.weights_dir, tools.scorer_name, tools.perceptual_name = args.weights_dir, args.scorer, args.perceptual
    if args.scorer != "none":
        try:
            tools.scorer = load_scorer(args.scorer, device, weights_dir=args.weights_dir)
        except FileNotFoundError as error:
            if args.scorer not in BUNDLED:
                raise
            print(f"note: attributes are not read: {error}", file=sys.stderr)
    if args.conditional != "none" and (path := args.conditional or largest("cgan")):
        tools.conditional = load_conditional(path, device, args.weights_dir)
    tools.identity = identity_or_none(args.identity, device, args.weights_dir)
    by_scorer = args.perceptual == "auto" and tools.scorer is not None
    if not by_scorer or generator.config.size > SMALL:
        tools.perceptual = perceptual_or_none(args.perceptual, device, args.weights_dir)
    if by_scorer and tools.perceptual is None:
        tools.perceptual_name = f"scorer:{args.scorer}"
        tools.perceptual = build_perceptual(tools.perceptual_name, device, args.weights_dir)
    return tools


def main(args) -> None:
    if args.max_upload_mb <= 0 or not 0 < args.port < 65536 or args.threads < 0:
        raise UsageError("--max_upload_mb takes more than 0, --port 1 to 65535, --threads 0 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    tools = read_tools(args)
    with tempfile.TemporaryDirectory(prefix="wpp-demo-") as folder:
        blocks = serve(tools, Path(folder), host=args.host, port=args.port, max_upload_mb=args.max_upload_mb)
        print(f"{blocks.local_url} shows the page; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(3600)
        finally:
            blocks.close()


if __name__ == "__main__":
    run_script(main, build_parser())
