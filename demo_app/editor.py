"""Edit the faces of a photo: the expensive half once per photo, the cheap half once per edit.

    editor = PhotoEditor(load_models("cpu"))
    editor.set_photo(read_image("me.jpg"), steps=100)         # detect, align, encode, refine: seconds
    result = editor.edit({"age": Target(15, relative=True)})  # a fraction of a second
    result.photo.save("older.jpg")
    print(result.faces[0].readings["age"])                    # asked, in the drawn face, in the photo

The shape is that of segment-anything's predictor (Kirillov et al. 2023, arXiv 2304.02643): set_image, then predict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from common.cli import UserError
from common.images import fit_image, to_tensor
from demo_app.models import LR_RATIO, Models
from demo_app.targets import NEAR, Reading, Target, open_error, position_for
from editing.edit import edit_codes, render_codes
from editing.evaluate import score_frames
from faces.align import Alignment, align, crop_aligned, to_bytes
from faces.blend import blend_edit, head_mask, paste_edit
from faces.detect import FaceDetector
from inversion.inputs import pixel_seed
from inversion.projector import choose_space, project
from sampling.render import map_latents, noise_maps, render, seeded_z

CROP = 256  # pixels of an aligned face
READ = 128  # pixels at which edits are tried out before one is pasted
TRIES = 13  # positions per attribute at which the photo is read
ROUNDS = 4  # of joint corrections of an edit
TRUNCATION = 0.7  # of drawn faces
PROJECT_FLAGS = ("lr", "mse", "noise", "noise_regularize")  # that a generator's file may recommend


class PhotoError(UserError):
    """A photo cannot be edited; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Inversion:
    """A face in a generator. condition: attributes [d] in [0, 1] under which it was found, of a conditional one."""

    w: np.ndarray  # float32 [L, D]
    noise: list[torch.Tensor]  # per layer [1, 1, r, r], CPU
    condition: np.ndarray | None = None


@dataclass(eq=False)
class Face:
    """A face of the photo, and what was found out about it. curves: attribute -> (positions, readings) [TRIES]."""

    alignment: Alignment
    crop: Image.Image  # CROP pixels
    inversion: Inversion
    expression: Inversion | None = None  # in the conditional generator, where it was asked for
    steps: int = 0  # of refinement
    exact: bool = False  # drawn by the generator itself
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class FaceEdit:
    """Result for one face. positions: attribute -> standard deviations of its boundary, or change of the condition."""

    face: Face
    positions: dict[str, float]
    readings: dict[str, Reading]
    changes: list[tuple[np.ndarray, np.ndarray]]  # per generator: inversion and edited face, uint8 [S, S, 3]

    def paste(self, photo: Image.Image) -> Image.Image:
        """The edit in the photo, which may have another size than the one that was edited."""
        alignment = scale_alignment(self.face.alignment, photo.size)
        for before, after in self.changes:
            photo = paste_edit(photo, after, before, alignment)
        return photo


@dataclass(frozen=True)
class Edited:
    """photo: the whole photo with all edited faces."""

    photo: Image.Image
    faces: list[FaceEdit]


