"""Faces by their five points, and images with known values."""

import numpy as np
from PIL import Image

# The astronaut's eyes, nose and mouth corners in scikit-image's 512 x 512 pixels, as YuNet finds them
ASTRONAUT = np.array([(202.95, 103.37), (246.22, 105.17), (223.65, 129.17), (203.08, 143.75), (241.92, 145.31)])
FRONTAL = np.array([(100.0, 100.0), (140.0, 100.0), (120.0, 120.0), (104.0, 145.0), (136.0, 145.0)])


def wave(x, y):
    """A smooth image [..., 3] in 0..255 with known values at any place."""
    return np.stack(
        [
            127 + 100 * np.sin(x / 17) * np.cos(y / 23),
            120 + 90 * np.cos(x / 29 + y / 19),
            np.clip(40 + 0.3 * x + 0.2 * y, 0, 255),
        ],
        axis=-1,
    )


def wave_photo(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.rint(wave(x, y)).astype(np.uint8))


def turned(points, degrees, scale=1.0, shift=(0, 0)):
    angle = np.radians(degrees)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * points @ matrix.T + shift


def difference(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
