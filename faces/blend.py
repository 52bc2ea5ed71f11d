"""An edit carried from the generator's image of a face into the photo, blended by region.

blended = blend_edit(crop, edited, unedited)                  # where the edit is strong, the drawn face
photo = paste_edit(photo, edited, unedited, alignment)        # the same, in the whole photo

A difference alone (`faces.align.add_change`) keeps all that the inversion missed, so that an edit meets features of the
photo that lie a few pixels beside those it was made for: a smile becomes a shadow, wrinkles lose half of their
contrast. Here the missed part of the photo is taken in three bands. Light (blurred over LIGHT of the side) is kept
everywhere; structure, up to the generator's resolution, goes where the edit is strong; so does most of the detail
beyond that resolution.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from faces.align import AlignError, Alignment, composite, crop_aligned, feather_mask, to_bytes

LIGHT = 0.06  # of the side: radius within which a difference between photo and drawn face counts as its light
SPREAD = 0.025  # of the side: radius of an edit's region
WEAK, STRONG = 3.0, 12.0  # grey levels of changed structure: up to the first the photo, from the second the drawn face
DETAIL = 0.4  # share of the photo's finest detail that stays where the drawn face is
FEATHER = 0.05  # of the side: width of the soft border
HEAD = (0.5, 0.52), (0.46, 0.5)  # centre and radii of the ellipse that edits stay in, of the side of an FFHQ frame
FADE = 0.25  # of these radii: where an edit fades out


def edit_region(edited: np.ndarray, unedited: np.ndarray) -> np.ndarray:
    """Share of the drawn face at each pixel, float32 [H, W] in 0..1. Images float32 [H, W, 3]."""
    side = len(edited)
    change = (edited - unedited).mean(-1)
    change = change - ndimage.gaussian_filter(change, LIGHT * side)  # a tint is no structure
    strength = np.sqrt(ndimage.gaussian_filter(np.square(change), SPREAD * side))
    ramp = np.clip((strength - WEAK) / (STRONG - WEAK), 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def head_mask(size: int) -> np.ndarray:
    """Weight of an edit, float32 [size, size]: 1 on the face, 0 in the background of an aligned frame."""
    (x, y), (width, height) = HEAD
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    radius = np.hypot((at[None] - x) / width, (at[:, None] - y) / height)
    ramp = np.clip((1 - radius) / FADE, 0, 1)
    return (ramp * ramp * (3 - 2 * ramp) * feather_mask(size, FEATHER)).astype(np.float32)


def blend_edit(crop, edited, unedited) -> tuple[np.ndarray, np.ndarray]:
    """The crop of a photo with an edit: float32 [H, H, 3] in 0..255, and the region [H, H] of the drawn face.

    crop: [H, H, 3]; edited, unedited: the generator's images [S, S, 3] of that face, S <= H; PIL images or uint8.
    """
    crop = _to_image(crop)
    before, after = (_resize(_to_image(image), crop.width) for image in (unedited, edited))
    size = _to_image(edited).width
    photo = np.asarray(crop, np.float32)
    region = edit_region(after, before)[..., None]
    coarse = _resize(crop.resize((size, size), Image.Resampling.BOX), crop.width)  # of the generator's resolution
    missed = coarse - before
    light = np.stack([ndimage.gaussian_filter(plane, LIGHT * crop.width) for plane in np.moveaxis(missed, -1, 0)], -1)
    kept = light + (1 - region) * (missed - light) + (1 - (1 - DETAIL) * region) * (photo - coarse)
    return after + kept, region[..., 0]


def paste_edit(photo: Image.Image, edited, unedited, alignment: Alignment) -> Image.Image:
    """The photo, original size, with an edit of the face that `alignment` had cropped from it. See `blend_edit`.

    Pixels outside the frame are not touched. Raises AlignError when the photo has another size than the aligned one.
    """
    if list(photo.size) != list(alignment.photo_size):
        raise AlignError(f"{alignment.source or 'the photo'} has not the size that was aligned")
    crop = crop_aligned(photo, alignment)
    blended, region = blend_edit(crop, edited, unedited)
    mask = head_mask(crop.width)
    keep = 1 - (1 - DETAIL) * region  # of the detail finer than the crop
    planes = (Image.fromarray(np.ascontiguousarray(plane, np.float32)) for plane in (mask, keep))
    return composite(photo, [Image.fromarray(to_bytes(blended)), crop, *planes], alignment)


def _to_image(image) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))


def _resize(image: Image.Image, size: int) -> np.ndarray:
    """float32 [size, size, 3], bicubic, values beyond 0..255 kept."""
    planes = [plane.convert("F").resize((size, size), Image.Resampling.BICUBIC) for plane in image.split()]
    return np.stack([np.asarray(plane) for plane in planes], -1)
