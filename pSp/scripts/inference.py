"""Stage 3b: invert a folder of faces with a trained pSp encoder: one pass of the encoder per image.

Writes below --exp_dir: latents.npy and latents.json (for generate.py and edit_attribute.py), inference_results/ (the
reconstructions under the images' names), inference_coupled/ (input beside output), grid_{k}.png (original,
|difference|, reconstruction), reconstruction.csv and .json, perceptual.npy, mse.npy (one value per image), stats.txt,
and skipped.csv when a file could not be read. Several processes under torchrun share the images among them.

    python pSp/scripts/inference.py --exp_dir E --checkpoint_path E/checkpoints/best_model.pt --data_path faces
        --test_batch_size 1 --test_workers 4 --resize_outputs --couple_outputs
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, run_script
from common.distributed import gather_list, setup, shard, shutdown
from common.images import FITS, save_image
from common.precision import DTYPES
from inversion.inputs import add_align_flag, open_faces
from model import load_generator
from perceptual.identity import identity_or_none
from perceptual.lpips import build_perceptual
from pSp.data_configs import add_preset_flag, fill_recommended, resize_factors
from pSp.encoders import PUBLISHED_INPUT
from pSp.inference import COUPLED_EVERY, SHOWN, Inversion, invert, retrieve, save_inversion, style_mixing
from pSp.psp import load_psp, pSp
from sampling.render import file_names


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--exp_dir", help="folder for everything that is written")
    add(
        "--checkpoint_path",
        help="pSp checkpoint, ours or published, or an exported encoder (default: EXP_DIR/checkpoints/best_model.pt)",
    )
    add("--stylegan_weights", help="generator of an exported encoder (default: the file it names, beside it)")
    add("--data_path", default="gt_images", help="folder of images (any depth), one image, or an LMDB")
    add("--couple_outputs", action="store_true", help="save every input beside its output, not each 100th only")
    add("--resize_outputs", action="store_true", help="save outputs at 256x256 where the generator's are larger")
    add("--test_batch_size", type=int, default=2, help="images per forward pass")
    add("--test_workers", type=int, default=2, help="processes that read images (0: this one)")
    add("--n_images", type=int, help="only the first N images")
    add("--latent_mask", help="style mixing: comma-separated layers whose w comes from a random sample")
    add("--mix_alpha", type=float, help="how far those go to the sample, 0 to 1 (default: all the way)")
    add(
        "--n_outputs_to_generate",
        type=int,
        help="not supported: a flag of the published style_mixing.py; generate.py --mix mixes saved latents",
    )
    add("--resize_factors", help="super-resolution: one factor by which inputs are shrunk")
    add_align_flag(parser)
    add("--fit", choices=FITS, default="crop", help="for images that are not square")
    add("--lpips_net", default="auto", help="vgg as published, squeeze, alex, ...; auto: the best there is")
    add("--id_net", default="auto", help="identity network; auto: the first that is found; none")
    add(
        "--retrieval",
        type=int,
        default=0,
        metavar="N",
        help="among the first N images: whose nearest original is a reconstruction's? 0: not asked",
    )
    add("--weights_dir", help="folder looked into first for third-party weights")
    add("--precision", choices=list(DTYPES), default="fp32", help="of the convolutions")
    add("--seed", type=int, default=0, help="of the samples of --latent_mask")
    add_preset_flag(parser)
    add_device_flags(parser)
    return parser


def read_options(args) -> tuple[int, list[int] | None]:
    """Factor of super-resolution (1: none) and layers to mix (None: none). UsageError for flags that do not fit."""
    if not args.exp_dir:
        raise UsageError("where to? pass --exp_dir FOLDER")
    if args.n_outputs_to_generate is not None:
        raise UserError(
            "--n_outputs_to_generate is not supported: it belongs to the published style_mixing.py; "
            "generate.py --latents EXP_DIR --mix ROWS COLS mixes saved latents"
        )
    if args.test_batch_size < 1 or args.test_workers < 0 or (args.n_images is not None and args.n_images < 1):
        raise UsageError("--test_batch_size and --n_images must be at least 1, --test_workers at least 0")
    factors = resize_factors(args.resize_factors) if args.resize_factors else (1,)
    if len(factors) != 1:
        raise UsageError(f"--resize_factors {args.resize_factors}: inference takes one factor")
    if args.retrieval < 0 or args.retrieval == 1:
        raise UsageError(f"--retrieval {args.retrieval}: expected at least two images, or 0")
    if args.mix_alpha is not None and (args.latent_mask is None or not 0 <= args.mix_alpha <= 1):
        raise UsageError("--mix_alpha is a number from 0 to 1 and goes with --latent_mask")
    try:
        layers = None if args.latent_mask is None else [int(part) for part in args.latent_mask.split(",")]
    except ValueError:
        raise UsageError(f"--latent_mask {args.latent_mask}: expected layers such as 8,9,10") from None
    return factors[0], layers


class Folders:
    """Where images go: inference_results/ and inference_coupled/, below downsampling_F for super-resolution."""

    def __init__(self, exp_dir: Path, names: list[str], *, couple: bool, factor: int, output_size: int):
        below = "" if factor == 1 else f"downsampling_{factor}"
        self.results, self.coupled = exp_dir / "inference_results" / below, exp_dir / "inference_coupled" / below
        self.names, self.couple, self.factor = file_names(names), couple, factor
        self.output_size = output_size

    def save(self, position: int, original: np.ndarray, source: np.ndarray, output: np.ndarray) -> None:
        """Arrays uint8 [S, S, 3]; the coupled image is original (with `source` for super-resolution) and output."""
        name = f"{self.names[position]}.png"
        save_image(output, self.results / name)
        if self.couple or position % COUPLED_EVERY == 0:
            parts = [original, output] if self.factor == 1 else [original, source, output]
            side = (self.output_size, self.output_size)
            save_image(
                np.concatenate([np.asarray(Image.fromarray(part).resize(side)) for part in parts], 1),
                self.coupled / name,
            )


def open_network(path: Path, generator_path: str | None, device) -> pSp:
    """The network in a file; UserError when it was trained for another generator, or encodes label maps."""
    generator = load_generator(generator_path, device) if generator_path else None
    net = load_psp(path, device, generator)
    if generator is not None and net.decoder.fingerprint != generator.fingerprint:
        raise UserError(
            f"--stylegan_weights {generator_path} is {generator.fingerprint}, {path} was trained for "
            f"{net.decoder.fingerprint}"
        )
    if net.config.input_nc not in (3, 6):
        raise UserError(
            f"{path} encodes label maps of {net.config.input_nc} channels: only encoders of RGB images are supported"
        )
    return net


def main(args) -> int:
    factor, layers = read_options(args)
    exp_dir = Path(args.exp_dir)
    path = Path(args.checkpoint_path or exp_dir / "checkpoints" / "best_model.pt")
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        net = open_network(path, args.stylegan_weights, dist.device)
        if recommends := fill_recommended(args, net.decoder, path):
            print(recommends, file=sys.stderr)
        images = open_faces(
            [args.data_path],
            max(net.config.input_size, net.image_size),
            exp_dir,
            align=args.align,
            dist=dist,
            fit=args.fit,
            resample="bilinear" if net.config.input_size >= PUBLISHED_INPUT else "lanczos",  # upstream's Resize
            weights_dir=args.weights_dir,
            limit=args.n_images,
        )
        n = min(len(images), args.n_images or len(images))
        perceptual = build_perceptual(args.lpips_net, dist.device, args.weights_dir)
        identity = identity_or_none(args.id_net, dist.device, args.weights_dir)
        output_size = net.image_size if args.resize_outputs else net.decoder.config.size
        folders = Folders(exp_dir, images.names, couple=args.couple_outputs, factor=factor, output_size=output_size)
        by = f"{perceptual.name}{', ' + identity.name if identity else ''}"
        if dist.is_main:
            print(f"{path}: {net.description}; {n} images of {args.data_path} on {dist.device}, measured by {by}")
        local = invert(
            net,
            images,
            shard(n, dist.rank, dist.world_size),
            perceptual=perceptual,
            identity=identity,
            batch=args.test_batch_size,
            workers=args.test_workers,
            factor=factor,
            mix=None if layers is None else style_mixing(net, layers, args.mix_alpha, args.seed),
            resize=args.resize_outputs,
            dtype=None if args.precision == "fp32" else DTYPES[args.precision],
            save=folders.save,
            keep_shown=max(SHOWN, args.retrieval),
        )
        result = Inversion()
        for part in gather_list(local):  # contiguous shards: the order of the images
            result.extend(part)
        if dist.is_main:
            some = args.retrieval and result.shown
            retrieved = retrieve(result, args.retrieval, perceptual, identity, dist.device) if some else {}
            line = save_inversion(
                exp_dir,
                net,
                result,
                images.names,
                perceptual=perceptual.name,
                identity=identity.name if identity else None,
                alignment=images.alignment(),
                left_out=images.left_out,
                extra={"checkpoint": path.name, "factor": factor, "latent_mask": layers},
                retrieved=retrieved,
            )
            print(f"{exp_dir}: {len(result.positions)} images inverted into {net.space}; {line}")
            for name, share in retrieved.items():
                print(
                    f"nearest original by {name}: its own for {share:.0%} of {min(args.retrieval, len(result.shown))}"
                )
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
