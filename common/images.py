"""The one place where images are read, fitted, converted and written.

`read_image` brings photos of every form to 8-bit sRGB, or refuses them in one sentence. Networks use float32 [3, H, W]
in [-1, 1], files uint8 [H, W, 3]; between them are only `to_tensor` (`normalise`) and `to_uint8`, exact both ways.
"""

import contextlib
import functools
import importlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps, UnidentifiedImageError

from common.cli import FILTERS, FITS, UserError
from common.files import atomic_write, open_regular

# torch is imported where a tensor is made: the encoding workers of prepare_data.py start without it.

_suffixes = ".jpg .jpeg .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm .pnm .tga .avif .jp2 .heic .heif"
IMAGE_SUFFIXES = frozenset(_suffixes.split())
# Of the formats that Pillow knows those that hold photos; not EPS, which it gives to Ghostscript, a program of its own.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000", "HEIF")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MAX_PIXELS = 110_000_000  # reading such an image needs less than 1 GB
# Pillow's box filter averages the covered area when it shrinks: `area` is another name for it
RESAMPLE = {name: Image.Resampling["BOX" if name == "area" else name.upper()] for name in FILTERS}
WHITE = (255, 255, 255)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1, torchvision's

# EXIF tags of the first directory that a TIFF may hand on: texts and sub-directories; its others tell where pixels lie
DESCRIPTIONS = {0x10E, 0x10F, 0x110, 0x112, 0x131, 0x132, 0x13B, 0x8298, 0x8769, 0x8825, *range(0x9C9B, 0x9CA0)}

