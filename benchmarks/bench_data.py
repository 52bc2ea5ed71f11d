"""Data preparation and loading: images/s, ours beside rosinality's way.

Parts: `prepare`: a folder of --photos drawn JPEG images of --photo_size pixels becomes an LMDB of --sizes, by
prepare_data.py --compat (a process of its own, its start counts) and by the formulation of rosinality's
prepare_data.py, which makes the same bytes (JPEG of quality 100) with the same number of processes, but commits every
image of every size in a transaction of its own; `store`: the same without the resizing and encoding; `loader`:
batches of --batch from that LMDB at the smallest size, by number of worker processes; `wait`: the share of a training
step spent waiting for a batch, from a short training at that size (train.py's data_wait). Medians of --repeats runs.
The last line is everything as JSON.

    python benchmarks/bench_data.py
    python benchmarks/bench_data.py --parts loader --sizes 64 --photos 2000
"""

import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measuring import flag_list, pick  # noqa: E402
from common.cli import ROOT, ArgumentParser, run_script  # noqa: E402
from common.images import list_images  # noqa: E402
from common.lmdb_store import image_key  # noqa: E402
from common.runs import read_log  # noqa: E402
from dataset import InfiniteSampler, data_loader, open_dataset  # noqa: E402

PARTS = ("prepare", "store", "loader", "wait")
MAP_SIZE = 4 << 30  # bytes


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--photos", type=int, default=3000, help="images")
    parser.add_argument("--photo_size", type=int, default=256, help="their side in pixels")
    parser.add_argument("--sizes", default="64,128", help="sizes in the LMDB, separated by commas")
    parser.add_argument("--n_worker", type=int, default=os.cpu_count(), help="processes that read and encode")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes")
    parser.add_argument("--batch", type=int, default=16, help="images per batch")
    parser.add_argument("--steps", type=int, default=60, help="training steps of the part `wait`")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per number")
    parser.add_argument("--folder", type=Path, help="where the LMDBs are written (default: a temporary folder)")
    return parser


def main(args):
    sizes = sorted(int(size) for size in args.sizes.split(","))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        draw_photos(folder / "photos", args.photos, args.photo_size)
        prepare(args, folder, "faces.lmdb")
        seconds = {}
        measures = {"prepare": measure_prepare, "store": measure_store, "loader": measure_loader, "wait": measure_wait}
        for part in args.parts:
            seconds |= measures[part](args, folder, sizes)
    for row, value in seconds.items():
        print(f"{row:44}{value:12.4g}")
    info = {"benchmark": "data", "torch": torch.__version__, "cores": os.cpu_count()}
    info |= pick(args, "photos photo_size n_worker batch") | {"sizes": sizes}
    print(json.dumps(info | {"results": seconds}))


def draw_photos(folder, n, size):
    """Smooth coloured images with some grain, whose JPEGs are about as large as those of photos."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
        grain = draw.integers(-6, 7, (size, size, 1))
        image = np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i:05d}.jpg", quality=92)


def timed(call, repeats):
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def commit_each(out, encoded, sizes):
    """Write as rosinality does: `encoded` gives (number, an image per size); a transaction per image and size."""
    shutil.rmtree(out, ignore_errors=True)
    n = 0
    with lmdb.open(str(out), map_size=MAP_SIZE, readahead=False) as store:
        for i, images in encoded:
            for size, image in zip(sizes, images, strict=True):
                with store.begin(write=True) as transaction:
                    transaction.put(image_key(size, i), image)
            n += 1
        with store.begin(write=True) as transaction:
            transaction.put(b"length", str(n).encode())


def encode(path, sizes):
    """Encode one file as rosinality does: a JPEG of quality 100 per size."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    encoded = []
    for size in sizes:
        buffer = io.BytesIO()
        image.resize((size, size), Image.LANCZOS).save(buffer, format="jpeg", quality=100)
        encoded.append(buffer.getvalue())
    return encoded


def encode_numbered(item, sizes):
    return item[0], encode(item[1], sizes)