class PhotoEditor:
    """Holds one photo with its faces; `models` may be shared by any number of editors, each used by one thread."""

    def __init__(self, models: Models):
        self.models = models
        self.photo: Image.Image | None = None
        self.faces: list[Face] = []
        self._detector: FaceDetector | None = None

    # -- once per photo ------------------------------------------------------------------------------------------------

    def set_photo(
        self,
        photo: Image.Image,  # RGB, as common.images.read_image gives it
        *,
        steps: int = 0,  # of refinement, after the encoder
        faces: str = "largest",  # or "all"
        landmarks=None,  # five points [x, y] in pixels per face, instead of the detector's
        expression: bool = False,  # invert in the conditional generator as well
        callback: Callable | None = None,  # callback() after every step of a refinement
    ) -> None:
        """Find the faces of a photo and invert them. Raises PhotoError when there is none, or none large enough."""
        alignments = self._align(photo, landmarks, faces)
        self.photo = photo
        self.faces = [Face(a, crop := crop_aligned(photo, a), self._encode(crop)) for a in alignments]
        if steps:
            self.refine(steps, callback=callback)
        if expression:
            self.set_expression(steps, callback=callback)

    def set_faces(self, photo: Image.Image, faces: list[Face]) -> None:
        """A photo whose faces were inverted before."""
        self.photo, self.faces = photo, faces

    def set_drawn(self, seed: int) -> None:
        """The generator's own face of a seed, whose w is exact: generate.py --truncation 0.7 --noise none."""
        generator = self.models.generator
        (w,) = map_latents(generator, seeded_z(generator, [seed]), truncation=TRUNCATION, mean=self.models.mean)
        noise = [layer.cpu() for layer in noise_maps(generator, "none")]
        (image,) = render(generator, [w], noise=noise)
        photo = Image.fromarray(image).resize((CROP, CROP), Image.Resampling.BICUBIC)
        quad = [[-0.5, -0.5], [-0.5, CROP - 0.5], [CROP - 0.5, CROP - 0.5], [CROP - 0.5, -0.5]]
        alignment = Alignment(quad, [CROP, CROP], CROP, landmarks=[], whole=True, name=f"seed{seed:04d}")
        self.set_faces(photo, [Face(alignment, photo, Inversion(w.cpu().numpy(), noise), exact=True)])

    def refine(self, steps: int, *, callback: Callable | None = None) -> float:
        """Optimise w and noise maps of all faces for `steps` more steps. Returns the loss, a mean over the faces."""
        if all(face.exact for face in self.faces):
            return 0.0
        models = self.models
        starts = [face.inversion for face in self.faces]
        found, loss = self._project(models.generator, (models.mean, models.std), models.space, starts, steps, callback)
        for face, inversion in zip(self.faces, found, strict=True):
            face.inversion, face.steps = inversion, face.steps + steps
            face.curves = {name: curve for name, curve in face.curves.items() if name not in models.boundaries}
        return loss

    def set_expression(self, steps: int, *, callback: Callable | None = None) -> None:
        """Invert the faces in the conditional generator, their own attributes held fixed; what is there stays."""
        conditional = self.models.conditional
        if conditional is None or all(face.expression for face in self.faces):
            return
        own = conditional.reader.read(self._images(conditional.generator)).numpy()
        maps = [layer.cpu() for layer in conditional.generator.fixed_noise()]
        ws = [face.inversion.w for face in self.faces]  # usually fine-tuned from the other: its w fit
        if ws[0].shape != conditional.mean[0].shape:
            ws = [conditional.mean[0].cpu().numpy()] * len(ws)
        starts = [Inversion(w, maps, condition) for w, condition in zip(ws, own, strict=True)]
        statistics = conditional.mean, conditional.std
        found, _ = self._project(conditional.generator, statistics, None, starts, max(steps, 1), callback)
        for face, inversion in zip(self.faces, found, strict=True):
            face.expression = inversion

    # -- once per edit -------------------------------------------------------------------------------------------------

    def edit(
        self,
        targets: Mapping[str, Target],  # attribute -> goal, read in the photo
        *,
        strength: float = 1.0,  # factor on all positions that were found
        layers: range | None = None,  # of w that move along boundaries; None: all
        rounds: int = ROUNDS,  # corrections until the photo shows what was asked for
    ) -> Edited:
        """Move attributes of all faces and put the faces back into the photo.

        Raises PhotoError for an attribute that the models cannot edit, or before a photo was set.
        """
        if self.photo is None:
            raise PhotoError("first choose a photo")
        for name in targets:
            if name not in self.models.attributes:
                known = ", ".join(self.models.attributes)
                raise PhotoError(
                    f"{name} cannot be edited: there is no boundary of it for this generator, only {known}"
                )
        photo, results = self.photo, []
        for face in self.faces:
            at = self._reach(face, targets, strength, layers, rounds)
            changes = [(before, after[0]) for before, after in self._draw(face, [at], layers)]
            result = FaceEdit(face, at, {}, changes)
            photo = result.paste(photo)
            crop = crop_aligned(photo, face.alignment)
            results.append(replace(result, readings=self._readings(face, targets, changes, crop)))
        return Edited(photo, results)

    def read(self, images) -> np.ndarray:
        """Scores [K, A] of aligned faces, PIL images or uint8 arrays of any size, read at the generator's size."""
        fitted = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
        return score_frames(self.models.reader, [np.asarray(fit_image(image, self.models.size)) for image in fitted])

    def curve(self, face: Face, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions [TRIES] along an attribute within its safe range, and what is read in the photo there."""
        if name not in face.curves:
            low, high = self.models.safe_range(name)
            at = np.concatenate((np.linspace(low, 0, TRIES // 2 + 1), np.linspace(0, high, TRIES // 2 + 1)[1:]))
            crops = list(self._try(face, [{name: value} for value in at], None))
            face.curves[name] = at, self.read(crops)[:, self.models.reader.column(name)]
        return face.curves[name]

    # -- behind them ---------------------------------------------------------------------------------------------------

    def _align(self, photo: Image.Image, landmarks, faces: str) -> list[Alignment]:
        if landmarks is not None:
            found = [(np.asarray(points), {}) for points in np.asarray(landmarks, float).reshape(-1, 5, 2)]
        else:
            self._detector = self._detector or FaceDetector(self.models.weights_dir)
            seen = self._detector.detect(photo, many=faces == "all")
            found = [(one.landmarks, {"score": round(one.score, 4)}) for one in seen]
        if not found:
            raise PhotoError("no face was found: take a photo with a larger face, seen from the front")
        found = found if faces == "all" else found[:1]
        alignments = [align(photo, points, size=CROP, **info) for points, info in found]
        large = [alignment for alignment in alignments if alignment.side >= self.models.size]
        if not large:
            side = max(alignment.side for alignment in alignments)
            raise PhotoError(
                f"the face is too small: {side:.0f} pixels wide with its frame, at least {self.models.size} are needed"
            )
        return large

    def _images(self, generator) -> torch.Tensor:
        """The aligned faces, [N, 3, S, S] in [-1, 1]."""
        images = [to_tensor(fit_image(face.crop, generator.config.size)) for face in self.faces]
        return torch.stack(images).to(generator.token)

    @torch.no_grad()
    def _encode(self, crop: Image.Image) -> Inversion:
        models, net = self.models, self.models.encoder
        noise = [layer.cpu() for layer in models.generator.fixed_noise()]
        if net is None:
            return Inversion(models.mean[0].cpu().numpy(), noise)
        image = to_tensor(fit_image(crop, max(net.config.input_size, net.image_size)))[None].to(models.mean)
        (w,) = net.encode(net.fit(image))  # [1, L, D]
        return Inversion(w.float().cpu().numpy(), noise)

    def _project(self, generator, statistics, space, starts, steps, callback) -> tuple[list[Inversion], float]:
        images, std = self._images(generator), statistics[1]
        recommended = generator.recommended.get("edit_photos", {})
        settings = {"lr": LR_RATIO * float(std.mean()), "mse": 1.0, "noise": 0.0}
        settings |= {name: value for name, value in recommended.items() if name in PROJECT_FLAGS}
        conditions = None if starts[0].condition is None else np.stack([start.condition for start in starts])
        losses = []

        def watch(step, active, synth, loss):
            losses.append(float(loss.mean()))
            if callback is not None:
                callback()

        pixels = ((images + 1) * 127.5).round().byte().cpu()
        result = project(
            generator,
            images,
            perceptual=self.models.perceptual,
            space=choose_space(generator, space),
            steps=steps,
            w_start=torch.from_numpy(np.stack([start.w for start in starts])),
            noise_start=[torch.cat(maps) for maps in zip(*(start.noise for start in starts), strict=True)],
            statistics=statistics,
            seeds=[pixel_seed(image, 0) for image in pixels],
            condition=None if conditions is None else torch.from_numpy(conditions),
            callback=watch,
            **settings,
        )
        if not torch.isfinite(result.latents).all():
            raise PhotoError("the refinement diverged: use --quality fast")
        found = [
            Inversion(w.numpy(), [layer[i : i + 1] for layer in result.noise], start.condition)
            for i, (w, start) in enumerate(zip(result.latents, starts, strict=True))
        ]
        return found, losses[-1]

    def _draw(self, face: Face, at: list[dict[str, float]], layers) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """Per generator that takes part: the face unedited, and at each of the K positions; uint8 [S, S, 3]."""
        models, drawn = self.models, []
        names = [name for name in models.boundaries if any(name in position for position in at)]
        if names or not any(at):
            boundaries = [models.boundaries[name] for name in names]
            std = [boundary.std or 1.0 for boundary in boundaries]
            steps = np.array([[position.get(name, 0.0) for name in names] for position in at]) * std
            moved = edit_codes(face.inversion.w, boundaries, steps, layers=layers) if names else face.inversion.w[None]
            ws = np.concatenate((face.inversion.w[None], moved))
            before, *after = render_codes(models.generator, ws, face.inversion.noise)
            drawn.append((before, after * (len(at) if not names else 1)))
        names = [name for name in models.attributes if name not in models.boundaries]
        if any(name in position for position in at for name in names):
            own, columns = face.expression, models.conditional.names
            conditions = np.repeat(own.condition[None], len(at) + 1, 0)  # [1 + K, d]
            for row, position in zip(conditions[1:], at, strict=True):
                row += [position.get(name, 0.0) if name in names else 0.0 for name in columns]
            before, *after = self._render_conditions(own, conditions)
            drawn.append((before, after))
        return drawn

    def _render_conditions(self, face: Inversion, conditions: np.ndarray) -> Iterator[np.ndarray]:
        """One at a time: render_codes takes one condition for all frames."""
        for condition in torch.from_numpy(conditions.astype(np.float32)):
            yield from render_codes(
                self.models.conditional.generator, face.w[None], face.noise, condition=condition[None]
            )

    def _try(self, face: Face, at: list[dict[str, float]], layers) -> Iterator[np.ndarray]:
        """The aligned photo at each position, uint8 [READ, READ, 3]: what paste_edit gives, at a small size."""
        crop = fit_image(face.crop, READ)
        mask = head_mask(READ)[..., None]
        drawn = self._draw(face, at, layers)
        for k in range(len(at)):
            image = np.asarray(crop, np.float32)
            for before, after in drawn:
                blended, _ = blend_edit(Image.fromarray(to_bytes(image)), after[k], before)
                image = image + mask * (blended - image)
            yield to_bytes(image)

    def _reach(self, face: Face, targets, strength, layers, rounds) -> dict[str, float]:
        """Positions at which the photo shows the targets: from each one's curve, then corrected together."""
        if not targets:
            return {}
        if face.expression is None and any(name not in self.models.boundaries for name in targets):
            self.set_expression(max(face.steps, 50))
        kinds = {name: self._kind(name) for name in targets}
        columns = [self.models.reader.column(name) for name in targets]
        curves = {name: self.curve(face, name) for name in targets}
        goals = {n: target.goal(self._at_rest(curves[n]), kinds[n]) for n, target in targets.items()}
        aims, best = dict(goals), (np.inf, {})
        for k in range(max(1, rounds)):
            at = {name: strength * position_for(*curves[name], aims[name], NEAR[kinds[name]]) for name in targets}
            at = self._within_safe(at)
            if (k == 0 and rounds == 0) or strength != 1:
                return at
            (image,) = self._try(face, [at], layers)
            errors = dict(zip(targets, np.array([*goals.values()]) - self.read([image])[0, columns], strict=True))
            errors = {n: open_error(e, goals[n], self._at_rest(curves[n]), kinds[n]) for n, e in errors.items()}
            total = sum(abs(error) / NEAR[kinds[name]] for name, error in errors.items())
            if total < best[0]:
                best = total, at
            if all(abs(error) <= NEAR[kinds[name]] / 2 for name, error in errors.items()):
                break
            aims = {name: aims[name] + errors[name] for name in targets}
        return best[1]

    def _within_safe(self, at: dict[str, float]) -> dict[str, float]:
        """Positions drawn towards 0 together, so that several edits leave the safe range no sooner than one."""
        shares = []
        for name, position in at.items():
            low, high = self.models.safe_range(name)
            shares.append(position / ((high if position > 0 else -low) or 1.0))
        factor = 1 / max(1.0, float(np.linalg.norm(shares)))
        return {name: factor * position for name, position in at.items()}

    def _at_rest(self, curve) -> float:
        return float(curve[1][TRIES // 2])

    def _kind(self, name: str) -> str:
        reader = self.models.reader
        return reader.attributes[reader.column(name)].kind

    def _readings(self, face: Face, targets, changes, crop) -> dict[str, Reading]:
        *drawn_by, photo = self.read([*(after for _, after in changes), crop])
        readings = {}
        for name, target in targets.items():
            drawn = drawn_by[0 if name in self.models.boundaries else -1]
            column, before = self.models.reader.column(name), self._at_rest(self.curve(face, name))
            goal = target.goal(before, self._kind(name))
            readings[name] = Reading(before, goal, float(drawn[column]), float(photo[column]), self._kind(name))
        return readings


def scale_alignment(alignment: Alignment, photo_size) -> Alignment:
    """The alignment in the same photo at another size (width, height)."""
    scales = np.divide(photo_size, alignment.photo_size)
    quad = (np.array(alignment.quad) + 0.5) * scales - 0.5
    return replace(alignment, quad=quad.tolist(), photo_size=list(photo_size))
