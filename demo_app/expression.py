"""The expression of a reference face on the face of the demo page, by a conditional generator: edit_conditional.py.

conditional = load_conditional("face-cgan-64.safetensors", "cpu")
work = ConditionalInversion(conditional, tools.perceptual, face, steps=150)      # in the background, once per face
cast = cast_expression(conditional, face, work.result, reference)                # at once, for any reference
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from common.images import fit_image, to_tensor
from demo_app.refinement import Background, refine_settings, target_picture
from demo_app.session import MEAN_SAMPLES, Face, SessionError, Tools, View
from editing.attributes import AttributeReader, Condition, load_reader, read_condition
from editing.edit import InvertedFace
from editing.evaluate import score_frames
from editing.transfer import Target, condition_path, render_path
from inversion.inputs import pixel_seed
from inversion.projector import project
from model import load_generator


@dataclass(frozen=True)
class Conditional:
    """A conditional generator: tools hold it and the statistics of its codes; the reader is that of its training."""

    tools: Tools
    known: Condition
    reader: AttributeReader


@dataclass(frozen=True)
class Cast:
    """A face with the attributes of a reference. asked: [d] in [0, 1]; condition: [d], what the generator was given;
    view: the inversion under the face's own attributes, and the edit; steps: of the projector."""

    face: Face
    reference: Face
    inverted: InvertedFace
    asked: torch.Tensor
    condition: torch.Tensor
    view: View
    steps: int


def load_conditional(path, device="cpu", weights_dir=None) -> Conditional:
    """Raises FileNotFoundError, or a ValueError for an unconditional generator or another scorer than its own."""
    known = read_condition(path)
    generator = load_generator(path, device).requires_grad_(False)
    reader = load_reader(path, known, device, weights_dir=weights_dir)
    tools = Tools(generator, Path(path), *generator.latent_statistics(MEAN_SAMPLES))
    return Conditional(tools, known, reader)


class ConditionalInversion(Background):
    """Finds a face's code and noise in the conditional generator, its own attributes held fixed. result: InvertedFace.

    Raises SessionError when it cannot be.
    """

    def __init__(self, conditional: Conditional, perceptual, face: Face, steps: int):
        if perceptual is None:
            raise SessionError("casting an expression needs a perceptual network, and no weights for one were found")
        self.conditional, self.perceptual, self.face = conditional, perceptual, face
        super().__init__(refine_settings(conditional.tools, steps))

    def _project(self) -> InvertedFace:
        tools, face = self.conditional.tools, self.face
        picture = target_picture(face, tools.size)
        image = picture.float() / 127.5 - 1
        own = self.conditional.reader.read(image[None].to(tools.mean))
        found = project(
            tools.generator,
            image[None],
            perceptual=self.perceptual,
            statistics=(tools.mean, tools.std),
            seeds=[pixel_seed(picture, 0)],
            condition=own,
            callback=self._watch,
            **self.settings,
        )
        if not torch.isfinite(found.latents).all():
            raise ValueError("the optimisation diverged")
        return InvertedFace(face.name, found.latents[0], found.noise, own[0], own[0])


def cast_expression(conditional: Conditional, face: Face, inverted: InvertedFace, reference: Face, steps: int) -> Cast:
    """The attributes that are read in the reference, asked of the face's code. steps: those that the code took."""
    tools = conditional.tools
    image = to_tensor(fit_image(reference.crop, tools.size))[None].to(tools.mean)
    asked = conditional.reader.read(image)[0]
    conditions = condition_path(inverted, Target("", reference.source, dict(enumerate(asked.tolist()))), [0.0, 1.0])
    inversion, edited = render_path(tools.generator, inverted, conditions)
    view = View(inverted.w.numpy(), inversion, edited)
    return Cast(face, reference, inverted, asked, conditions[-1], view, steps)


def compare(conditional: Conditional, cast: Cast) -> str:
    """'smile 0.98 asked, 0.91 read; ...' of the attributes that were cast."""
    reader = conditional.reader
    read = reader.to_unit(torch.from_numpy(score_frames(reader.scorer, [cast.view.edited])))[0]
    return "; ".join(
        f"{name.replace('_', ' ')} {wanted:.2f} asked, {found:.2f} read"
        for name, wanted, found in zip(reader.names, cast.asked, read, strict=True)
    )
