"""What the demo page does, without the page: a photo or a drawn face, its code, edits, read-outs, the photo again.

    tools = load_tools("face-wpp-64.safetensors", "cpu", "checkpoints")
    face = take_photo(tools, "me.jpg")                  # aligned; or draw_face(tools, seed)
    face = invert(tools, face)                          # by the encoder, at once (better: demo_app/refinement.py)
    view = render_edit(tools, face, Edit({"smile": 2.0}))
    photo = paste(face, view)

Every step is that of a script, so that demo_app/commands.py can write down the commands with the same result. A user's
mistake is a SessionError, one sentence that names the upload and no path of this machine.
"""

from __future__ import annotations

import io
import re
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common.images import check_header, fit_image, read_image, to_tensor
from editing.boundary import Boundary, BoundaryError, load_boundary
from editing.edit import InvertedFace, edit_codes, render_codes, score_along, search_distance
from editing.evaluate import score_frames
from faces.align import TEMPLATE, Alignment, paste_back
from faces.folder import AlignSettings, PhotoTask, align_photo
from model import Generator, load_generator
from sampling.render import map_latents, noise_maps, render, seeded_z

ORDER = ("age", "gender", "smile")  # of the sliders; others after them
CROP = AlignSettings().size  # pixels of an aligned face, as align_faces.py writes it
SMALLEST = 48  # pixels of a photo's shorter side
MEGAPIXELS = 64  # a photo's largest area: decoded it takes three bytes per pixel, whatever the size of the file
TRUNCATION, MEAN_SAMPLES = 0.7, 1000  # of drawn faces
# Standard deviations: how far sliders and smile transfer go; with the bundled boundaries faces break beyond 6 to 9.
REACH = 8.0
NEAR = 0.02  # a score as near as this to the one wanted is as good
NOSE = (0.506, 0.623)  # where it lies in an FFHQ frame (perceptual/identity.py), of the side
PASTES = ("change", "face")


class SessionError(ValueError):
    """What was uploaded or asked for cannot be done; the message is one sentence for the user."""


@dataclass
class Tools:
    """Networks and boundaries, loaded once, frozen, on one device. Everything that is None is done without."""

    generator: Generator
    ckpt: Path
    mean: torch.Tensor  # [1, L, D], mean code
    std: torch.Tensor  # [L], deviation of the codes, the norm over channels
    boundaries: dict[str, tuple[Path, Boundary]] = field(default_factory=dict)
    encoder: object | None = None  # a pSp network for this generator
    encoder_path: Path | None = None
    scorer: object | None = None
    scorer_name: str = "face-scorer"
    identity: object | None = None
    perceptual: object | None = None
    perceptual_name: str = "auto"
    conditional: object | None = None  # demo_app/expression.py: another generator, for the expression of a reference
    weights_dir: Path | None = None
    detecting: threading.Lock = field(default_factory=threading.Lock)  # the detector serves one thread at a time

    @property
    def n_layers(self) -> int:
        return self.generator.config.n_tokens

    @property
    def size(self) -> int:
        return self.generator.config.size

    @property
    def space(self) -> str:
        """Of inverted codes: as the encoder gives them; without one w++, or w."""
        return self.encoder.space if self.encoder is not None else self.generator.config.space


@dataclass(frozen=True)
class Face:
    """One face and what is known of it. name: for files; source: file name of the upload, "" for a drawn face."""

    name: str
    source: str
    photo: Image.Image
    alignment: Alignment
    crop: Image.Image  # aligned, CROP pixels (a drawn face: the generator's size)
    note: str = ""  # of the alignment, such as "2 faces, the largest taken"
    landmarks: list | None = None  # five points, when they were given
    seed: int | None = None  # of a drawn face
    code: np.ndarray | None = None  # float32 [L, D]
    noise: list[torch.Tensor] | None = None  # per layer [1, 1, r, r], CPU
    method: str = ""  # drawn | encoder | mean | projector
    steps: int = 0  # of the projector


@dataclass(frozen=True)
class Edit:
    """distances: attribute -> standard deviations of the boundary's samples; layers: first and last that move."""

    distances: dict[str, float] = field(default_factory=dict)
    layers: tuple[int, int] | None = None

    def moving(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.distances.items() if value}


@dataclass(frozen=True)
class View:
    """code: float32 [L, D] of the edit; inversion, edited: uint8 [size, size, 3]."""

    code: np.ndarray
    inversion: np.ndarray
    edited: np.ndarray


# -- loading -------------------------------------------------------------------------------------------------------


def load_tools(ckpt, device="cpu", boundaries=None) -> Tools:
    """The generator of `ckpt`, and the boundaries of a folder that were fitted for it; of several for one attribute the
    last by name. Raises FileNotFoundError, CheckpointError, or BoundaryError when a boundary's shape does not fit."""
    generator = load_generator(ckpt, device).requires_grad_(False)
    config = generator.config
    if config.condition_dim:
        raise SessionError(f"{ckpt} is a conditional generator: expected one without a condition")
    mean, std = generator.latent_statistics(MEAN_SAMPLES)
    width = config.style_dim * (1 if config.w_space else config.n_tokens)
    found = {}
    for path in find_boundaries(boundaries, generator.fingerprint) if boundaries else ():
        boundary = load_boundary(path, space=config.space, width=width)
        found[boundary.attribute] = (path, boundary)
    order = [name for name in ORDER if name in found] + sorted(set(found) - set(ORDER))
    return Tools(generator, Path(ckpt), mean, std, {name: found[name] for name in order})


