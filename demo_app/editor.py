"""Edit the faces of a photo: the expensive half once per photo, the cheap half once per edit.

editor = PhotoEditor(load_models("cpu"))
editor.set_photo(read_image("me.jpg"), steps=100)         # detect, align, encode, refine: seconds
result = editor.edit({"age": Target(15, relative=True)})  # a fraction of a second
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from common.cli import UserError
from common.images import fit_image, read_image, to_pil, to_tensor
from demo_app.curves import cut_curve, position_for
from demo_app.models import Models, mean_w
from demo_app.targets import NEAR, Reading, Target, open_error, shows
from editing.attributes import EXPRESSION
from editing.edit import InvertedFace, edit_face
from editing.evaluate import score_frames
from editing.transfer import render_path
from faces.align import Alignment, align, crop_aligned, to_bytes
from faces.detect import FaceDetector
from faces.paste import Change, edit_crop, paste_edit
from inversion.tuning import tunable, tune, tuned_generator
from model import Generator
from sampling.render import map_latents, render, seeded_z

CROP = 256  # pixels of an aligned face
READ = 128  # pixels at which positions are tried out before one is corrected
TRIES = 7  # positions per attribute and way, up or down, at which the photo is read
ROUNDS = 4  # of joint corrections of an edit
TRUNCATION = 0.7  # of drawn faces
PART = {"smile": "mouth", "mouth_open": "mouth", "eyes_open": "eyes", "eyeglasses": "glasses"}  # that an edit changes
REACH = {"age": 4.0, "gender": 1.5}  # factor on a boundary's safe range in a photo, whose own detail stays; else 1


class PhotoError(UserError):
    """A photo cannot be edited; the message is one sentence that says what to do."""


class SmallFaceError(PhotoError):
    """The largest face has fewer pixels than the generator draws. side: of its frame; least: that would do."""

    def __init__(self, side: float, least: int):
        super().__init__(f"the face is too small: {side:.0f} pixels with its frame, at least {least} are needed")
        self.side, self.least = side, least


@dataclass(eq=False)
class Face:
    """A face of the photo and its inversions."""

    alignment: Alignment
    crop: Image.Image  # CROP pixels
    inversion: InvertedFace
    conditional: InvertedFace | None = None  # in the conditional generator, once an edit needed it
    steps: int = 0  # of refinement
    exact: bool = False  # drawn by the generator itself
    curves: dict = field(default_factory=dict)  # (attribute, down) -> (positions, readings)


@dataclass(frozen=True)
class FaceEdit:
    """Result for one face. positions: attribute -> standard deviations of its boundary, or change of the condition."""

    face: Face
    positions: dict[str, float]
    readings: dict[str, Reading]
    crop: Image.Image  # the aligned face in the edited photo
    changes: list[Change]  # one after the other

    def paste(self, photo: Image.Image) -> Image.Image:
        """The edit in the photo, which may have another size than the one that was edited."""
        return paste_edit(photo, self.changes, scale_alignment(self.face.alignment, photo.size))


@dataclass(frozen=True)
class Edited:
    """The whole photo with all edited faces."""

    photo: Image.Image
    faces: list[FaceEdit]


class PhotoEditor:
    """One photo with its faces; `models` may be shared by any number of editors, each used by one thread."""

    def __init__(self, models: Models):
        self.models = models
        self.photo: Image.Image | None = None
        self.faces: list[Face] = []
        self.left_out = 0  # faces of the photo with fewer pixels than the generator draws
        self.layers: range | None = None  # whose w or condition an edit moves; None: all

    def set_photo(
        self,
        photo: Image.Image,  # RGB, as common.images.read_image gives it
        *,
        steps: int = 0,  # of refinement, after the encoder
        faces: str = "largest",  # or "all"
        landmarks=None,  # five points [x, y] in pixels per face, instead of the detector's
        callback: Callable | None = None,  # callback() after every step of the refinement
    ) -> None:
        """Find the faces of a photo and invert them. Raises PhotoError when there is none, or none large enough."""
        alignments = self._align(photo, landmarks, faces)
        crops = [crop_aligned(photo, alignment) for alignment in alignments]
        self.photo, self.faces = photo, list(map(Face, alignments, crops, map(self._encode, crops)))
        if steps:
            self.refine(steps, callback=callback)

    def set_drawn(self, seed: int) -> None:
        """The generator's own face of a seed, whose w is exact: generate.py --truncation 0.7 --noise const, with 1,000
        samples for the mean of w unless the generator's file has it."""
        generator, mean = self.models.generator, mean_w(self.models.generator)
        (w,) = map_latents(generator, seeded_z(generator, [seed]), truncation=TRUNCATION, mean=mean)
        inversion = face_in(generator, w)
        (image,) = render(generator, [w], noise=inversion.noise)
        photo, end = Image.fromarray(image).resize((CROP, CROP), Image.Resampling.BICUBIC), CROP - 0.5
        quad = [[-0.5, -0.5], [-0.5, end], [end, end], [end, -0.5]]
        alignment = Alignment(quad, [CROP, CROP], CROP, landmarks=[], whole=True, name=f"seed{seed:04d}")
        self.photo, self.faces = photo, [Face(alignment, photo, inversion, exact=True)]

    def refine(self, steps: int, *, callback: Callable | None = None) -> float:
        """Tune the generator of each face for `steps` more steps. Returns the loss, a mean over the faces."""
        losses = []
        for face, image in zip(self.faces, self._images(self.models.generator), strict=True):
            if not face.exact:
                face.inversion, loss = self._tune(face.inversion, image, steps, callback)
                face.conditional, face.curves, face.steps = None, {}, face.steps + steps
                losses.append(loss)
        return float(np.mean(losses or 0.0))

    def set_layers(self, layers: range | None) -> None:
        """Layers that edits move from now on."""
        if layers != self.layers:
            self.layers = layers
            for face in self.faces:
                face.curves.clear()

    def invert_conditional(self, steps: int) -> None:
        """Invert the faces in the conditional generator; what is there stays. One that was trained from the other by
        --light draws the same at the neutral condition, with the same tuned weights."""
        conditional = self.models.conditional
        images = self._images(conditional.generator)
        for face, image in zip(self.faces, images, strict=True):
            if face.conditional is None and conditional.light:
                neutral = torch.full((len(conditional.reader.names),), 0.5)
                generator = tuned_generator(conditional.generator, tunable(face.inversion.generator))
                face.conditional = face_in(generator, face.inversion.w, neutral)
            elif face.conditional is None:
                (condition,) = conditional.reader.read(image[None])
                start = face_in(conditional.generator, mean_w(conditional.generator)[0], condition)
                face.conditional, _ = self._tune(start, image, steps)

    def edit(
        self,
        targets: Mapping[str, Target],  # attribute -> goal, read in the photo
        *,
        strength: float = 1.0,  # factor on all positions
        rounds: int = ROUNDS,  # corrections until the photo shows the goals
    ) -> Edited:
        """Move attributes of all faces, put back into the photo. Raises PhotoError without a photo or the attribute."""
        if self.photo is None:
            raise PhotoError("first choose a photo")
        for name in set(targets) - set(self.models.attributes):
            known = ", ".join(self.models.attributes)
            raise PhotoError(f"{name} cannot be edited: there is no boundary of it for this generator, only {known}")
        photo, results = self.photo, []
        for face in self.faces:
            before = self._before(face, targets)
            positions, changes = self._search(face, before, targets, strength, rounds)
            photo = paste_edit(photo, changes, face.alignment, face.crop if photo is self.photo else None)
            crop = crop_aligned(photo, face.alignment)
            readings = self._readings(face, before, targets, changes, crop)
            results.append(FaceEdit(face, positions, readings, crop, changes))
        return Edited(photo, results)

    def read(self, images) -> np.ndarray:
        """Scores [K, A] of aligned faces, PIL images or uint8 arrays of any size, read at the generator's size."""
        size = self.models.size
        return score_frames(self.models.scorer, [np.asarray(fit_image(to_pil(image), size)) for image in images])

    def read_faces(self, names) -> dict[str, float]:
        """Attributes of the first face, in the photo as it is."""
        return self._before(self.faces[0], names)

    def _align(self, photo: Image.Image, landmarks, faces: str) -> list[Alignment]:
        if landmarks is not None:
            found = [(np.asarray(points), {}) for points in np.asarray(landmarks, float).reshape(-1, 5, 2)]
        else:
            seen = FaceDetector(self.models.weights_dir).detect(photo, many=faces == "all")
            found = [(one.landmarks, {"score": round(one.score, 4)}) for one in seen]
        if not found:
            raise PhotoError("no face was found: take a photo with a larger face, seen from the front")
        found = found if faces == "all" else found[:1]
        alignments = [align(photo, points, size=CROP, **info) for points, info in found]
        size, side = self.models.size, max(alignment.side for alignment in alignments)
        if side < size:
            raise SmallFaceError(side, size)
        large = [alignment for alignment in alignments if alignment.side >= size]
        self.left_out = len(alignments) - len(large)
        return large

    def _images(self, generator) -> torch.Tensor:
        """The aligned faces, [N, 3, S, S] in [-1, 1]."""
        images = [to_tensor(fit_image(face.crop, generator.config.size)) for face in self.faces]
        return torch.stack(images).to(generator.token)

    @torch.no_grad()
    def _encode(self, crop: Image.Image) -> InvertedFace:
        models, net = self.models, self.models.encoder
        if net is None:
            return face_in(models.generator, mean_w(models.generator)[0])
        image = to_tensor(fit_image(crop, max(net.config.input_size, net.image_size)))[None].to(models.generator.token)
        (w,) = net.encode(net.fit(image))  # [1, L, D]
        return face_in(models.generator, w.float())

    def _tune(self, inversion: InvertedFace, image, steps, callback=None) -> tuple[InvertedFace, float]:
        """The inversion with a generator that was tuned to the image [3, S, S], and the loss."""
        condition = None if inversion.condition is None else inversion.condition[None].to(image)
        w, how = torch.from_numpy(inversion.w), {"steps": steps, "condition": condition, "callback": callback}
        tuned, loss = tune(inversion.generator, image[None], w, perceptual=self.models.perceptual, **how)
        if not np.isfinite(loss):
            raise PhotoError("the refinement diverged: do without it (--quality fast, or 0 steps on the page)")
        return replace(inversion, generator=tuned), loss

    def _draw(self, face: Face, at: list[dict[str, float]]) -> list[list[Change]]:
        """Per position the changes of the face, one of each group."""
        models, drawn = self.models, []
        for names in self._groups({name for position in at for name in position}):
            boundaries = [boundary for name, boundary in models.boundaries.items() if name in names]
            if boundaries or not names:
                steps = [[position.get(b.attribute, 0.0) * (b.std or 1.0) for b in boundaries] for position in at]
                source = face.inversion
                images = edit_face(source.generator, source, boundaries, np.array(steps), layers=self.layers)
            else:
                source, order = face.conditional, models.conditional.reader.names
                change = [[position.get(n, 0.0) * (n in names) for n in order] for position in [{}, *at]]
                change = torch.tensor(change, dtype=torch.float32)  # [1 + K, d]
                if self.layers is not None:  # [1 + K, L, d]
                    change = change[:, None] * torch.tensor([k in self.layers for k in range(len(source.w))])[:, None]
                images = render_path(source.generator, source, source.condition.cpu() + change)
            drawn.append(changes_of(images, names))
        return list(map(list, zip(*drawn, strict=True)))

    def _groups(self, names) -> list[set[str]]:
        """Attributes that one change shows: those of boundaries, then those of the condition by part, glasses last."""
        groups: dict[str, set[str]] = {}
        for name in sorted(names, key=lambda name: (PART.get(name) == "glasses", name)):
            group = "" if name in self.models.boundaries else PART.get(name, "head")
            groups.setdefault(group, set()).add(name)
        return [group for _, group in sorted(groups.items(), key=lambda item: item[0] != "")] or [set()]

    def _curve(self, face: Face, name: str, down: bool) -> tuple[np.ndarray, np.ndarray]:
        """Positions from 0 to an end of an attribute's range, as far as the photo shows the same person; what is read
        there in the edited photo."""
        if (name, down) not in face.curves:
            crop, end = fit_image(face.crop, READ), self.models.safe_range(name)[0 if down else 1]
            if name in self.models.boundaries and not face.exact:
                end *= REACH.get(name, 1.0)
            at = end * np.linspace(0, 1, TRIES) ** 1.5  # closer together near 0, where most edits end
            crops = [to_bytes(edit_crop(crop, changes)[0]) for changes in self._draw(face, [{name: p} for p in at])]
            values = self.read(crops)[:, self.models.scorer.column(name)]
            if name not in PART:  # what changes a part alone leaves the person
                images = torch.stack([to_tensor(to_pil(crop)) for crop in crops]).to(self.models.generator.token)
                at, values = cut_curve(at, values, self.models.identity.similarity(images, images[:1]).cpu().numpy())
            face.curves[name, down] = at, values
        return face.curves[name, down]

    def _before(self, face: Face, names) -> dict[str, float]:
        """Attributes of a face in the photo as it is."""
        (scores,) = self.read([face.crop])
        return {name: float(scores[self.models.scorer.column(name)]) for name in names}

    def _search(self, face: Face, before, targets, strength, rounds) -> tuple[dict[str, float], list[Change]]:
        """Positions at which the photo shows the targets, and the changes there: from each one's curve, then corrected
        together; 0 for an age of which it would show nothing."""
        if any(name not in self.models.boundaries for name in targets):
            self.invert_conditional(max(face.steps, 50))
        kinds = {name: self._kind(name) for name in targets}
        goals = {name: target.goal(before[name], kinds[name]) for name, target in targets.items()}
        errors = {n: open_error(goals[n] - before[n], goals[n], kinds[n]) for n in targets}
        aims, best = {n: goals[n] if errors[n] else before[n] for n in targets}, (np.inf, {}, {}, [])
        shares, last = dict.fromkeys(targets, 1.0), dict.fromkeys(targets, 0.0)  # of an error that is corrected
        for _ in range(max(1, rounds)):
            curves = {n: self._curve(face, n, aims[n] < before[n]) for n in targets if aims[n] != before[n]}
            at = {n: strength * position_for(*curve, aims[n], NEAR[kinds[n]]) for n, curve in curves.items()}
            for on_top in (False, True):  # within the range, all together; glasses, on top of the face, by themselves
                group = [name for name in at if (PART.get(name) == "glasses") == on_top]
                away = float(np.linalg.norm([at[name] / (curves[name][0][-1] or 1.0) for name in group]))
                at |= {name: at[name] / max(1.0, away) for name in group}
            at = dict.fromkeys(targets, 0.0) | at
            (changes,) = self._draw(face, [at])
            if not targets or rounds == 0 or strength != 1:
                return at, changes
            scores = self._read_edited(face, targets, changes, to_bytes(edit_crop(face.crop, changes)[0]))
            errors = {n: open_error(goals[n] - scores[n], goals[n], kinds[n]) for n in targets}
            total = sum(abs(error) / NEAR[kinds[name]] for name, error in errors.items())
            best = min(best, (total, at, scores, changes), key=lambda item: item[0])
            if all(abs(error) <= NEAR[kinds[name]] / 2 for name, error in errors.items()):
                break
            shares = {name: share / 2 if errors[name] * last[name] < 0 else share for name, share in shares.items()}
            aims, last = {name: aims[name] + shares[name] * errors[name] for name in targets}, errors
        _, at, scores, changes = best
        # Years that the photo does not show only harm it; of a probability one may see more than is read.
        hidden = {n for n in at if kinds[n] == "years" and not shows(before[n], goals[n], scores[n], kinds[n])}
        if hidden:
            at = {name: 0.0 if name in hidden else position for name, position in at.items()}
            (changes,) = self._draw(face, [at])
        return at, changes

    def _kind(self, name: str) -> str:
        return self.models.scorer.attributes[self.models.scorer.column(name)].kind

    def _read_edited(self, face: Face, names, changes: list[Change], crop) -> dict[str, float]:
        """Attributes of a face in `crop`, which shows its changes. Glasses hide what age is read by: all but glasses is
        read without that change."""
        bare = [change for change in changes if change.parts != ("glasses",)]
        hidden = len(bare) < len(changes) and any(PART.get(name) != "glasses" for name in names)
        crops = [crop, to_bytes(edit_crop(face.crop, bare)[0])] if hidden else [crop]
        scores, column = self.read(crops), self.models.scorer.column
        return {name: float(scores[0 if PART.get(name) == "glasses" else -1, column(name)]) for name in names}

    def _readings(self, face: Face, before, targets, changes, crop) -> dict[str, Reading]:
        drawn, photo = self.read([change.edited for change in changes]), self._read_edited(face, targets, changes, crop)
        drawn_by = {name: scores for group, scores in zip(self._groups(targets), drawn, strict=True) for name in group}
        readings = {}
        for name, target in targets.items():
            kind, value = self._kind(name), float(drawn_by[name][self.models.scorer.column(name)])
            readings[name] = Reading(before[name], target.goal(before[name], kind), value, photo[name], kind)
        return readings


