"""An edited photo written as its file was: format, alpha, EXIF, profile and resolution.

path = save_like(edited, "photos/alice.jpg", "edited/alice.jpg")
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from common.files import atomic_write
from common.images import WHITE, open_image, read_image

KEPT_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
ORIENTATION = 0x0112  # EXIF tag


def save_like(image, photo, path) -> Path:
    """Write `image` (PIL, sRGB) as the file `photo` is: its format where that can hold a photo (else PNG is added to
    the name), its alpha, its EXIF with the orientation set to upright, an sRGB profile if it had one, its resolution.
    """
    with open_image(photo) as original:
        exif, info, has_alpha = original.getexif(), dict(original.info), original.has_transparency_data
    if ORIENTATION in exif:
        exif[ORIENTATION] = 1
    encoder = KEPT_FORMATS.get(path.suffix.lower())
    if encoder is None:
        path, encoder = path.with_name(path.name + ".png"), "PNG"
    options = {"exif": exif.tobytes()} if len(exif) else {}
    if info.get("icc_profile"):
        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if info.get("dpi"):
        options["dpi"] = info["dpi"]
    options |= {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95, "exact": True}}.get(encoder, {})
    if has_alpha and encoder != "JPEG":
        image = with_alpha(image, read_image(photo, background=None))
    with atomic_write(path) as file:
        image.save(file, encoder, **options)
    return path


def with_alpha(image, original) -> Image.Image:
    """`image`, an edit of `original` (RGBA) as it looks on white, as RGBA that looks so on white: where nothing was
    edited, the colours beneath the alpha are those of `original`."""
    if original.mode != "RGBA":
        return image
    white = Image.new("RGBA", original.size, WHITE)
    seen = np.asarray(Image.alpha_composite(white, original).convert("RGB"), np.float32)
    colours, alpha = np.asarray(original, np.float32)[..., :3], np.asarray(original.getchannel("A"), np.float32) / 255
    change = np.asarray(image, np.float32) - seen
    change[np.abs(change) <= 1] = 0  # of rounding
    result = np.clip(colours + change / np.maximum(alpha, 1 / 255)[..., None], 0, 255)
    result = Image.fromarray(np.rint(result).astype(np.uint8))
    result.putalpha(original.getchannel("A"))
    return result