def find_boundaries(folder, fingerprint: str) -> list[Path]:
    """The boundary files (.npz) in a folder that were fitted for this generator, by name. FileNotFoundError."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--boundaries {folder} does not exist: a folder of .npz files is expected")
    found = []
    for path in sorted(Path(folder).glob("*.npz")):
        try:
            boundary = load_boundary(path)
        except BoundaryError:
            continue  # noise maps, somebody else's arrays
        if boundary.fingerprint == fingerprint:
            found.append(path)
    return found


# -- a face --------------------------------------------------------------------------------------------------------


def draw_face(tools: Tools, seed: int) -> Face:
    """The generator's own face of a seed, with its code: generate.py --truncation 0.7 --noise none."""
    z = seeded_z(tools.generator, [seed])
    (code,) = map_latents(tools.generator, z, truncation=TRUNCATION, mean=tools.mean)
    noise = [layer.cpu() for layer in noise_maps(tools.generator, "none")]
    (picture,) = render(tools.generator, [code], noise=noise)
    photo, name, size = Image.fromarray(picture), f"seed{seed:04d}", tools.size
    alignment = Alignment(
        quad=[[-0.5, -0.5], [-0.5, size - 0.5], [size - 0.5, size - 0.5], [size - 0.5, -0.5]],
        photo_size=[size, size],
        size=size,
        landmarks=[],
        whole=True,
        name=name,
    )
    return Face(name, "", photo, alignment, photo, seed=seed, code=code.numpy(), noise=noise, method="drawn")


def take_photo(tools: Tools, path, *, landmarks=None) -> Face:
    """The largest face of an uploaded photo, aligned as align_faces.py does it.

    landmarks: five points [x, y] by hand, for a face that the detector misses, or "aligned" for a picture that is an
    aligned face already. Raises SessionError for a file that is no picture, too large or too small, or shows no face.
    """
    path = Path(path)
    source = path.name
    check_size(path)
    if landmarks == "aligned":
        landmarks = aligned_landmarks(path)
    task = PhotoTask(path, source, path.stem, landmarks=landmarks, weights_dir=tools.weights_dir)
    try:
        with tools.detecting:
            record, crops = align_photo(task)
    except FileNotFoundError:
        raise SessionError(
            "there are no weights of the face detector here (python -m common.weights get yunet_640): "
            "give the five points by hand, or a face that is aligned already"
        ) from None
    if not crops:
        if record.outcome == "no face":
            raise SessionError(
                f"no face was found in {source}: take a photo in which the face is larger and seen from "
                "the front, or give its five points by hand"
            )
        raise SessionError(record.note.replace(str(path), source))
    (alignment,) = record.faces
    if alignment.side < tools.size:
        raise SessionError(
            f"the face in {source} is too small: {alignment.side:.0f} pixels wide with its frame, at "
            f"least {tools.size} are needed"
        )
    crop = Image.open(io.BytesIO(crops[0][1])).convert("RGB")
    return Face(safe_name(source), source, read_image(path), alignment, crop, record.note, landmarks)


def check_size(path: Path) -> None:
    """SessionError for what is no picture, or has too few or too many pixels; pixels are not decoded."""
    reason = check_header(path)
    if reason:
        raise SessionError(f"{path.name} cannot be read as an image: {reason}")
    with Image.open(path) as image:
        width, height = image.size
    if min(width, height) < SMALLEST:
        raise SessionError(
            f"{path.name} is too small: {width}x{height} pixels, at least {SMALLEST}x{SMALLEST} are needed"
        )
    if width * height > MEGAPIXELS * 1e6:
        raise SessionError(
            f"{path.name} is too large: {width * height / 1e6:.0f} megapixels, at most {MEGAPIXELS} are taken"
        )


def aligned_landmarks(path: Path) -> list[list[float]]:
    """Five points of a face that fills the picture's centre square as FFHQ frames it."""
    with Image.open(path) as image:
        width, height = ImageOps.exif_transpose(image).size
    corner = np.array([width - min(width, height), height - min(width, height)]) / 2
    points = np.insert(TEMPLATE, 2, NOSE, axis=0) * min(width, height) - 0.5 + corner
    return points.round(2).tolist()


def safe_name(source: str) -> str:
    """A short name for files: letters, digits, - and _ of the upload's stem."""
    return re.sub(r"[^\w-]+", "_", Path(source).stem).strip("_")[:60] or "face"


