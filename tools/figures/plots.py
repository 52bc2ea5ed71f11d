"""The figures: each takes Models and returns an image, or a sentence where a model is absent."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from common.grids import DIFFERENCE_GAIN, difference_map, similarity_figure
from editing.boundary import Boundary
from editing.edit import edit_codes, render_codes
from editing.evaluate import score_frames
from editing.fit import fit_boundary
from editing.samples import Samples, score_samples
from model import Generator
from perceptual.image_metrics import measure
from sampling.render import mix, noise_maps, render, seeded_z, select_noise
from tools.figures.grid import distance_titles, draw_grid, score_captions
from tools.figures.models import (
    Inversion,
    Models,
    draw_faces,
    draw_latents,
    find_boundary,
    inversion_of,
    read_attributes,
    to_batch,
)

DISTANCES, FEW = (-4.5, -3, -1.5, 0, 1.5, 3, 4.5), (-4, -2, 0, 2, 4)  # standard deviations of the samples
W_SAMPLES = 2000  # on which a boundary of the W generator is fitted when there is none
MIXED = range(4), range(4, 10)  # seeds of the rows and the columns
CANDIDATES = 60  # drawn faces among which references are found: those that smile most and least
NO_CGAN = "no conditional generator: name one with --cgan"


def inversion_figure(models: Models) -> Image.Image:
    """Reconstructions and, below each, |difference|: the paper's inversion.png."""
    titles = {"W": "W", "W+": "W+"} if models.w else {}
    titles |= {"W++": "W++"} | ({"encoder": "encoder", "refined": "encoder, then steps"} if models.encoder else {})
    results = [inversion_of(models, method).images for method in titles]
    originals = to_batch(models.faces, models.wpp)
    values = [measure(originals, to_batch(images, models.wpp), perceptual=models.perceptual) for images in results]
    rows, labels = [], []
    for i, (name, original) in enumerate(zip(models.names, models.faces, strict=True)):
        captions = [f"{value['perceptual'][i]:.3f} / {value['mse'][i]:.3f}" for value in values]
        rows.append([(original, ""), *((images[i], text) for images, text in zip(results, captions, strict=True))])
        rows.append([(None, ""), *((difference_map(original, images[i]), "") for images in results)])
        labels += [name, f"|difference| x {DIFFERENCE_GAIN}"]
    note = f"{models.steps} steps; below each: {models.perceptual.name} / mean squared error on [-1, 1]"
    return draw_grid(rows, columns=["original", *titles.values()], labels=labels, note=note)


def boundary_figure(models: Models, attribute: str) -> Image.Image | str:
    """Faces along the boundary of an attribute: the paper's aging and transitioning figures."""
    boundary = find_boundary(models.boundaries, models.wpp, attribute)
    if boundary is None:
        return f"no boundary of {attribute} for this generator"
    inverted = inversion_of(models, "refined")
    rows = edited_rows(models, models.wpp, boundary, inverted, DISTANCES, range(len(models.faces)))
    note = f"{attribute}, standard deviations from the inversion; below each: the score"
    return draw_grid(rows, columns=distance_titles(DISTANCES), labels=models.names, note=note)


def edited_rows(
    models: Models,
    generator: Generator,
    boundary: Boundary,
    inverted: Inversion,
    distances: Sequence[float],
    faces: Sequence[int],
) -> list[list]:
    """Cells of each face (a position): the original and its frames at these distances, with their scores."""
    rows = []
    for i in faces:
        ws = edit_codes(inverted.ws[i], [boundary], np.array(distances) * boundary.std)
        frames = [models.faces[i], *render_codes(generator, ws, select_noise(inverted.noise, [i]))]
        rows.append(list(zip(frames, score_captions(models.scorer, boundary.attribute, frames), strict=True)))
    return rows


def spaces_figure(models: Models) -> Image.Image | str:
    """One edit in W, W+ and W++, each face optimised from the mean of w."""
    if models.w is None:
        return "no W generator: name one with --w_ckpt"
    boundary = find_boundary(models.boundaries, models.wpp, "age")
    if boundary is None:
        return "no boundary of age for this generator"
    w_boundary = find_boundary(models.boundaries, models.w, "age") or fit_age(models.w, models.scorer)
    spaces = {"W": (models.w, w_boundary), "W+": (models.w, w_boundary), "W++": (models.wpp, boundary)}
    faces = (0, 1, len(models.faces) - 1)  # the astronaut, one drawn in W++, the one drawn in W
    parts = [edited_rows(models, *spaces[space], inversion_of(models, space), FEW, faces) for space in spaces]
    rows = [row for of_one_face in zip(*parts, strict=True) for row in of_one_face]
    labels = [f"{models.names[i]}: {space}" for i in faces for space in spaces]
    note = "age, standard deviations from the inversion; below each: the score"
    return draw_grid(rows, columns=distance_titles(FEW), labels=labels, note=note)