def face_in(generator: Generator, w: np.ndarray | torch.Tensor, condition=None) -> InvertedFace:
    """The face that a generator draws of w [L, D] with its own noise maps. condition: attributes [d] in [0, 1], of a
    conditional one."""
    noise = [layer.cpu() for layer in generator.fixed_noise()]
    return InvertedFace("", w if isinstance(w, np.ndarray) else w.cpu().numpy(), noise, condition, generator=generator)


def changes_of(images, attributes) -> list[Change]:
    """Changes from the first of a generator's images to each of the others, by edits of these attributes."""
    unedited, *edited = images
    parts = tuple(sorted({PART.get(name, "head") for name in attributes})) or ("head",)
    return [Change(unedited, image, parts) for image in edited]


def expression_of(photo, models: Models) -> dict[str, Target]:
    """The expression of the largest face in the file `photo`, as targets. Raises PhotoError when no model edits one."""
    names = [name for name in EXPRESSION if name in models.attributes]
    if not names:
        raise PhotoError(f"no expression can be taken over: none of {', '.join(EXPRESSION)} can be edited")
    editor, photo = PhotoEditor(models), read_image(photo)
    (alignment,) = editor._align(photo, None, "largest")
    (scores,) = editor.read([crop_aligned(photo, alignment)])
    return {name: Target(float(scores[models.scorer.column(name)])) for name in names}


def shrink(photo: Image.Image, longest: int) -> Image.Image:
    """A copy of at most `longest` pixels on the longer side."""
    small = photo.copy()
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS, reducing_gap=1.5)
    return small


def scale_alignment(alignment: Alignment, photo_size) -> Alignment:
    """The alignment in the same photo at another size (width, height)."""
    scales = np.divide(photo_size, alignment.photo_size)
    quad = (np.array(alignment.quad) + 0.5) * scales - 0.5
    return replace(alignment, quad=quad.tolist(), photo_size=list(photo_size))