# Keys of PIL's `info` that ask for more than a plain copy.
_SPECIAL = frozenset(("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "transparency", "icc_profile"))


class ImageError(ValueError):
    """A file is not a readable image; the message is one sentence that names it."""


@contextlib.contextmanager
def open_image(source: str | os.PathLike | bytes, *, decode: bool = True) -> Iterator[Image.Image]:
    """PIL's image of a file, or of its bytes, as it is. Raises as `read_image`, also for what the block decodes."""
    try:
        with _open(source) as image:
            if decode:
                image.load()
            yield image
    except Exception as error:  # a damaged file makes Pillow's decoders raise anything at all
        name = "the encoded image" if isinstance(source, (bytes, bytearray, memoryview)) else str(source)
        if isinstance(error, FileNotFoundError) and not os.path.islink(source):
            raise
        raise ImageError(f"{name} cannot be read as an image: {_reason(error, name)}") from error


def read_image(source: str | os.PathLike | bytes, *, background: Sequence[int] | None = WHITE) -> Image.Image:
    """Read an image file, or its bytes, as 8-bit sRGB: a PIL image, RGB, or RGBA with alpha kept. EXIF orientation is
    applied, an ICC profile converted to sRGB, alpha composited on `background` (R, G, B in 0..255; None: kept),
    16-bit grey scaled to 8 bits; of an animation the first frame is taken (see `reading_losses`). Raises
    FileNotFoundError, or ImageError for whatever is damaged, no image, no regular file, larger than MAX_PIXELS, or of a
    type without a defined range (32-bit float)."""
    with open_image(source) as image:
        return _to_srgb(image, None if background is None else tuple(background))


def check_header(path: str | os.PathLike) -> str | None:
    """Open a file without decoding its pixels (about 0.1 ms). Returns None, or why it is not an image."""
    try:
        with _open(path):
            return None
    except Exception as error:
        return _reason(error, str(path))


def image_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """Width and height as the header has them, before any EXIF orientation; None if it is no image."""
    with contextlib.suppress(Exception), _open(path) as image:
        return image.size
    return None


def reading_losses(path: str | os.PathLike) -> list[str]:
    """Sentences on what `read_image` and `upright_exif` leave out of a file; not on alpha (see `background`)."""
    with _open(path) as image:
        losses, n_frames = [], getattr(image, "n_frames", 1)
        if n_frames > 1 and image.format != "MPO":  # a phone's JPEG, whose further images are previews and depth
            losses.append(f"only the first of its {n_frames} {'pages' if image.format == 'TIFF' else 'frames'}")
        if image.mode[0] == "I" or any(";16" in str(tile[3]) for tile in image.tile):
            losses.append("8 of its 16 bits per channel")
        if upright_exif(image) is None:  # last: it decodes a PNG, whose tiles are known no more
            losses.append("nothing of the damaged EXIF block")
        return losses


def upright_exif(image: Image.Image) -> bytes | None:
    """The EXIF block of an open image file for its upright copy of any format; empty for none, None if damaged."""
    try:
        exif = opened = image.getexif()
        if image.format == "TIFF":
            exif = Image.Exif()
            exif.update({tag: opened.get_ifd(tag) or opened[tag] for tag in DESCRIPTIONS & set(opened)})
        if ExifTags.Base.Orientation in exif:
            exif[ExifTags.Base.Orientation] = 1
        return exif.tobytes() if len(exif) else b""
    except Exception:  # values of other types than their tags have: Pillow raises anything
        return None


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Files below a folder, at any depth, that have the suffix of an image, sorted by their relative POSIX path.
    Hidden files and folders are left out, links to folders followed once; dangling links, pipes and closed sub-folders
    are reported by whoever tries to read them. Raises FileNotFoundError, ValueError for a file, OSError."""
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: a folder of images is expected")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: a folder of images is expected")
    found, visited, closed = [], set(), []
    for parent, folders, files in os.walk(folder, onerror=closed.append, followlinks=True):
        seen = os.path.realpath(parent) in visited  # by a link that leads back up
        visited.add(os.path.realpath(parent))
        folders[:] = [] if seen else sorted(f for f in folders if not f.startswith("."))
        found += [] if seen else [Path(parent, f) for f in files if not f.startswith(".")]
    found = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    for error in closed:
        if Path(error.filename) == folder:
            raise error
        found.append(Path(error.filename))
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


@contextlib.contextmanager
def _open(source: str | os.PathLike | bytes) -> Iterator[Image.Image]:
    is_bytes = isinstance(source, (bytes, bytearray, memoryview))
    with io.BytesIO(source) if is_bytes else open_regular(source) as file:
        head = file.read(12)
        file.seek(0)
        if not head:
            raise ValueError("it is empty (0 bytes)")
        if head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS and not _register_heif():
            raise ValueError("it is a HEIC photo: pip install pillow-heif to read such, or export it as JPEG")
        Image.init()
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image


@functools.cache
def _register_heif() -> bool:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _reason(error: BaseException, name: str) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its content is not in a known image format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS / 1e6:.0f} megapixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UserError):
        return str(error).removeprefix(f"{name} ")
    return " ".join(str(error).split()) or type(error).__name__


def _to_srgb(image: Image.Image, background: tuple[int, ...] | None) -> Image.Image:
    opened, profile = image, image.info.get("icc_profile")
    if image.mode == "RGB" and image.format in ("PNG", "JPEG", "WEBP") and not (_SPECIAL & image.info.keys()):
        image.info = {}
        return image  # the common case, and every item of an LMDB
    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing about orientation; the pixels are sound
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # I, I;16, I;16B, F
        image = _sixteen_to_eight(image)
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = image.getchannel("A")
        alpha = alpha if background is None else ImageChops.invert(alpha)
        image = image.getchannel("R") if grey else image.convert("RGB")  # drops alpha, keeps the colour beneath
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")  # 1, P, YCbCr, LAB, HSV, RGBX
    transform = _icc_transform(profile, image.mode) if profile else None
    image = image if transform is None else transform.apply(image)
    if image.mode != "RGB" or image is opened:  # a file's image keeps its tags, and a copy costs as much memory again
        image = image.convert("RGB")
    if alpha is not None and background is None:
        image.putalpha(alpha)
    elif alpha is not None:
        image.paste(background, mask=alpha)
    image.info = {}
    return image


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
        return None  # damaged, or for another number of channels than the image has: shown as plain RGB


def fit_image(image: Image.Image, size: int, *, fit="crop", resample="lanczos", background=WHITE) -> Image.Image:
    """Make an image square, size x size pixels. fit: `crop` keeps the centre square, `pad` keeps everything and fills
    the rest with `background`, `squash` changes the aspect. resample: a name in RESAMPLE."""
    if fit not in FITS:
        raise ValueError(f"fit is one of {', '.join(FITS)}, not {fit!r}")
    if resample not in RESAMPLE:
        raise ValueError(f"resample is one of {', '.join(RESAMPLE)}, not {resample!r}")
    (width, height), method = image.size, RESAMPLE[resample]
    if (width, height) == (size, size):
        return image
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


def resize(images, size: int):
    """Tensor [N, C, H, W] -> [N, C, size, size], bilinear, antialiased when it shrinks; differentiable."""
    from torch.nn.functional import interpolate

    if images.shape[2:] == (size, size):
        return images
    resized = interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized.to(images.dtype)  # a CPU has no antialiasing in half precision (torch 2.14)


def to_planes(image):
    """PIL image (RGB) or uint8 array [H, W, 3] -> torch uint8 [3, H, W], the same pixels in memory (channels last)."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(images, device="cpu"):
    """Torch uint8 [..., 3, H, W] -> float32 in [-1, 1] on the device."""
    return images.to(device).float().div_(127.5).sub_(1)


def to_tensor(image):
    """PIL image, or uint8 array [H, W, 3] or [H, W] -> torch float32 [3, H, W] in [-1, 1]."""
    array = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8:
        raise TypeError(f"expected a PIL image or a uint8 array, got {array.dtype}")
    array = np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array
    return normalise(to_planes(array).contiguous())


def to_uint8(images) -> np.ndarray:
    """Tensor [..., 3, H, W] in [-1, 1], any float type and device -> uint8 array [..., H, W, 3]; clamped."""
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


def save_image(image, path: str | os.PathLike, *, quality: int = 95) -> Path:
    """Write a tensor [3, H, W] in [-1, 1], a uint8 array or a PIL image, in the format of the suffix. Atomic. quality:
    of JPEG (without chroma subsampling) and WebP. Raises ValueError for an unknown suffix, OSError naming the file."""
    path = Path(path)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format is None:
        raise ValueError(f"{path}: no image format has the suffix {path.suffix!r}; use .png, .jpg or .webp")
    options = {"JPEG": {"quality": quality, "subsampling": 0}, "WEBP": {"quality": quality}}.get(image_format, {})
    with atomic_write(path, sync=False) as file:
        to_pil(image).save(file, image_format, **options)
    return path
