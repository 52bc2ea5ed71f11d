"""editing/boundary.py and fit.py: planted directions are found, alone and given others, extremes are picked,
latents land where they should, files are checked."""

import io
import zipfile

import numpy as np
import pytest
import torch

import editing.fit
from editing.boundary import Boundary, BoundaryError, load_boundary, move_along, orthogonalise
from editing.fit import fit_boundary, fit_ridge, fit_svm, pick_extremes


def planted(n, width, *, noise=0.3, seed=0, mean=0.0):
    """Latents [n, width], scores [n] that grow along a unit direction with noise, and that direction."""
    draw = np.random.default_rng(seed)
    direction = draw.standard_normal(width)
    direction /= np.linalg.norm(direction)
    latents = draw.standard_normal((n, width)).astype(np.float32) + mean
    return latents, latents @ direction + noise * draw.standard_normal(n), direction


def simple(normal, space="w++", **info):
    normal = np.asarray(normal, np.float32)
    return Boundary(
        normal=normal[None] / np.linalg.norm(normal),
        intercept=0.0,
        attribute="smile",
        space=space,
        mean=0.0,
        std=1.0,
        **info,
    )


# -- fitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit, cosine", [("svm", 0.9), ("ridge", 0.97)])
def test_a_planted_direction_is_recovered(fit, cosine):
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
    (a, bias_a), (b, bias_b) = (fit_svm(latents[rows], side, kernel=kernel) for kernel in (True, False))
    assert a @ b > 0.95
    assert np.mean((latents @ a + bias_a > 0) == (latents @ b + bias_b > 0)) > 0.9


def test_ridge_in_blocks_is_the_closed_form(monkeypatch):
    latents, scores, _ = planted(300, 20, mean=50.0)
    monkeypatch.setattr(editing.fit, "BLOCK", 7)
    monkeypatch.setattr(editing.fit, "RIDGE", 0.5)
    normal, intercept = fit_ridge(latents, scores)
    x = latents - latents.mean(0, dtype=np.float64)
    gram = x.T @ x
    expected = np.linalg.solve(gram + 0.5 * np.trace(gram) / 20 * np.eye(20), x.T @ (scores - scores.mean()))
    assert np.allclose(normal, expected / np.linalg.norm(expected), atol=1e-9)
    assert latents.mean(0, dtype=np.float64) @ normal + intercept == pytest.approx(0, abs=1e-4)


def test_given_others_the_direction_is_that_of_the_attribute_alone():
    """Glasses come with age in the data, in scores and latents: the plain fit of age takes them along."""
    draw = np.random.default_rng(5)
    latents = draw.standard_normal((4000, 30))
    latents[:, 1] += 0.8 * latents[:, 0]  # the samples' glasses (axis 1) go with their age (axis 0)
    age, glasses = latents[:, 0] + 0.5 * latents[:, 1], latents[:, 1] + 0.1 * draw.standard_normal(4000)
    plain, _ = fit_ridge(latents, age)
    joint, _ = fit_ridge(latents, age, others=glasses[:, None])
    assert plain[1] > 0.3 and abs(joint[1]) < 0.1 and joint[0] > 0.98
    boundary = fit_boundary(latents, age, others=glasses[:, None], attribute="age", given=["glasses"])
    assert boundary.normal[0] @ joint > 0.99 and boundary.given == ["glasses"]
    both = np.stack([glasses, glasses], 1)  # the same attribute twice is no obstacle
    assert fit_ridge(latents, age, others=both)[0] @ joint > 0.999


def test_the_normal_points_to_higher_scores_and_the_seed_decides():
    latents, scores, _ = planted(400, 16)
    for fit in ("svc", "svm", "ridge"):
        boundary = fit_boundary(latents, scores, ratio=0.2, fit=fit)
        assert np.corrcoef(latents @ boundary.normal[0], scores)[0, 1] > 0.9
        assert np.array_equal(fit_boundary(latents, scores, ratio=0.2, fit=fit).normal, boundary.normal)
        assert 0.35 < np.mean((latents @ boundary.normal[0]) + boundary.intercept > 0) < 0.65
        flipped = fit_boundary(latents, -scores, ratio=0.2, fit=fit)
        assert flipped.normal[0] @ boundary.normal[0] < -0.8


