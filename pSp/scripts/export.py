"""Write the encoder of a pSp checkpoint alone, in half precision, as .safetensors: small enough to be handed on.

The generator stays a file of its own, the one that the encoder was trained for: name it here, and keep both in one
folder. projector.py --init encoder:FILE and pSp/scripts/inference.py --checkpoint_path FILE read the result.

    python pSp/scripts/export.py --checkpoint_path best_model.pt --stylegan_weights g.safetensors --output e.safetensors
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser, UsageError, run_script


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint_path", required=True, help="checkpoint of pSp/scripts/train.py, or a published one")
    add("--stylegan_weights", required=True, help="the generator it was trained for; its name goes into the file")
    add("--output", required=True, metavar="FILE", help="where to; the name ends with .safetensors")
    return parser


def main(args) -> int:
    from model import load_generator
    from pSp.psp import export_encoder, load_psp

    output, generator = Path(args.output), Path(args.stylegan_weights)
    if output.suffix.lower() != ".safetensors":
        raise UsageError(f"--output {output}: expected a name that ends with .safetensors")
    net = load_psp(args.checkpoint_path, generator=load_generator(generator))
    export_encoder(net, output, generator.name)
    size = output.stat().st_size / 2**20
    print(f"{output}: {net.description}, step {net.step}, {size:.1f} MiB; keep it beside {generator.name}")
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
