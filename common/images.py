"""The one place where pictures are read, fitted, converted and written.

Photos arrive in every form that phones, cameras and editors produce: turned by an EXIF tag, in the colour space of an
ICC profile, with alpha, a palette, one channel, four inks or sixteen bits. `read_image` brings each to 8-bit sRGB,
or refuses it in one sentence. Networks use float32 [3, H, W] in [-1, 1]; files and screens use uint8 [H, W, 3];
`to_tensor` and `to_uint8` are the only two lines between them, and their round trip is exact.

    from common.images import read_image, fit_image, to_tensor, save_image
    image = to_tensor(fit_image(read_image("photo.heic"), 256))         # float32 [3, 256, 256] in [-1, 1]
    save_image(image, "face.png")
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# torch is imported where a tensor is made, not here: the encoding workers of prepare_data.py start without it.

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm .pnm .tga .avif .jp2 .heic .heif".split()
)
FITS = ("crop", "pad", "squash")
RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "area": Image.Resampling.BOX,  # Pillow's box filter averages the covered area when it shrinks
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
WHITE = (255, 255, 255)

# Keys of PIL's `info` that ask for more than a plain copy.
_SPECIAL = frozenset(("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "transparency", "icc_profile"))
# What Pillow's decoders raise for damaged content, in its several formats.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """A file is not a readable picture; the message is one sentence that names it."""


# -- reading -------------------------------------------------------------------------------------------------------


def read_image(source: str | os.PathLike | bytes, *, background: Sequence[int] = WHITE) -> Image.Image:
    """Reads a picture file, or its bytes, as 8-bit sRGB.

    EXIF orientation is applied, an ICC profile converted to sRGB, alpha composited on `background` (R, G, B in 0..255),
    palette, grey and CMYK expanded, 16-bit grey scaled to 8 bits. Of an animation the first frame is taken.
    Returns a PIL image of mode RGB without metadata.
    Raises FileNotFoundError if the file is absent, ImageError if it is damaged, cut short, not a picture, larger than
    Pillow's decompression-bomb limit (179 megapixels), or of a kind without a defined range (32-bit float).
    """
    is_bytes = isinstance(source, (bytes, bytearray, memoryview))
    name = "the encoded image" if is_bytes else str(source)
    try:
        with _open(io.BytesIO(source) if is_bytes else Path(source)) as image:
            image.load()
            return _to_srgb(image, tuple(background))
    except FileNotFoundError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} cannot be read as an image: {_reason(error)}") from error


def check_header(path: str | os.PathLike) -> str | None:
    """Opens a file without decoding its pixels (about 0.1 ms). Returns None, or why it is not a picture."""
    try:
        with _open(Path(path)):
            return None
    except _DECODE_ERRORS as error:
        return _reason(error)


def image_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """Width and height as the header has them, before any EXIF orientation; None if it is no picture."""
    try:
        with _open(Path(path)) as image:
            return image.size
    except _DECODE_ERRORS:
        return None


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The picture files below a folder, at any depth, sorted by their POSIX path relative to it.

    Told by suffix, in any case. Hidden files and folders are left out, links to folders followed once.
    Raises FileNotFoundError if the folder is absent, ValueError if it is a file.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: a folder of images is expected")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: a folder of images is expected")
    found, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        seen = os.path.realpath(parent) in visited  # by a link that leads back up
        visited.add(os.path.realpath(parent))
        folders[:] = [] if seen else sorted(f for f in folders if not f.startswith("."))
        found += [] if seen else [Path(parent, f) for f in files if not f.startswith(".")]
    found = [p for p in found if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def _open(source: Path | io.BytesIO) -> Image.Image:
    if isinstance(source, Path) and source.suffix.lower() in (".heic", ".heif"):
        _register_heif()
    if isinstance(source, Path) and source.is_file() and source.stat().st_size == 0:
        raise ValueError("it is empty (0 bytes)")
    return Image.open(source)


@functools.cache
def _register_heif() -> None:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        warnings.warn("HEIC photos need the package pillow-heif; without it they are not read", stacklevel=2)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its content is not in a known image format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _to_srgb(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode == "RGB" and image.format in ("PNG", "JPEG", "WEBP") and not (_SPECIAL & image.info.keys()):
        image.info = {}
        return image  # the common case, and every item of an LMDB

    image = _upright(image)
    if image.mode[0] in "IF":  # I, I;16, I;16B, F
        image = _sixteen_to_eight(image)
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("R") if grey else image.convert("RGB")  # drops alpha, keeps the colour beneath
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")  # 1, P, YCbCr, LAB, HSV, RGBX
    transform = _icc_transform(profile, image.mode) if profile else None
    image = (image if transform is None else transform.apply(image)).convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, background), alpha)
    image.info = {}
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:
        return image  # a damaged EXIF block says nothing about orientation; the pixels are sound


def _sixteen_to_eight(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are 32-bit floats, whose range is not defined: convert it to 8 or 16 bits first")
    # Pillow opens 16-bit grey as I;16*, and 16-bit PGM as I with the same range 0..65535; 65535 / 257 = 255.
    values = np.asarray(image).astype(np.int64)
    if values.max() > 65535 or values.min() < 0:
        raise ValueError("its pixels are integers beyond 16 bits: convert it to 8 or 16 bits first")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


@functools.lru_cache(maxsize=16)
def _icc_transform(profile: bytes, mode: str):
    """The transform of an ICC profile to sRGB, or None where there is nothing to do or the profile is unusable."""
    from PIL import ImageCms  # needs the littlecms2 of Pillow's wheels

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # damaged, or for another number of channels than the picture has: shown as plain RGB


# -- fitting -------------------------------------------------------------------------------------------------------


def fit_image(
    image: Image.Image, size: int, *, fit: str = "crop", resample: str = "lanczos", background: Sequence[int] = WHITE
) -> Image.Image:
    """Makes a picture square: size x size pixels.

    fit: `crop` keeps the centre square, `pad` keeps everything and fills the rest with `background`, `squash` changes
    the aspect. resample: a name in RESAMPLE. A picture that has the size already comes back unchanged.
    """
    if fit not in FITS:
        raise ValueError(f"fit is one of {', '.join(FITS)}, not {fit!r}")
    if resample not in RESAMPLE:
        raise ValueError(f"resample is one of {', '.join(RESAMPLE)}, not {resample!r}")
    width, height = image.size
    if (width, height) == (size, size):
        return image
    method = RESAMPLE[resample]
    if fit == "squash" or width == height:
        return image.resize((size, size), method)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.resize((size, size), method, box=(left, top, left + side, top + side))
    scale = size / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = Image.new("RGB", (size, size), tuple(background))
    canvas.paste(image.resize(inner, method), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return canvas


# -- conversion ----------------------------------------------------------------------------------------------------


def to_tensor(image):
    """PIL image, or uint8 array [H, W, 3] or [H, W] -> torch float32 [3, H, W] in [-1, 1]."""
    import torch

    array = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8:
        raise TypeError(f"expected a PIL image or a uint8 array, got {array.dtype}")
    array = np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def to_uint8(images) -> np.ndarray:
    """Tensor [..., 3, H, W] in [-1, 1], any float type and device -> uint8 array [..., H, W, 3] in 0..255.

    Values beyond the range are clamped. The tensor itself is not changed.
    """
    scaled = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).byte()
    return np.ascontiguousarray(scaled.movedim(-3, -1).cpu().numpy())


def to_pil(image) -> Image.Image:
    """Tensor [3, H, W] in [-1, 1], uint8 array [H, W, 3] or [H, W], or PIL image -> PIL image (RGB)."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = image if isinstance(image, np.ndarray) else to_uint8(image)
    if array.dtype != np.uint8:
        raise TypeError(f"expected a tensor in [-1, 1] or a uint8 array, got an array of {array.dtype}")
    return Image.fromarray(array).convert("RGB")


# -- sheets --------------------------------------------------------------------------------------------------------


# -- writing -------------------------------------------------------------------------------------------------------


def save_image(image, path: str | os.PathLike, *, quality: int = 95) -> Path:
    """Writes a tensor [3, H, W] in [-1, 1], a uint8 array or a PIL image; the format follows the suffix.

    quality: of JPEG (written without chroma subsampling) and WebP. The folder is made when absent.
    Raises ValueError for a suffix that is no image format.
    """
    path = Path(path)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format is None:
        raise ValueError(f"{path}: no image format has the suffix {path.suffix!r}; use .png, .jpg or .webp")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"JPEG": {"quality": quality, "subsampling": 0}, "WEBP": {"quality": quality}}.get(image_format, {})
    to_pil(image).save(path, image_format, **options)
    return path