def prepare(args, folder, name):
    """prepare_data.py from the photos to `name`."""
    shutil.rmtree(folder / name, ignore_errors=True)
    flags = {"out": folder / name, "compat": True, "size": args.sizes, "n_worker": args.n_worker}
    start("prepare_data.py", folder / "photos", *flag_list(flags))


def start(script, *args):
    """A script of ours in a process of its own, silent."""
    command = [sys.executable, *map(str, (ROOT / script, *args))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure_prepare(args, folder, sizes):
    files = list_images(folder / "photos")

    def original():
        with multiprocessing.get_context("fork").Pool(args.n_worker) as pool:
            encoded = pool.imap_unordered(partial(encode_numbered, sizes=sizes), enumerate(files))
            commit_each(folder / "original.lmdb", encoded, sizes)

    before = timed(original, args.repeats)
    after = timed(lambda: prepare(args, folder, "ours.lmdb"), args.repeats)
    require_equal(folder / "original.lmdb", folder / "ours.lmdb", len(files), sizes)
    return {
        "prepare, commit per image, images/s": len(files) / before,
        "prepare, ours, images/s": len(files) / after,
        "prepare, ratio": before / after,
    }


def require_equal(first, second, n, sizes):
    """RuntimeError unless both stores hold the same bytes: otherwise the times would mean nothing."""
    with lmdb.open(str(first), readonly=True) as a, lmdb.open(str(second), readonly=True) as b:
        with a.begin() as one, b.begin() as two:
            for size, i in itertools.product(sizes, range(n)):
                if one.get(image_key(size, i)) != two.get(image_key(size, i)):
                    raise RuntimeError(f"image {i} at {size} px differs between the two writers")


def measure_store(args, folder, sizes):
    """Writing alone: images that are encoded already."""
    from common.lmdb_build import StoreWriter

    images = [encode(file, sizes) for file in list_images(folder / "photos")]
    records = [[f"{i:05d}.jpg", len(p[0]), 0] for i, p in enumerate(images)]

    def ours():
        out = folder / "store.lmdb"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with StoreWriter(out, {"sizes": sizes}, records) as writer:
            for k in range(0, len(records), 256):
                writer.write([(encoded, (args.photo_size,) * 2) for encoded in images[k : k + 256]])
            writer.finish()

    before = timed(lambda: commit_each(folder / "each.lmdb", enumerate(images), sizes), args.repeats)
    after = timed(ours, args.repeats)
    puts = len(images) * len(sizes)
    return {
        "store, commit per image, puts/s": puts / before,
        "store, ours, puts/s": puts / after,
        "store, ratio": before / after,
    }


def measure_loader(args, folder, sizes):
    size = sizes[0]
    results, n_batches = {}, max(20, 3200 // args.batch)
    for workers in args.workers:
        dataset = open_dataset(folder / "faces.lmdb", size)
        batches = data_loader(dataset, args.batch, InfiniteSampler(len(dataset)), workers=workers)
        next(batches)  # the workers are up

        def call(batches=batches):
            for _ in range(n_batches):
                next(batches)

        results[f"loader {size} px, {workers} workers, images/s"] = n_batches * args.batch / timed(call, args.repeats)
        batches.close()
    return results


def measure_wait(args, folder, sizes):
    size, out, end = sizes[0], folder / "training", args.steps
    flags = {"path": folder / "faces.lmdb", "size": size, "channel_max": 64, "batch": args.batch, "workers": 1}
    flags |= {"iter": end, "log_every": end // 3, "n_sample": 4, "save_every": end, "sample_every": end}
    start("train.py", *flag_list(flags | {"exp_name": out}))
    speeds = [entry for entry in read_log(out / "log.jsonl") if entry["group"] == "Speed"][1:]
    return {
        f"training {size} px, data wait, share": statistics.median(entry["data_wait"] for entry in speeds),
        f"training {size} px, images/s": statistics.median(entry["images_per_s"] for entry in speeds),
    }


if __name__ == "__main__":
    run_script(main, build_parser())
