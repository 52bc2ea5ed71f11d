"""Checkpoints from one program to another: NVIDIA's network pickles, rosinality's, TransStyleGAN's and our own.

IN is a pickle (.pkl) of NVlabs/stylegan2-ada-pytorch or NVlabs/stylegan3 (config stylegan2, no labels), read without
running anything in it, or a checkpoint (.pt) or exported generator (.safetensors). OUT.pt holds `g_ema`, and `g`, `d`,
`latent_avg` where IN has them, under rosinality's tensor names, with the config; OUT.safetensors the EMA generator
alone, with mean and deviation of its latents. At the end the file is read again, and draws an image. With
--stylegan_weights IN is a checkpoint of a pSp encoder, OUT.safetensors the encoder alone, in half precision: it needs
that generator's file beside it.

    python convert.py ffhq.pkl ffhq.pt
    python convert.py runs/faces/checkpoint/100000.pt faces.safetensors --half
    python convert.py faces.safetensors faces-with-settings.safetensors --recommended settings.json
    python convert.py best_model.pt encoder.safetensors --stylegan_weights generator.safetensors

settings.json names flags per script, {"projector": {"step": 300, "lr": 0.5}, "generate": {"truncation": 0.7}}: the
scripts use them where no flag is given.
"""

from pathlib import Path

from common.cli import ArgumentParser, UsageError, run_script, seed_number


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="IN", help="NVIDIA's .pkl, a checkpoint .pt, or a generator .safetensors")
    parser.add_argument("target", metavar="OUT", help="what to write: .pt (rosinality's layout) or .safetensors (EMA)")
    add = parser.add_argument_group("for OUT.safetensors").add_argument
    add("--half", action="store_true", help="16 bits: half the file, a fingerprint of its own")
    add("--recommended", metavar="FILE.json", help="settings to store, per script (default: those of IN)")
    add("--with_d", action="store_true", help="the discriminator too (OUT-d.safetensors), for train.py --init_from")
    add("--base", metavar="FILE", help="an export beside OUT whose equal tensors are left out (for --light training)")
    add("--stylegan_weights", type=Path, metavar="FILE", help="IN is a pSp encoder for this generator")
    add = parser.add_argument_group("the image drawn as a check").add_argument
    add("--seed", type=seed_number, default=0, help="its seed; z is what NVIDIA's scripts draw for it")
    add("--image", metavar="FILE", help="keep it, to compare with the other program's")
    return parser


def main(args) -> None:
    from common.generator_file import discriminator_file
    from interop.export import draw_check, export_generator, read_source, write_checkpoint
    from model import load_generator
    from pSp.psp import export_encoder, load_psp

    source, target = Path(args.source), Path(args.target)
    options = {"half": args.half, "recommended": args.recommended, "with_d": args.with_d, "base": args.base}
    if target.suffix not in (".pt", ".safetensors"):
        raise UsageError(f"{target}: expected a name that ends with .pt or .safetensors")
    given = [flag for flag, value in (options | {"stylegan_weights": args.stylegan_weights}).items() if value]
    if given and target.suffix != ".safetensors":
        raise UsageError(f"--{given[0]} is for .safetensors, not for {target}")
    if args.stylegan_weights and (others := [*given[:-1], *(["image"] if args.image else [])]):
        raise UsageError(f"--{others[0]} is for generators: --stylegan_weights exports an encoder")
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"{target}: IN and OUT are the same file")

    if args.stylegan_weights:
        net = load_psp(source, generator=load_generator(args.stylegan_weights))
        export_encoder(net, target, args.stylegan_weights.name)
        print(f"{target}: {net.description}, step {net.step}; keep it beside {args.stylegan_weights.name}")
        return
    if target.suffix == ".safetensors":
        (_, notes), held = export_generator(source, target, **options), "g_ema"
    else:
        state, notes = read_source(source)
        write_checkpoint(target, state)
        held = ", ".join(name for name in ("g_ema", "g", "d", "latent_avg") if name in state)
    held += f", beside it the discriminator: {discriminator_file(target)}" if args.with_d else ""
    print(f"{target} holds {held}: {draw_check(target, args.seed, args.image)}")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    run_script(main, build_parser())