def test_misuse_is_refused():
    latents, scores, _ = planted(100, 8)
    for changes, message in (
        ({"fit": "pca"}, "--fit pca"),
        ({"ratio": 0.6}, "--ratio 0.6"),
        ({"ratio": 0.01}, "leave 1 extremes per end"),
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


# -- moving --------------------------------------------------------------------------------------------------------


def test_latents_move():
    draw = np.random.default_rng(1)
    latent = draw.standard_normal((4, 6)).astype(np.float32)
    boundary = simple(draw.standard_normal(24))
    steps = np.array([-2.0, 0.0, 3.0])
    before = (latent.reshape(1, -1) @ boundary.normal[0])[0]
    relative = move_along(latent, boundary, steps)
    assert relative.shape == (3, 4, 6) and relative.dtype == np.float32 and np.array_equal(relative[1], latent)
    assert np.allclose(relative.reshape(3, -1) @ boundary.normal[0], before + steps, atol=1e-5)
    absolute = move_along(latent, boundary, steps, distance="absolute")
    assert np.allclose(absolute.reshape(3, -1) @ boundary.normal[0], steps, atol=1e-5), (
        "published: projection = distance"
    )
    some = move_along(latent, boundary, steps, layers=range(2), distance="absolute")
    assert np.array_equal(some[:, 2:], np.broadcast_to(latent[2:], (3, 2, 6))) and not np.allclose(
        some[0, 0], latent[0]
    )
    with pytest.raises(BoundaryError, match="--distance far"):
        move_along(latent, boundary, steps, distance="far")
    with pytest.raises(BoundaryError, match="has 18 numbers, the latent 4 x 6"):
        move_along(latent, simple(np.ones(18)), steps)


def test_one_normal_for_every_layer():
    """InterFaceGAN's manipulator: the projection of a W vector becomes the distance; to W+ the distance is added."""
    latent = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    boundary = simple(np.arange(1, 7), space="w")
    for distance in ("relative", "absolute"):
        frames = move_along(latent, boundary, [2.0], distance=distance)
        assert np.allclose(frames[0] - latent, 2 * boundary.normal, atol=1e-6), "W+"
    w = np.broadcast_to(latent[:1], latent.shape)
    frames = move_along(w, boundary, [2.0, -1.0], distance="absolute")
    assert np.allclose(frames @ boundary.normal[0], [[2.0] * 4, [-1.0] * 4], atol=1e-5), "W"
    some = move_along(w, boundary, [2.0], distance="absolute", layers=[1])
    assert np.array_equal(some[0, [0, 2, 3]], w[:3]) and some[0, 1] @ boundary.normal[0] == pytest.approx(2, abs=1e-5)


def test_orthogonal_moves_leave_the_other_attribute():
    draw = np.random.default_rng(3)
    age, glasses = simple(draw.standard_normal(24)), simple(draw.standard_normal(24))
    ws = (draw.standard_normal((500, 24)) + 1).astype(np.float32)
    ws += 3 * draw.standard_normal((500, 1)).astype(np.float32) * glasses.normal  # vary most along the one that goes
    free = orthogonalise(age, [glasses], ws)
    assert abs(free.normal[0] @ glasses.normal[0]) < 1e-6 and free.normal[0] @ age.normal[0] > 0.5
    frames = move_along(np.zeros((4, 6)), free, [5.0])
    assert abs((frames.reshape(1, -1) @ glasses.normal[0])[0]) < 1e-5
    along = ws @ free.normal[0]
    assert (free.mean, free.std) == pytest.approx((along.mean(), along.std()), abs=1e-4)
    assert np.mean(along + free.intercept > 0) == 0.5 and free.orthogonal_to == ["smile"] and not free.accuracies
    with pytest.raises(BoundaryError, match="nothing of the boundary"):
        orthogonalise(age, [glasses, age], ws)
    with pytest.raises(BoundaryError, match="of space w "):
        orthogonalise(age, [simple(draw.standard_normal(6), space="w")], ws)


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
    with pytest.raises(FileNotFoundError):
        load_boundary(tmp_path / "absent.npz")


def test_the_range_of_edits_is_an_entry_of_the_file(tmp_path):
    path = simple(np.ones(8), range=(-2.5, 4.0)).save(tmp_path / "a.npz")
    with np.load(path) as file:
        assert file["range"].tolist() == [-2.5, 4.0]
    assert load_boundary(path).range == (-2.5, 4.0)
    assert load_boundary(simple(np.ones(8)).save(path)).range is None


@pytest.mark.parametrize("shape", [(16,), (1, 16)])
@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_bare_directions(tmp_path, shape, suffix):
    """Such as InterFaceGAN's public .npy files: the name is the attribute, the length becomes 1."""
    direction, path = np.arange(16, dtype=np.float64).reshape(shape), tmp_path / f"boundary-age{suffix}"
    np.save(path, direction) if suffix == ".npy" else torch.save(torch.from_numpy(direction), path)
    boundary = load_boundary(path, space="w++", width=16, fingerprint="any")
    assert np.allclose(boundary.normal, direction.reshape(1, -1) / np.linalg.norm(direction))
    assert (boundary.attribute, boundary.std, boundary.intercept) == ("age", None, 0)
    with pytest.raises(BoundaryError, match="of width 16, expected 512"):
        load_boundary(path, width=512)
    measured = boundary.measured_on(np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32) + 1)
    assert measured.std == pytest.approx(1, abs=0.1) and measured.mean == pytest.approx(boundary.normal.sum(), abs=0.1)
    for wrong, message in (
        (np.ones((2, 16)), "a direction is"),
        (np.zeros(16), "length 0"),
        (np.full(16, np.nan), "not finite"),
    ):
        np.save(path, wrong) if suffix == ".npy" else torch.save(torch.from_numpy(wrong), path)
        with pytest.raises(BoundaryError, match=message):
            load_boundary(path)


