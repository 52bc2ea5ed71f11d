"""Write the encoder of a pSp checkpoint alone, in half precision, as .safetensors: small enough to be handed on.

The generator stays a file of its own, the one that the encoder was trained for: name it here, and keep both in one
folder. projector.py --init encoder:FILE and pSp/scripts/inference.py --checkpoint_path FILE read the result.

    python pSp/scripts/export.py --checkpoint_path best_model.pt --stylegan_weights g.safetensors --output e.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser, UsageError, UserError, run_script
from model import load_generator
from pSp.psp import export_encoder, load_psp


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint_path", required=True, help="checkpoint of pSp/scripts/train.py, or a published one")
    add("--stylegan_weights", required=True, help="the generator it was trained for; its name goes into the file")
    add("--output", required=True, metavar="FILE", help="where to; the name ends with .safetensors")
    return parser


def main(args) -> int:
    if Path(args.output).suffix.lower() != ".safetensors":
        raise UsageError(f"--output {args.output}: expected a name that ends with .safetensors")
    net, generator = load_psp(args.checkpoint_path), load_generator(args.stylegan_weights)
    if generator.fingerprint != net.decoder.fingerprint:
        raise UserError(
            f"--stylegan_weights {args.stylegan_weights} is {generator.fingerprint}, the encoder in "
            f"{args.checkpoint_path} was trained for {net.decoder.fingerprint}; one that was trained with "
            "its decoder stays in its checkpoint"
        )
    export_encoder(net, args.output, Path(args.stylegan_weights).name)
    size = Path(args.output).stat().st_size / 2**20
    print(
        f"{args.output}: {net.description}, step {net.step}, {size:.1f} MiB; keep it beside "
        f"{Path(args.stylegan_weights).name}"
    )
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