# -- inversion -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def invert(tools: Tools, face: Face) -> Face:
    """The face with its code by the encoder and the generator's stored noise: pSp/scripts/inference.py.

    Without an encoder the mean code, from which a refinement starts. A drawn face keeps its own code.
    """
    if face.method == "drawn":
        return face
    noise = [layer.cpu() for layer in tools.generator.fixed_noise()]
    if tools.encoder is None:
        return replace(face, code=tools.mean[0].cpu().numpy(), noise=noise, method="mean", steps=0)
    net = tools.encoder
    image = to_tensor(fit_image(face.crop, max(net.config.input_size, net.image_size)))[None]
    code = net.encode(net.fit(image.to(tools.mean)))[0]  # [L, D]
    return replace(face, code=code.float().cpu().numpy(), noise=noise, method="encoder", steps=0)


# -- edits ---------------------------------------------------------------------------------------------------------


def render_edit(tools: Tools, face: Face, edit: Edit) -> View:
    """Inversion and edit, as edit_attribute.py --distance relative --unit std renders them."""
    moving, codes = edit.moving(), face.code[None]
    layers = moving_layers(tools, edit)
    if moving:
        boundaries = [tools.boundaries[name][1] for name in moving]
        steps = np.array([[value * boundary.std for value, boundary in zip(moving.values(), boundaries, strict=True)]])
        codes = edit_codes(face.code, boundaries, steps, layers=layers)
    inversion, edited = render_codes(tools.generator, np.concatenate((face.code[None], codes)), face.noise)
    return View(codes[0], inversion, edited)


def moving_layers(tools: Tools, edit: Edit):
    """range of the layers that move, None for all. SessionError when the first comes after the last."""
    if edit.layers is None or tuple(edit.layers) == (0, tools.n_layers - 1):
        return None
    first, last = edit.layers
    if not 0 <= first <= last < tools.n_layers:
        raise SessionError(
            f"layers {first} to {last}: the first must not come after the last (0 to {tools.n_layers - 1})"
        )
    return range(first, last + 1)


def transfer_smile(tools: Tools, face: Face, reference: Face, edit: Edit) -> tuple[float, float, float]:
    """How far to move along smile for the reference's smile: (standard deviations, score wanted, score reached).

    The reference is scored at the generator's size; the other sliders of `edit` are at zero while this is looked for.
    """
    if "smile" not in tools.boundaries or tools.scorer is None:
        raise SessionError("expression transfer needs a scorer and a boundary for smile, which are not loaded")
    column, boundary = tools.scorer.column("smile"), tools.boundaries["smile"][1]
    picture = np.asarray(fit_image(reference.crop, tools.size))
    wanted = float(score_frames(tools.scorer, [picture])[0, column])
    inverted = InvertedFace(face.name, face.code, face.noise)
    score = score_along(tools.generator, inverted, boundary, tools.scorer, column, moving_layers(tools, edit))
    distance, reached = search_distance(score, wanted, limit=REACH * boundary.std, near=NEAR)
    return round(distance / boundary.std, 2), wanted, reached


@torch.no_grad()
def read_out(tools: Tools, face: Face, view: View) -> list[list]:
    """Rows [what, unit, photo, inversion, edited]: every attribute of the scorer, identity to the photo and inversion.

    All three are judged at the size of the edit.
    """
    frames = [np.asarray(fit_image(face.crop, len(view.edited))), view.inversion, view.edited]
    rows = []
    if tools.scorer is not None:
        scores = score_frames(tools.scorer, frames)
        for column, attribute in enumerate(tools.scorer.attributes):
            digits = 0 if attribute.kind == "years" else 2
            rows.append(
                [
                    attribute.name,
                    attribute.meaning or attribute.unit,
                    *(f"{value:.{digits}f}" for value in scores[:, column]),
                ]
            )
    if tools.identity is not None:
        images = torch.stack([to_tensor(frame) for frame in frames]).to(tools.mean)
        alike = tools.identity.embed(images)
        for i, what in enumerate(("photo", "inversion")):
            rows.append(
                [
                    f"identity to the {what}",
                    "1: the same face, about 0: strangers",
                    *(f"{value:.2f}" for value in (alike @ alike[i]).tolist()),
                ]
            )
    return rows


# -- back into the photo -------------------------------------------------------------------------------------------


def paste(face: Face, view: View, paste_mode: str = "change", *, longest: int | None = None) -> Image.Image:
    """The photo with the edit in it; longest: at most that many pixels on the longer side, for a quick look.

    change: only what the edit changed is added, so that the photo keeps its sharpness; face: the generator's picture.
    """
    if paste_mode not in PASTES:
        raise SessionError(f"pasting is one of {', '.join(PASTES)}, not {paste_mode!r}")
    photo, alignment = face.photo, face.alignment
    if longest and max(photo.size) > longest:
        photo, alignment = shrink(photo, alignment, longest)
    return paste_back(photo, view.edited, alignment, unedited=view.inversion if paste_mode == "change" else None)


def shrink(photo: Image.Image, alignment: Alignment, longest: int) -> tuple[Image.Image, Alignment]:
    """The photo and where its face lies, scaled down."""
    scale = longest / max(photo.size)
    size = [max(1, round(value * scale)) for value in photo.size]
    scales = np.divide(size, photo.size)
    quad = (np.array(alignment.quad) + 0.5) * scales - 0.5
    return photo.resize(size, Image.Resampling.LANCZOS), replace(alignment, quad=quad.tolist(), photo_size=size)
