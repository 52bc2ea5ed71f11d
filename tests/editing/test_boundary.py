"""editing/boundary.py: planted directions are found, extremes are picked and balanced, walks land where they should,
files are checked."""

import numpy as np
import pytest

from editing.boundary import (
    Boundary,
    BoundaryError,
    RidgeSums,
    fit_boundary,
    load_boundary,
    orthogonalise,
    pick_extremes,
    separate,
    walk,
)


def planted(n, width, *, noise=0.3, seed=0, mean=0.0):
    """Latents [n, width], scores [n] that grow along a unit direction with noise, and that direction."""
    draw = np.random.default_rng(seed)
    direction = draw.standard_normal(width)
    direction /= np.linalg.norm(direction)
    latents = draw.standard_normal((n, width)).astype(np.float32) + mean
    return latents, latents @ direction + noise * draw.standard_normal(n), direction


def simple(normal, space="w++", **facts):
    normal = np.asarray(normal, np.float32)
    return Boundary(
        normal=normal[None] / np.linalg.norm(normal),
        intercept=0.0,
        attribute="smile",
        space=space,
        mean=0.0,
        std=1.0,
        **facts,
    )


# -- fitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit, cosine", [("svm", 0.9), ("ridge", 0.97)])
def test_a_planted_direction_is_recovered(fit, cosine):
    """The issue's bar: 512 dimensions, 6,000 samples, ratio .1."""
    latents, scores, direction = planted(6000, 512)
    boundary = fit_boundary(latents, scores, ratio=0.1, fit=fit, attribute="age", space="w")
    assert boundary.normal.shape == (1, 512) and np.linalg.norm(boundary.normal) == pytest.approx(1, abs=1e-6)
    assert boundary.normal[0] @ direction > cosine
    assert boundary.accuracies["validation"] > 0.95 and boundary.accuracies["remaining"] > 0.7
    along = latents @ boundary.normal[0]
    assert (boundary.mean, boundary.std) == pytest.approx((along.mean(), along.std()), abs=1e-4)


def test_svm_is_the_published_machine():
    """LinearSVC solves SVC's problem: same direction, same side of nearly every sample."""
    latents, scores, _ = planted(1500, 200, noise=1.0)
    low, high = pick_extremes(scores, 0.1)
    rows, side = np.concatenate((low, high)), np.repeat([0, 1], (len(low), len(high)))
    (a, bias_a), (b, bias_b) = (separate(latents[rows], side, fit) for fit in ("svc", "svm"))
    assert a @ b > 0.95
    assert np.mean((latents @ a + bias_a > 0) == (latents @ b + bias_b > 0)) > 0.9


def test_ridge_in_batches_is_the_closed_form():
    latents, scores, _ = planted(300, 20, mean=50.0)
    whole, parts = RidgeSums(20), RidgeSums(20)
    whole.add(latents, scores)
    for rows in np.array_split(np.arange(300), 7):
        parts.add(latents[rows], scores[rows])
    normal = whole.solve(0.5)
    assert np.allclose(parts.solve(0.5), normal, atol=1e-9)
    x = latents - latents.mean(0, dtype=np.float64)
    gram = x.T @ x
    expected = np.linalg.solve(gram + 0.5 * np.trace(gram) / 20 * np.eye(20), x.T @ (scores - scores.mean()))
    assert np.allclose(normal, expected / np.linalg.norm(expected), atol=1e-9)


def test_the_normal_points_to_higher_scores_and_the_seed_decides():
    latents, scores, _ = planted(400, 16)
    for fit in ("svc", "svm", "ridge"):
        boundary = fit_boundary(latents, scores, ratio=0.2, fit=fit)
        assert np.corrcoef(boundary.project(latents), scores)[0, 1] > 0.9
        assert np.array_equal(fit_boundary(latents, scores, ratio=0.2, fit=fit).normal, boundary.normal)
        assert 0.35 < np.mean(boundary.project(latents) + boundary.intercept > 0) < 0.65
        flipped = fit_boundary(latents, -scores, ratio=0.2, fit=fit)
        assert flipped.normal[0] @ boundary.normal[0] < -0.8


def test_misuse_is_refused():
    latents, scores, _ = planted(100, 8)
    for changes, message in (
        ({"fit": "pca"}, "--fit pca"),
        ({"ratio": 0.6}, "--ratio 0.6"),
        ({"ratio": 0.01}, "at least 2 and 2"),
    ):
        with pytest.raises(BoundaryError, match=message):
            fit_boundary(latents, scores, **{"ratio": 0.2} | changes)
    with pytest.raises(BoundaryError, match="100 latents, but 99 scores"):
        fit_boundary(latents, scores[1:])
    with pytest.raises(BoundaryError, match="score 3 of age is not finite"):
        fit_boundary(latents, np.where(np.arange(100) == 3, np.nan, scores), attribute="age")
    with pytest.raises(BoundaryError, match="do not tell the extremes apart"):
        fit_boundary(latents, np.zeros(100), ratio=0.2)


# -- extremes ------------------------------------------------------------------------------------------------------


def test_extremes():
    scores = np.array([5, 1, 9, 3, 7, 0, 8, 2, 6, 4.0])
    low, high = pick_extremes(scores, 0.2)
    assert scores[low].tolist() == [0, 1] and scores[high].tolist() == [8, 9]


