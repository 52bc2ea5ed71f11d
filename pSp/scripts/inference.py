"""Stage 3b: invert a folder of faces with a trained pSp encoder: one pass of the encoder per image.

Writes below --exp_dir: latents.npy and latents.json (for generate.py and edit_attribute.py), inference_results/ (the
reconstructions under the images' names), inference_coupled/ (input beside output), grid_{k}.png (original,
|difference|, reconstruction), reconstruction.csv and .json, perceptual.npy, mse.npy (one value per image), stats.txt,
and skipped.csv when a file could not be read. Several processes under torchrun share the images among them.

    python pSp/scripts/inference.py --exp_dir E --checkpoint_path E/checkpoints/best_model.pt --data_path faces
        --test_batch_size 1 --test_workers 4 --resize_outputs --couple_outputs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import PRECISIONS, ArgumentParser, UsageError, UserError, add_device_flags, positive_int, run_script
from common.flags import add_face_flags, add_preset_flag, count, fill_recommended
from pSp.settings import resize_factors

RECOMMENDED = ("test_batch_size", "resize_outputs", "precision", "lpips_net", "id_net")  # flags a file may set


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--exp_dir", help="folder for everything that is written")
    add("--checkpoint_path", help="pSp checkpoint or exported encoder (default: EXP_DIR/checkpoints/best_model.pt)")
    add("--stylegan_weights", help="generator of an exported encoder (default: the file it names, beside it)")
    add("--data_path", default="gt_images", help="folder of images (any depth), one image, or an LMDB")
    add("--couple_outputs", action="store_true", help="save every input beside its output, not each 100th only")
    add("--resize_outputs", action="store_true", help="save outputs at 256x256 where the generator's are larger")
    add("--test_batch_size", type=positive_int, default=2, help="images per forward pass")
    add("--test_workers", type=count, default=2, help="processes that read images (0: this one)")
    add("--n_images", type=positive_int, help="only the first N images")
    add("--latent_mask", help="style mixing: comma-separated layers whose w comes from a random sample")
    add("--mix_alpha", type=float, help="how far those go to the sample, 0 to 1 (default: all the way)")
    add("--n_outputs_to_generate", type=int, help="not supported: generate.py --mix mixes saved latents")
    add("--resize_factors", help="super-resolution: one factor by which inputs are shrunk")
    add_face_flags(parser)
    add("--lpips_net", default="auto", help="vgg as published, squeeze, alex, ...; auto: the best there is")
    add("--id_net", default="auto", help="identity network; auto: the first that is found; none")
    retrieval = "among the first N images: whose nearest original is a reconstruction's? 0: not asked"
    add("--retrieval", type=count, default=0, metavar="N", help=retrieval)
    add("--weights_dir", help="folder looked into first for third-party weights")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the convolutions")
    add("--seed", type=int, default=0, help="of the samples of --latent_mask")
    add_preset_flag(parser)
    add_device_flags(parser)
    return parser


def read_settings(flags: dict) -> tuple[int, list[int] | None]:
    """Factor of super-resolution (1: none) and layers to mix (None: none). UsageError for flags that do not fit."""
    if not flags["exp_dir"]:
        raise UsageError("where to? pass --exp_dir FOLDER")
    if flags["n_outputs_to_generate"] is not None:
        raise UserError("--n_outputs_to_generate is not supported: generate.py --latents EXP_DIR --mix ROWS COLS")
    factors, mask = resize_factors(flags["resize_factors"] or "1"), flags["latent_mask"]
    if len(factors) != 1:
        raise UsageError(f"--resize_factors {flags['resize_factors']}: inference takes one factor")
    if flags["retrieval"] == 1:
        raise UsageError("--retrieval 1: expected at least two images, or 0")
    if flags["mix_alpha"] is not None and (mask is None or not 0 <= flags["mix_alpha"] <= 1):
        raise UsageError("--mix_alpha is a number from 0 to 1 and goes with --latent_mask")
    try:
        return factors[0], None if mask is None else [int(part) for part in mask.split(",")]
    except ValueError:
        raise UsageError(f"--latent_mask {mask}: expected layers such as 8,9,10") from None


def main(args) -> int:
    from common.distributed import gather_list, setup, shard, shutdown
    from common.precision import DTYPES
    from inversion.inputs import open_faces
    from model import load_generator
    from perceptual.identity import identity_or_none
    from perceptual.lpips import build_perceptual
    from pSp.encoders import PUBLISHED_INPUT
    from pSp.inference import SHOWN, Folders, Inversion, invert, retrieve, save_inversion, style_mixing
    from pSp.psp import load_psp

    factor, layers = read_settings(vars(args))
    exp_dir = Path(args.exp_dir)
    path = Path(args.checkpoint_path or exp_dir / "checkpoints" / "best_model.pt")

    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        # Networks.
        generator = load_generator(args.stylegan_weights, dist.device) if args.stylegan_weights else None
        net = load_psp(path, dist.device, generator)
        if net.config.input_nc not in (3, 6):
            maps = f"label maps of {net.config.input_nc} channels"
            raise UserError(f"{path} encodes {maps}: only encoders of RGB images are supported")
        recommended = net.decoder.recommended.get("encoder", {})
        if (filled := fill_recommended(args, recommended, RECOMMENDED, path)) and dist.is_main:
            print(filled, file=sys.stderr)
        perceptual = build_perceptual(args.lpips_net, dist.device, args.weights_dir)
        identity = identity_or_none(args.id_net, dist.device, args.weights_dir)

        # Images.
        size, upstream = max(net.config.input_size, net.image_size), net.config.input_size >= PUBLISHED_INPUT
        faces = {"align": args.align, "fit": args.fit, "resample": "bilinear" if upstream else "lanczos"}  # Resize's
        faces |= {"weights_dir": args.weights_dir, "limit": args.n_images}
        images = open_faces([args.data_path], size, exp_dir, dist=dist, **faces)
        n, device = min(len(images), args.n_images or len(images)), dist.device
        output_size = net.image_size if args.resize_outputs else net.decoder.config.size
        folders = Folders(exp_dir, images.names, couple=args.couple_outputs, factor=factor, size=output_size)
        if dist.is_main:
            by = f"{perceptual.name}{', ' + identity.name if identity else ''}"
            print(f"{path}: {net.description}; {n} images of {args.data_path} on {device}, measured by {by}")

        # Inversion of this rank's share, and the results of all.
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
            retrieved = retrieve(result, args.retrieval, perceptual, identity, device) if some else {}
            names = {"perceptual": perceptual.name, "identity": identity and identity.name}
            settings = {"checkpoint": path.name, "factor": factor, "latent_mask": layers}
            line = save_inversion(exp_dir, net, images, result, settings=settings, retrieved=retrieved, **names)
            print(f"{exp_dir}: {len(result.positions)} images inverted into {net.space}; {line}")
            for name, share in retrieved.items():
                of = min(args.retrieval, len(result.shown))
                print(f"nearest original by {name}: its own for {share:.0%} of {of}")
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
