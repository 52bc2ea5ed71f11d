"""Edited faces back into their photos, by the Alignment that was kept beside the crop (faces/align.py).

`paste_back` pastes a face with a feathered border. `paste_edit` pastes what an edit changed: the photo moves as the
drawn face moves (optical flow), so that all that the inversion missed moves along, at the photo's resolution; then the
difference that motion does not explain is added.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageCms
from scipy import ndimage
from tqdm import tqdm

from common.cli import UserError
from common.files import atomic_write, safe_name
from common.images import WHITE, list_images, open_image, read_image, reading_losses, to_pil, upright_exif
from faces.align import AlignError, Alignment, crop_aligned, read_alignment, to_bytes
from faces.folder import require_elsewhere

STRUCTURE_SCALE = 10.0  # grey levels of changed structure at which 37% of the photo's own detail is kept
BORDER = 0.1  # of the side: width of the soft border of a pasted face

FAR, SMOOTH = 0.03, 0.03  # of the side: longest motion, and its blur; more draws swirls on foreheads
COLOUR = 0.06  # of the side: blur of a change of hue
HUE = 0.35  # share of it that is taken over; more reddens older skin
STRONGEST = 50.0  # grey levels: largest change beyond motion, softly; more draws smudges beside mouths and bald bands
FRAMES = 150.0  # the same of glasses, which may be black on a fair face
FEATHER = 0.05  # of the side: width of the soft border
PARTS = {  # ellipses that an edit stays in: centre and radii, of the side of an FFHQ frame
    "head": [((0.5, 0.52), (0.46, 0.5))],
    "eyes": [((0.38, 0.48), (0.12, 0.07)), ((0.62, 0.48), (0.12, 0.07))],
    "mouth": [((0.5, 0.7), (0.3, 0.2))],
    "glasses": [((0.5, 0.49), (0.38, 0.15))],
    "nose": [((0.5, 0.57), (0.13, 0.12))],
    "lips": [((0.5, 0.71), (0.17, 0.09))],
}
FADE = 0.25  # of these radii: where an edit fades out
SPARED = 0.8  # share of an edit that features of the photo are spared; more of it smears teeth and doubles noses
FEATURES = {"head": {"eyes", "nose", "lips"}, "mouth": {"nose"}}  # by the parts that an edit changes

KEPT_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


class Change(NamedTuple):
    """An edit as a generator draws it: images [S, S, 3], PIL or uint8, before and after; the parts that it changes."""

    unedited: Image.Image | np.ndarray
    edited: Image.Image | np.ndarray
    parts: tuple[str, ...] = ("head",)


def paste_back(photo, face, alignment, *, unedited=None) -> Image.Image:
    """The photo, original size, with an edited face in place of the one that `alignment` had cropped from it. face: PIL
    image, uint8 array [H, H, 3] or tensor [3, H, H] in [-1, 1]. unedited: the same before the edit: then only what the
    edit changed is pasted (`paste_edit`). What the photo has finer than the crop is kept where the edit left the
    structure alone. Pixels outside the frame are not touched. Raises AlignError for sizes that do not fit each other.
    """
    photo, face = to_pil(photo), to_pil(face)
    if face.width != face.height:
        raise AlignError(f"the edited face {alignment.name} is {face.width}x{face.height} pixels, not square")
    _require_same_size(photo, alignment)
    if unedited is not None:
        unedited = to_pil(unedited)
        if unedited.size != face.size:
            raise AlignError(f"the edited face {alignment.name} is {face.width} pixels wide, unedited {unedited.width}")
        crop = crop_aligned(photo, alignment, max(alignment.size, face.width))
        return paste_edit(photo, [Change(unedited, face, ("head", "eyes"))], alignment, crop)  # of whatever it is
    crop = crop_aligned(photo, alignment, face.width)
    new, old = np.asarray(face, np.float32), np.asarray(crop, np.float32)
    mask = feather_mask(face.width, 0.0 if alignment.whole else BORDER)
    blur, change = [0.02 * face.width] * 2 + [0], new - old
    spread = ndimage.gaussian_filter(np.square(change - ndimage.gaussian_filter(change, blur)), blur).mean(-1)
    keep = np.exp(-spread / STRUCTURE_SCALE**2)  # 1 where the structure is the same: a tint is no structure
    return _composite(photo, crop, old + mask[..., None] * (new - old), 1 - mask * (1 - keep), alignment)


def _require_same_size(photo, alignment) -> None:
    if photo.size != (size := tuple(alignment.photo_size)):
        found, aligned = (f"{width}x{height}" for width, height in (photo.size, size))
        raise AlignError(f"{alignment.source or 'the photo'} has {found} pixels, but {aligned} when it was aligned")


def _composite(photo, crop, new, kept, alignment, flow=None) -> Image.Image:
    """The photo whose aligned face, as its `crop` shows it, becomes new + kept * (photo - crop), at the photo's
    resolution. crop, new: [H, H, 3] in 0..255; kept: [H, H], share of the photo in 0..1; flow: see `motion`."""
    crop = np.asarray(crop, np.float32)
    if flow is None:
        flow = np.zeros((*kept.shape, 2), np.float32)
    planes = np.dstack((new - kept[..., None] * warp(crop, flow), 1 - kept, flow))  # all 0 where nothing was edited
    planes = [Image.fromarray(np.ascontiguousarray(plane, np.float32)) for plane in np.moveaxis(planes, -1, 0)]
    side = max(1, round(alignment.side))
    if len(crop) > side:  # no finer than the photo, else the mapping would alias
        planes = [plane.resize((side, side), Image.Resampling.LANCZOS) for plane in planes]
    fine = 3 * planes[0].width  # then a bilinear warp is as smooth as a bicubic one
    planes = [np.asarray(plane.resize((fine, fine), Image.Resampling.BICUBIC)) for plane in planes]
    quad = np.array(alignment.quad)
    low = np.clip(np.floor(quad.min(0) + 0.5), 0, photo.size).astype(int)
    high = np.clip(np.ceil(quad.max(0) + 0.5), 0, photo.size).astype(int)
    axes = np.stack([quad[3] - quad[0], quad[1] - quad[0]], axis=1)  # of the face, in pixels of the photo
    inverse, moves = np.linalg.inv(axes) * fine, np.dstack(planes[4:]) @ (axes.T / len(crop)).astype(np.float32)
    layers = np.dstack(planes[:3]), planes[3], moves
    border = cv2.BORDER_REPLICATE if alignment.whole else cv2.BORDER_CONSTANT
    how = {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderMode": border}
    photo, before = photo.copy(), np.asarray(photo.crop((*low, *high)))
    band = max(1, 2**22 // max(1, high[0] - low[0]))  # rows at a time: memory stays bounded for any photo
    for top in range(0, len(before), band):
        size, corner = before[top : top + band].shape[1::-1], low + (0, top)
        mapping = np.column_stack((inverse, inverse @ (corner - quad[0]) - 0.5))  # photo -> face pixels, of centres
        added, lost, moved = (cv2.warpAffine(layer, mapping, size, **how) for layer in layers)
        pixels = warp(before, moved, top, cv2.INTER_CUBIC) * (1 - lost)[..., None]
        photo.paste(Image.fromarray(cv2.add(pixels, added, dtype=cv2.CV_8U)), tuple(corner.tolist()))
    return photo


def _smooth(ramp) -> np.ndarray:
    """0 up to 0, 1 from 1, without a kink between."""
    ramp = np.clip(ramp, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def feather_mask(size, feather) -> np.ndarray:
    """[size, size], 1 inside, falling smoothly to 0 at the border over `feather` of the side."""
    at = (np.arange(size) + 0.5) / size
    ramp = _smooth(np.minimum(at, 1 - at) / max(feather, 1e-9))
    return np.outer(ramp, ramp).astype(np.float32)


def motion(edited: np.ndarray, unedited: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Flow [H, W, 2] of an edit: (x, y) in pixels from each pixel of `edited` to where it was in `unedited`, images
    float32 [H, W, 3], so that `warp(unedited, flow)` is like `edited`. Dense inverse search (Kroeger et al. 2016), no
    longer than FAR, smoothed; weighted by `mask` [H, W]."""
    grey = (to_bytes(image.mean(-1)) for image in (edited, unedited))
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    length = np.linalg.norm(flow, axis=-1, keepdims=True) / len(flow)
    flow *= FAR / np.maximum(length, FAR)
    return cv2.GaussianBlur(flow, (0, 0), SMOOTH * len(flow)) * mask[..., None]


