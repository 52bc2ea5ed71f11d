"""LMDBs of images as rosinality's prepare_data.py leaves them."""

import io

import lmdb
from PIL import Image


def flat_image(index, size):
    """Flat colour that tells the index."""
    return Image.new("RGB", (size, size), (index, 2 * index, size))


def encode(image, image_format="PNG", **options):
    image.save(buffer := io.BytesIO(), image_format, **options)
    return buffer.getvalue()


def write_lmdb(folder, items, length=None):
    """An LMDB as rosinality's prepare_data.py leaves it: one transaction per put, `length` last."""
    with lmdb.open(str(folder), map_size=1 << 24, readahead=False) as env:
        for key, value in items.items():
            with env.begin(write=True) as transaction:
                transaction.put(key.encode(), value)
        if length is not None:
            with env.begin(write=True) as transaction:
                transaction.put(b"length", str(length).encode())
    return folder


def rosinality_items(n=7, sizes=(8, 16)):
    return {f"{size}-{i:05d}": encode(flat_image(i, size), "JPEG", quality=100) for i in range(n) for size in sizes}
