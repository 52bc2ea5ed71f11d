"""Images as encoded bytes, of kinds that Pillow writes and that it only reads."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def corners():
    """8x4, each quarter another colour: shows any turn or flip."""
    array = np.zeros((4, 8, 3), np.uint8)
    array[:2, :4], array[:2, 4:], array[2:, :4], array[2:, 4:] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(array)


def palette(transparency=None):
    image = Image.new("P", (4, 4))
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    image.putdata([0, 1] * 8)
    return encode(image, **({} if transparency is None else {"transparency": transparency}))


def rgba(colour, alpha):
    return Image.new("RGBA", (4, 4), (*colour, alpha))


def grey16(value):
    return Image.fromarray(np.full((4, 4), value, np.uint16))


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width, height, depth, colour_type, rows):
    """A PNG of kinds that Pillow reads and cannot write."""
    header = png_chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def png16(colour_type, *channels):
    return raw_png(1, 1, 16, colour_type, b"\0" + struct.pack(f">{len(channels)}H", *channels))


def noise(size=64, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3), np.uint8))
