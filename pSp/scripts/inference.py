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

from common.cli import ArgumentParser, UserError, add_device_flags, positive_int, run_script
from common.flags import add_face_flags, add_fields, add_preset_flag, read_fields
from pSp.settings import InferenceSettings

RECOMMENDED = ("test_batch_size", "resize_outputs", "precision", "lpips_net", "id_net")  # flags a file may set


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--exp_dir", required=True, help="folder for everything that is written")
    add("--checkpoint_path", help="pSp checkpoint or exported encoder (default: EXP_DIR/checkpoints/best_model.pt)")
    add("--stylegan_weights", help="generator of an exported encoder (default: the file it names, beside it)")
    add("--data_path", default="gt_images", help="folder of images (any depth), one image, or an LMDB")
    add("--n_images", type=positive_int, help="only the first N images")
    add("--n_outputs_to_generate", choices=(), help="not supported: generate.py --latents EXP_DIR --mix ROWS COLS")
    add_fields(parser, InferenceSettings)
    add_face_flags(parser)
    add("--lpips_net", default="auto", help="vgg as published, squeeze, alex, ...; auto: the best there is")
    add("--id_net", default="auto", help="identity network; auto: the first that is found; none")
    add("--weights_dir", help="folder looked into first for third-party weights")
    add_preset_flag(parser)
    add_device_flags(parser)
    return parser


def main(args) -> None:
    from common.distributed import gather_list, setup, shard
    from inversion.inputs import open_faces
    from model import load_generator
    from perceptual.identity import identity_or_none
    from perceptual.lpips import build_perceptual
    from pSp.encoders import PUBLISHED_INPUT
    from pSp.inference import image_writer, invert, write_report
    from pSp.psp import load_psp

    read_fields(InferenceSettings, vars(args))  # mistakes before any file is opened
    exp_dir = Path(args.exp_dir)
    own = exp_dir / "inference_results"  # not exp_dir, which a training may hold
    path = Path(args.checkpoint_path or exp_dir / "checkpoints" / "best_model.pt")

    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist, dist.lock(own, "an inversion"):
        # Networks.
        generator = load_generator(args.stylegan_weights, dist.device) if args.stylegan_weights else None
        net = load_psp(path, dist.device, generator)
        if net.config.input_nc not in (3, 6):
            maps = f"label maps of {net.config.input_nc} channels"
            raise UserError(f"{path} encodes {maps}: only encoders of RGB images are supported")
        args.recommend(net.decoder.recommended.get("encoder", {}), RECOMMENDED, path)
        settings = read_fields(InferenceSettings, vars(args))
        perceptual = build_perceptual(args.lpips_net, dist.device, args.weights_dir)
        identity = identity_or_none(args.id_net, dist.device, args.weights_dir)

        # Images.
        size, upstream = max(net.config.input_size, net.image_size), net.config.input_size >= PUBLISHED_INPUT
        faces = {"align": args.align, "fit": args.fit, "resample": "bilinear" if upstream else "lanczos"}  # Resize's
        faces |= {"weights_dir": args.weights_dir, "limit": args.n_images}
        images = open_faces([args.data_path], size, exp_dir, dist=dist, **faces)
        n = min(len(images), args.n_images or len(images))
        output_size = net.image_size if settings.resize_outputs else net.decoder.config.size
        save = image_writer(exp_dir, images.names, settings, output_size)
        if dist.is_main:
            by = f"{perceptual.name}{', ' + identity.name if identity else ''}"
            print(f"{path}: {net.description}; {n} images of {args.data_path} on {dist.device}, measured by {by}")

        # Inversion of this rank's share, and the results of all.
        networks = {"perceptual": perceptual, "identity": identity}
        local = invert(net, images, shard(n, dist.rank, dist.world_size), settings, **networks, save=save)
        parts = gather_list(local)  # contiguous shards: the order of the images
        if dist.is_main:
            write_report(exp_dir, net, images, parts, settings, **networks, source=path)


if __name__ == "__main__":
    run_script(main, build_parser())