def wrong_files(good: bytes):
    """(content, part of the message) of files that are no boundaries."""
    with np.load(io.BytesIO(good)) as file:
        normal, text = file["normal"], str(file["boundary"])

    def archive(**arrays):
        data = io.BytesIO()
        np.savez(data, **{"normal": normal, "boundary": text} | arrays)
        return data.getvalue()

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("normal.npy", bytes(50_000_000))
    header = io.BytesIO()
    with zipfile.ZipFile(header, "w") as file:
        member = io.BytesIO()
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
        file.writestr("normal.npy", member.getvalue())
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    yield good[: len(good) // 2], "truncated"
    yield bytes(flipped), "damaged|length 1|not finite"
    yield b"hello there, this is text " * 20, "not a .npz file"
    yield bomb.getvalue(), "far more than its own size"
    yield header.getvalue(), "Unable to allocate|truncated"
    yield archive(normal=np.full((1, 24), np.nan, np.float32)), "not finite"
    yield archive(normal=np.ones((1, 24), np.float32)), "not of length 1"
    yield archive(normal=np.array([{}], object)), "Object arrays"
    yield archive(boundary="[]"), "is a list, not an object"
    yield archive(boundary="[" * 100_000), "nested too deeply"
    yield archive(boundary=text.replace('"mean": 0.0', '"mean": "much"')), "`mean` is a text, not a number"
    yield archive(boundary=text.replace('"mean": 0.0', f'"mean": 1{"0" * 400}')), "64 bits"
    yield archive(boundary=text.replace('"std": 1.0', '"std": NaN')), "not finite"
    yield archive(boundary=text.replace('"std": 1.0', '"std": -1.0')), "standard deviation is -1"
    yield archive(boundary=text.replace('"attribute": "smile"', '"attribute": 3')), "`attribute` is a whole number"
    yield archive(range=np.array([1.0, 2.0])), "range goes from 1 to 2"
    yield archive(range=np.array([np.nan, 2.0])), "not finite"
    yield archive(range=np.arange(3.0)), "its range has 3 numbers"


def test_other_files_are_refused_in_one_sentence(tmp_path):
    good = simple(np.arange(1, 25)).save(tmp_path / "good.npz").read_bytes()
    path = tmp_path / "bad ü.npz"
    for content, message in wrong_files(good):
        path.write_bytes(content)
        with pytest.raises(BoundaryError, match=message) as caught:
            load_boundary(path)
        assert str(caught.value).startswith(f"{path} is no boundary of edit_attribute.py: ")
    with pytest.raises(ValueError, match="device or a pipe"):
        load_boundary("/dev/zero")


def test_ridge_is_validated_on_samples_that_it_did_not_see():
    draw = np.random.RandomState(0)
    latents, scores = draw.randn(300, 400).astype(np.float32), draw.randn(300)  # nothing to learn, all to memorise
    boundary = fit_boundary(latents, scores, ratio=0.1, fit="ridge")
    assert boundary.accuracies["train"] > 0.95 and boundary.accuracies["remaining"] < 0.8
