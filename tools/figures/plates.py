"""The figures of inversion, edits, spaces, attention and mixing: each takes a Lab and gives a picture; or a sentence,
where what it needs is not there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from common.grids import similarity_figure
from demo_app.session import Tools, draw_face
from editing.boundary import Boundary
from editing.edit import edit_codes, render_codes
from editing.fit import fit_boundary
from editing.samples import Samples, score_samples
from inversion.sheets import DIFFERENCE_GAIN, difference_map
from perceptual.image_metrics import measure
from sampling.render import mix, render, seeded_z, select_noise
from tools.figures.lab import Inversion, Lab
from tools.figures.sheet import distance_titles, draw_sheet, readings

STRIP, FEW = (-4.5, -3, -1.5, 0, 1.5, 3, 4.5), (-4, -2, 0, 2, 4)  # distances, standard deviations of the samples
TWIN_SAMPLES = 2000  # on which a boundary of the W generator is fitted when there is none
MIXED = range(4), range(4, 10)  # seeds of the rows and the columns


def inversion_plate(lab: Lab) -> Image.Image:
    """Reconstructions and, below each, |difference|: the paper's inversion.png."""
    titles = {"W": "W", "W+": "W+"} if lab.twin else {}
    titles |= {"W++": "W++"} | ({"encoder": "encoder", "refined": "encoder, then steps"} if lab.tools.encoder else {})
    found = {}
    for method in titles:
        pictures = lab.inversion(method).pictures
        found[method] = pictures, measure(lab.images(), lab.images(pictures), perceptual=lab.perceptual)
    rows, labels = [], []
    for i, (name, original) in enumerate(zip(lab.names, lab.pictures, strict=True)):
        rows.append([(original, "")])
        rows[-1] += [
            (pictures[i], f"{values['perceptual'][i]:.3f} / {values['mse'][i]:.3f}")
            for pictures, values in found.values()
        ]
        rows.append([(None, ""), *((difference_map(original, pictures[i]), "") for pictures, _ in found.values())])
        labels += [name, f"|difference| x {DIFFERENCE_GAIN}"]
    note = f"{lab.steps} steps; below each: {lab.perceptual.name} / mean squared error on [-1, 1]"
    return draw_sheet(rows, columns=["original", *titles.values()], labels=labels, note=note)


def strip_plate(attribute: str) -> Callable[[Lab], Image.Image | str]:
    """The figure of faces along the boundary of an attribute: the paper's aging and transitioning figures."""

    def plate(lab: Lab):
        if attribute not in lab.tools.boundaries:
            return f"no boundary of {attribute} for {lab.tools.ckpt.name}"
        boundary = lab.tools.boundaries[attribute][1]
        rows = edited_rows(lab, lab.tools.generator, boundary, lab.inversion("refined"), STRIP, range(len(lab.names)))
        note = f"{attribute}, standard deviations from the inversion; below each: what the scorer reads"
        return draw_sheet(rows, columns=distance_titles(STRIP), labels=lab.names, note=note)

    return plate


def edited_rows(
    lab: Lab, generator, boundary: Boundary, inverted: Inversion, distances: Sequence[float], faces: Sequence[int]
) -> list[list]:
    """Per face (a position) the original and its frames at these distances, with what the scorer reads."""
    rows = []
    for i in faces:
        codes = edit_codes(inverted.codes[i], [boundary], np.array(distances) * boundary.std)
        frames = [lab.pictures[i], *render_codes(generator, codes, select_noise(inverted.noise, [i]))]
        rows.append(list(zip(frames, readings(lab.scorer, boundary.attribute, frames), strict=True)))
    return rows


def spaces_plate(lab: Lab) -> Image.Image | str:
    """The same edit in W, W+ and W++, each face optimised from the mean code."""
    if lab.twin is None:
        return "no W generator: name one with --w_ckpt"
    if "age" not in lab.tools.boundaries:
        return f"no boundary of age for {lab.tools.ckpt.name}"
    spaces = {"W": lab.twin, "W+": lab.twin, "W++": lab.tools}
    faces = (0, 1, len(lab.names) - 1)  # the astronaut, one drawn in W++, the one drawn in W
    parts = [
        edited_rows(lab, tools.generator, age_boundary(lab, tools), lab.inversion(space), FEW, faces)
        for space, tools in spaces.items()
    ]
    rows = [line for lines in zip(*parts, strict=True) for line in lines]
    labels = [f"{lab.names[i]}: {space}" for i in faces for space in spaces]
    note = "age, standard deviations from the inversion; below each: what the scorer reads"
    return draw_sheet(rows, columns=distance_titles(FEW), labels=labels, note=note)


def age_boundary(lab: Lab, tools: Tools) -> Boundary:
    """The one that was found with the generator; else one fitted now, which is kept."""
    if "age" not in tools.boundaries:
        generator, seeds = tools.generator, range(TWIN_SAMPLES)
        with tempfile.TemporaryDirectory() as folder:
            samples = Samples(generator, seeds, noise="none")
            scores = score_samples(samples, lab.scorer, folder=folder)
        column = scores[:, lab.scorer.column("age")]
        tools.boundaries["age"] = (
            tools.ckpt,
            fit_boundary(
                samples, column, space=generator.config.space, attribute="age", fingerprint=generator.fingerprint
            ),
        )
    return tools.boundaries["age"][1]


@torch.no_grad()
def attention_plate(lab: Lab) -> Image.Image | str:
    """Attention between tokens, as train.py writes it into similarity/."""
    if not lab.tools.generator.config.has_attention:
        return "the generator's mapping network has no attention"
    z = torch.stack(list(seeded_z(lab.tools.generator, range(64)))).to(lab.tools.mean)
    return similarity_figure(lab.tools.generator.get_similarity(z).cpu())


def mixing_plate(lab: Lab) -> Image.Image:
    """Coarse layers of the faces above in the faces on the left (arXiv 1812.04948, figure 3)."""
    rows, columns = MIXED
    n_layers = lab.tools.n_layers
    coarse = range(n_layers // 2)
    upper, left = ([draw_face(lab.tools, seed) for seed in seeds] for seeds in (columns, rows))
    lines = [[(None, ""), *((np.asarray(face.photo), "") for face in upper)]]
    for face in left:
        codes = [torch.from_numpy(each.code) for each in (face, *upper)]
        codes = [codes[0], *(mix(codes[0], code, coarse) for code in codes[1:])]
        lines.append([(picture, "") for picture in render(lab.tools.generator, codes, noise=face.noise)])
    note = f"faces on the left with layers 0 to {len(coarse) - 1}, of 0 to {n_layers - 1}, of the faces above"
    return draw_sheet(
        lines,
        columns=["", *(f"seed {seed}" for seed in columns)],
        labels=["", *(f"seed {seed}" for seed in rows)],
        note=note,
    )