def fit_age(generator: Generator, scorer) -> Boundary:
    samples = Samples(generator, range(W_SAMPLES), noise="none")
    with tempfile.TemporaryDirectory() as folder:
        scores = score_samples(samples, scorer, folder=folder)[:, scorer.column("age")]
    info = {"space": generator.config.space, "attribute": "age", "fingerprint": generator.fingerprint}
    return fit_boundary(samples, scores, **info)


@torch.no_grad()
def attention_figure(models: Models) -> Image.Image | str:
    """Attention between tokens, as train.py writes it into similarity/."""
    if not models.wpp.config.has_attention:
        return "the generator's mapping network has no attention"
    z = torch.stack(list(seeded_z(models.wpp, range(64)))).to(models.wpp.token)
    return similarity_figure(models.wpp.get_similarity(z))


def mixing_figure(models: Models) -> Image.Image:
    """Coarse layers of the faces above in the faces on the left (arXiv 1812.04948, figure 3)."""
    rows, columns = MIXED
    generator, n_layers = models.wpp, models.wpp.config.n_tokens
    coarse = range(n_layers // 2)
    upper = draw_latents(generator, columns)
    cells = [[(None, ""), *((image, "") for image in draw_faces(generator, columns))]]
    for left in draw_latents(generator, rows):
        ws = [left, *(mix(left, w, coarse) for w in upper)]
        cells.append([(image, "") for image in render(generator, ws, noise=noise_maps(generator, "none"))])
    note = f"faces on the left with layers 0 to {len(coarse) - 1}, of 0 to {n_layers - 1}, of the faces above"
    titles, labels = (["", *(f"seed {seed}" for seed in seeds)] for seeds in (columns, rows))
    return draw_grid(cells, columns=titles, labels=labels, note=note)


# -- the conditional generator -------------------------------------------------------------------------------------


def expressions_figure(models: Models) -> Image.Image | str:
    """Every attribute set to 0 and to 1, the others left as they are."""
    if models.cgan is None:
        return NO_CGAN
    reader, inverted, source = models.reader, inversion_of(models, "conditional"), read_attributes(models, models.faces)
    targets = [(k, value) for k in range(len(reader.names)) for value in (0, 1)]
    rows = []
    for i, (original, image) in enumerate(zip(models.faces, inverted.images, strict=True)):
        conditions = source[i].repeat(len(targets), 1)  # [K, d]
        for row, (k, value) in enumerate(targets):
            conditions[row, k] = value
        cells = [(original, ""), (image, "")]
        for (k, _), frame in zip(targets, conditional_frames(models, i, conditions), strict=True):
            before, after = score_captions(reader.scorer, reader.names[k], [image, frame])
            cells.append((frame, f"{before} to {after}"))
        rows.append(cells)
    columns = ["original", "inversion", *(f"{reader.names[k]} {value}".replace("_", " ") for k, value in targets)]
    note = "targets of the conditional generator; below each: the score, inversion to edit"
    return draw_grid(rows, columns=columns, labels=models.names, note=note)


def transfer_figure(models: Models) -> Image.Image | str:
    """The expressions of references on the faces: the paper's cGAN figures."""
    if models.cgan is None:
        return NO_CGAN
    reader = models.reader
    if "smile" not in reader.names:
        return "the conditional generator knows no smile"
    drawn = draw_faces(models.wpp, range(CANDIDATES))
    order = np.argsort(score_frames(reader.scorer, drawn)[:, reader.scorer.column("smile")], kind="stable")
    seeds = [int(seed) for seed in (order[-1], order[-2], order[0], order[1])]  # most and least
    references = [drawn[seed] for seed in seeds]
    conditions = read_attributes(models, references)
    rows = [[(None, ""), (None, ""), *zip(references, score_captions(reader.scorer, "smile", references), strict=True)]]
    for i, (original, image) in enumerate(zip(models.faces, inversion_of(models, "conditional").images, strict=True)):
        frames = [original, image, *conditional_frames(models, i, conditions)]
        rows.append(list(zip(frames, score_captions(reader.scorer, "smile", frames), strict=True)))
    names = ", ".join(name.replace("_", " ") for name in reader.names)
    return draw_grid(
        rows,
        columns=["original", "inversion", *(f"as seed {seed}" for seed in seeds)],
        labels=["references", *models.names],
        note=f"{names} of the reference; below each: the score of smile",
    )


def conditional_frames(models: Models, i: int, conditions: torch.Tensor) -> list[np.ndarray]:
    """Face i under attributes [K, d]."""
    inverted = inversion_of(models, "conditional")
    ws = inverted.ws[i].expand(len(conditions), -1, -1)
    return list(render(models.cgan, ws, noise=select_noise(inverted.noise, [i]), condition=conditions))