def warp(image: np.ndarray, flow: np.ndarray, top=0, interpolation=cv2.INTER_LINEAR) -> np.ndarray:
    """Values of an image [H, W(, C)] at the pixels of its rows from `top`, moved by `flow` [h, W, 2]."""
    at = flow.copy()
    at[..., 0] += np.arange(flow.shape[1])
    at[..., 1] += np.arange(top, top + len(flow))[:, None]
    return cv2.remap(image, at, None, interpolation, borderMode=cv2.BORDER_REPLICATE)


def part_mask(size: int, parts=("head",)) -> np.ndarray:
    """Weight of an edit, float32 [size, size]: 1 on these parts of an aligned face, 0 around them, soft between."""
    at, radii = (np.arange(size, dtype=np.float32) + 0.5) / size, []
    for (x, y), (width, height) in (ellipse for part in parts for ellipse in PARTS[part]):
        radii.append(np.hypot((at[None] - x) / width, (at[:, None] - y) / height))
    return _smooth((1 - np.minimum.reduce(radii)) / FADE) * feather_mask(size, FEATHER)


def split_change(change: Change, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split an edit of an aligned crop of `size` pixels into its motion [size, size, 2] and what is added to the moved
    crop, float32 [size, size, 3] in grey levels. A change of the whole head's colour is left out, strong ones are
    softened, features of the face are spared, and colour changes smoothly: far along a boundary hair turns orange and
    green. Glasses lie on a face that does not move."""
    before, after = (_resize(to_pil(image), size) for image in (change.unedited, change.edited))
    mask, glasses = part_mask(size, change.parts), "glasses" in change.parts
    if spared := set.intersection(*(FEATURES.get(part, set()) for part in change.parts)):
        mask = mask * (1 - SPARED * part_mask(size, spared))
    flow = np.zeros((size, size, 2), np.float32) if glasses else motion(after, before, mask)
    added = after - warp(before, flow)
    added -= np.median(added[part_mask(size) > 0.5], axis=0)  # the photo's light stays
    strongest = FRAMES if glasses else STRONGEST
    added = strongest * np.tanh(added / strongest)
    grey = added.mean(-1, keepdims=True)
    hue = HUE * ndimage.gaussian_filter(added - grey, [COLOUR * size] * 2 + [0])
    return flow, mask[..., None] * (grey + hue)


def edit_crop(crop: Image.Image, changes: list[Change]) -> tuple[np.ndarray, np.ndarray]:
    """An aligned crop with edits of its face, one after the other: float32 [H, H, 3] in 0..255, and the motion
    [H, H, 2] of all."""
    new, total = np.asarray(crop, np.float32), np.zeros((crop.height, crop.width, 2), np.float32)
    for change in changes:
        flow, added = split_change(change, crop.width)
        new, total = warp(new, flow) + added, flow + warp(total, flow)
    return new, total


def paste_edit(photo: Image.Image, changes: list[Change], alignment: Alignment, crop=None) -> Image.Image:
    """The photo, original size, with edits of the face that `alignment` had cropped from it (see `edit_crop`)."""
    _require_same_size(photo, alignment)
    crop = crop_aligned(photo, alignment) if crop is None else crop
    new, flow = edit_crop(crop, changes)
    return _composite(photo, crop, new, np.ones(flow.shape[:2], np.float32), alignment, flow)


def _resize(image: Image.Image, size: int) -> np.ndarray:
    """float32 [size, size, 3], bicubic, values beyond 0..255 kept."""
    planes = [plane.convert("F").resize((size, size), Image.Resampling.BICUBIC) for plane in image.split()]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def save_like(image, photo, path) -> Path:
    """Write `image` (PIL, sRGB) as the file `photo` is: its format where that can hold a photo (else .png is added to
    the name), alpha, EXIF with the orientation upright, an sRGB profile if it had one, resolution. Returns the path."""
    with open_image(photo, decode=False) as original:
        exif, info, has_alpha = upright_exif(original), dict(original.info), original.has_transparency_data
    encoder = Image.registered_extensions().get(path.suffix.lower())
    if encoder not in KEPT_FORMATS:
        path, encoder = path.with_name(path.name + ".png"), "PNG"
    options = {"exif": exif} if exif else {}
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
    """`image`, an edit of `original` (RGBA) on white, as RGBA that looks so on white; unedited colours stay."""
    if original.mode != "RGBA":
        return image
    white = Image.new("RGBA", original.size, WHITE)
    seen = np.asarray(Image.alpha_composite(white, original).convert("RGB"), np.float32)
    colours, alpha = np.asarray(original, np.float32)[..., :3], np.asarray(original.getchannel("A"), np.float32) / 255
    change = np.asarray(image, np.float32) - seen
    change[np.abs(change) <= 1] = 0  # of rounding
    result = Image.fromarray(to_bytes(colours + change / np.maximum(alpha, 1 / 255)[..., None]))
    result.putalpha(original.getchannel("A"))
    return result


def paste_folder(photos: Path, edited: Path, alignment_file: Path, output_dir: Path, *, unedited=None) -> None:
    """Paste every edited face NAME.* into its photo; results keep the photos' relative paths. Raises UserError."""
    alignments, root = read_alignment(alignment_file), photos if photos.is_dir() else photos.parent
    alignments = {safe_name(name): face for name, face in alignments.items()} | alignments  # what latents call a crop
    by_photo: dict[str, list] = {}
    problems, notes, n_pasted, n_faces = [], [], 0, 0
    for path in list_images(edited):
        if path.stem in alignments:
            by_photo.setdefault(alignments[path.stem].source, []).append((path, alignments[path.stem]))
        else:
            problems.append(f"{path}: no face called {path.stem} in {alignment_file}")
    require_elsewhere({source: root / source for source in by_photo}, output_dir)
    for source, faces in tqdm(sorted(by_photo.items()), desc="pasting", unit="photo", disable=None):
        try:
            result = read_image(root / source)
            for path, alignment in faces:
                before = read_image(unedited / path.relative_to(edited)) if unedited else None
                result = paste_back(result, read_image(path), alignment, unedited=before)
            saved = save_like(result, root / source, output_dir / source)
            notes += [f"{saved} has {loss} of {root / source}" for loss in reading_losses(root / source)]
            n_pasted, n_faces = n_pasted + 1, n_faces + len(faces)
        except (ValueError, FileNotFoundError) as error:
            problems.append(f"{root / source}: {error}")
    for line in [f"left out: {problem}" for problem in problems] + [f"note: {note}" for note in notes]:
        print(line, file=sys.stderr)
    if n_pasted == 0:
        raise UserError(f"no face of {edited} could be pasted into a photo of {photos} ({len(problems)} left out)")
    print(f"{n_faces} faces pasted into {n_pasted} photos, {len(problems)} left out: {output_dir}")
