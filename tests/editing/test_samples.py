"""Samples are their seeds, their scores are kept, and edits go as far as they still are faces."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from colour_edits import ColourScorer, PixelIdentity

import editing.samples
from common.cli import UserError
from common.distributed import Distributed
from editing.fit import fit_boundary
from editing.realism import LIMIT, Realism, edit_range
from editing.samples import Samples, score_samples
from sampling.render import map_latents, seeded_z


def test_ws_by_row_are_those_of_the_seeds(generator):
    ws = Samples(generator, range(5, 25))
    whole = ws[np.arange(20)]
    assert whole.shape == ws.shape == (20, 32 * (1 if generator.config.w_space else 6))
    assert np.allclose(ws[np.array([7, 3])], whole[[7, 3]], atol=1e-5)
    (expected,) = map_latents(generator, seeded_z(generator, [5 + 7]))
    assert np.allclose(whole[7], expected.numpy().reshape(-1)[: ws.shape[1]], atol=1e-5)


def test_scores_do_not_depend_on_batch_ranks_or_a_restart(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(editing.samples, "CHUNK", 10)
    scorer = ColourScorer()
    samples = Samples(generator, range(35))
    whole = score_samples(samples, scorer, folder=tmp_path / "whole", batch=25)
    assert whole.shape == (35, 2) and len(np.unique(whole, axis=0)) == 35
    device = generator.token.device
    folder = tmp_path / "ranks"
    (folder).mkdir()
    with pytest.raises(FileNotFoundError):  # alone, rank 1 of 2 finds the other half missing
        score_samples(samples, scorer, folder=folder, batch=4, dist=Distributed(1, 2, device))
    assert sorted(path.name for path in folder.glob("*.npy")) == ["scores-00000020.npy", "scores-00000030.npy"]
    computed = []
    original = editing.samples._score
    monkeypatch.setattr(editing.samples, "_score", lambda *args: computed.append(args[0].seeds[0]) or original(*args))
    assert np.allclose(score_samples(samples, scorer, folder=folder, batch=1), whole, atol=1e-3)
    assert computed == [0, 10], "the chunks that were there are kept"
    more = score_samples(Samples(generator, range(50)), scorer, folder=folder)
    assert more.shape == (50, 2) and np.allclose(more[:35], whole, atol=1e-3)
    assert computed == [0, 10, 40]
    late = tmp_path / "late"  # rank 1 looks when rank 0 has begun: it goes by the list that rank 0 made before
    late.mkdir()
    (late / "scores-00000020.npy").write_bytes((folder / "scores-00000020.npy").read_bytes())
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr(editing.samples, "broadcast_object", lambda missing: [0, 10, 20, 30])
        score_samples(samples, scorer, folder=late, dist=Distributed(1, 2, device))
    assert computed == [0, 10, 40, 20, 30]
    for other, message in (
        (Samples(generator, range(3, 38)), "holds scores made with other settings [(]first 0, now 3[)]"),
        (Samples(generator, range(35), truncation=0.8), "[(]truncation 1.0, now 0.8[)]"),
        (Samples(generator, range(35), noise="none"), "[(]noise random, now none[)]"),
    ):
        with pytest.raises(UserError, match=message):
            score_samples(other, scorer, folder=folder)
    (folder / "scores-00000010.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="scores-00000010.npy is truncated"):
        score_samples(samples, scorer, folder=folder)


def test_truncated_samples_lie_nearer_to_the_mean(generator):
    rows, mean = np.arange(20), generator.mean_latent()[0].flatten().numpy()
    whole, near = (Samples(generator, range(20), truncation=psi)[rows] for psi in (1.0, 0.5))
    assert np.allclose(near, mean[: near.shape[1]] + 0.5 * (whole - mean[: near.shape[1]]), atol=1e-5)


def test_realism_tells_what_lies_among_the_references():
    draw = torch.Generator().manual_seed(0)
    realism = Realism(torch.randn(400, 3, generator=draw))
    inside, outside = torch.randn(400, 3, generator=draw), torch.randn(400, 3, generator=draw) + 6
    assert realism.are_faces(inside).float().mean() > 0.85 and realism.are_faces(outside).float().mean() < 0.05
    assert realism(torch.zeros(1, 3)) > 1 > realism(torch.full((1, 3), 9.0))


def test_the_range_ends_where_samples_are_no_faces_any_more(generator, monkeypatch):
    samples = Samples(generator, range(200), noise="none")
    scores = samples[np.arange(200)] @ np.random.default_rng(0).standard_normal(samples.shape[1])
    boundary = fit_boundary(samples, scores, ratio=0.1, space=generator.config.space)
    low, high = edit_range(samples, boundary, PixelIdentity())
    assert -LIMIT <= low <= 0 <= high <= LIMIT and low < high
    wild = replace(boundary, std=30 * boundary.std)  # a step is 30 times as long
    narrow = edit_range(samples, wild, PixelIdentity())
    assert narrow is None or np.ptp(narrow) < high - low
    assert edit_range(Samples(generator, range(19)), boundary, PixelIdentity()) is None, "too few samples"
    monkeypatch.setattr(Realism, "are_faces", lambda self, features: torch.zeros(len(features), dtype=torch.bool))
    assert edit_range(samples, boundary, PixelIdentity()) is None, "no face, moved or not"