def test_balanced_extremes_do_not_differ_in_the_other_attribute():
    draw = np.random.default_rng(0)
    gender = draw.integers(0, 2, 4000)
    smile = gender + 0.5 * draw.standard_normal(4000)  # women smile more
    low, high = pick_extremes(smile, 0.1)
    assert gender[high].mean() - gender[low].mean() > 0.9
    low, high = pick_extremes(smile, 0.1, others=gender[:, None].astype(float))
    assert abs(gender[high].mean() - gender[low].mean()) < 0.1 and min(len(low), len(high)) > 100
    assert smile[high].mean() > smile[low].mean() + 0.5


# -- walking -------------------------------------------------------------------------------------------------------


def test_walks():
    draw = np.random.default_rng(1)
    latent = draw.standard_normal((4, 6)).astype(np.float32)
    boundary = simple(draw.standard_normal(24))
    steps = np.array([-2.0, 0.0, 3.0])
    before = boundary.project(latent.reshape(1, -1))[0]
    relative = walk(latent, boundary, steps)
    assert relative.shape == (3, 4, 6) and relative.dtype == np.float32 and np.array_equal(relative[1], latent)
    assert np.allclose(boundary.project(relative.reshape(3, -1)), before + steps, atol=1e-5)
    absolute = walk(latent, boundary, steps, distance="absolute")
    assert np.allclose(boundary.project(absolute.reshape(3, -1)), steps, atol=1e-5), "published: projection = distance"
    some = walk(latent, boundary, steps, layers=range(2), distance="absolute")
    assert np.array_equal(some[:, 2:], np.broadcast_to(latent[2:], (3, 2, 6))) and not np.allclose(
        some[0, 0], latent[0]
    )
    with pytest.raises(BoundaryError, match="--distance far"):
        walk(latent, boundary, steps, distance="far")
    with pytest.raises(BoundaryError, match="has 18 numbers, the code 4 x 6"):
        walk(latent, simple(np.ones(18)), steps)


def test_one_normal_for_every_layer():
    latent = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    boundary = simple(np.arange(1, 7), space="w")
    frames = walk(latent, boundary, [2.0])
    assert np.allclose(frames[0] - latent, 2 * boundary.normal, atol=1e-6)
    frames = walk(latent, boundary, [2.0], distance="absolute")
    assert np.allclose(frames[0] @ boundary.normal[0], 2, atol=1e-5)


def test_orthogonal_walks_leave_the_other_attribute():
    draw = np.random.default_rng(3)
    age, glasses = simple(draw.standard_normal(24)), simple(draw.standard_normal(24))
    codes = (draw.standard_normal((500, 24)) + 1).astype(np.float32)
    codes += 3 * draw.standard_normal((500, 1)).astype(np.float32) * glasses.normal  # vary most along the one that goes
    free = orthogonalise(age, [glasses], codes)
    assert abs(free.normal[0] @ glasses.normal[0]) < 1e-6 and free.normal[0] @ age.normal[0] > 0.5
    frames = walk(np.zeros((4, 6)), free, [5.0])
    assert abs(glasses.project(frames.reshape(1, -1))[0]) < 1e-5
    along = free.project(codes)
    assert (free.mean, free.std) == pytest.approx((along.mean(), along.std()), abs=1e-4)
    assert np.mean(along + free.intercept > 0) == 0.5 and free.orthogonal_to == ["smile"] and not free.accuracies
    with pytest.raises(BoundaryError, match="nothing of the boundary"):
        orthogonalise(age, [glasses, age], codes)
    with pytest.raises(BoundaryError, match="of space w "):
        orthogonalise(age, [simple(draw.standard_normal(6), space="w")], codes)


# -- files ---------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    boundary = simple(np.arange(1, 25), fingerprint="f00", size=32, accuracies={"train": 1.0, "remaining": None})
    path = boundary.save(tmp_path / "ü smile.npz")
    again = load_boundary(path, space="w++", width=24, fingerprint="f00")
    assert np.array_equal(again.normal, boundary.normal)
    assert (again.attribute, again.accuracies, again.size) == ("smile", {"train": 1.0, "remaining": None}, 32)
    for expected, message in (
        ({"space": "w"}, "space w\\+\\+, expected w"),
        ({"width": 512}, "width 24, expected 512"),
        ({"fingerprint": "abc"}, "generator f00, expected abc"),
    ):
        with pytest.raises(BoundaryError, match=message):
            load_boundary(path, **expected)
    np.savez(tmp_path / "other.npz", normal=np.ones((1, 4)))
    (tmp_path / "text.npz").write_text("hello there, this is text " * 20)
    for name in ("other.npz", "text.npz"):
        with pytest.raises(BoundaryError, match=f"{name} is no boundary of edit_attribute.py"):
            load_boundary(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_boundary(tmp_path / "absent.npz")


def test_ridge_is_judged_by_samples_that_it_did_not_see():
    draw = np.random.RandomState(0)
    latents, scores = draw.randn(300, 400).astype(np.float32), draw.randn(300)  # nothing to learn, all to memorise
    boundary = fit_boundary(latents, scores, ratio=0.1, fit="ridge", ridge=1e-6)
    assert boundary.accuracies["train"] > 0.95 and boundary.accuracies["remaining"] < 0.8
