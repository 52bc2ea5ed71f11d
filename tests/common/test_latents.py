"""common/latents.py: images that depend on their seed alone; files that are refused when they are of another kind."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common import files
from common.latents import draw_z, load_latents, n_tokens, parse_seeds, save_latents


def some_latents(count=3, length=8, dim=16):
    return torch.randn(count, length, dim, generator=torch.Generator().manual_seed(1))


def save(folder, latents=None, **changes):
    latents = some_latents() if latents is None else latents
    names = [f"Gesicht {index} ü.jpg" for index in range(len(latents))]
    options = {"names": names, "space": "w++", "size": 32, "fingerprint": "0123456789abcdef", **changes}
    save_latents(folder, latents, **options)
    return folder


# -- seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"), [("7", [7]), ("0-3", [0, 1, 2, 3]), (" 5 , 1-2,5", [5, 1, 2, 5]), ("4294967295", [2**32 - 1])]
)
def test_parse_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1,,2", "3-1", "-1", "1-", "1.5", "4294967296"])
def test_parse_seeds_refuses(text):
    with pytest.raises(ValueError, match="--seeds"):
        parse_seeds(text)


@pytest.mark.parametrize("w_space", [False, True])
def test_draw_z_depends_on_the_seed_alone(w_space):
    torch.manual_seed(1)
    together = draw_z([3, 5, 4], 8, 512, w_space=w_space)
    torch.manual_seed(2)
    alone = torch.cat([draw_z([seed], 8, 512, w_space=w_space) for seed in (3, 5, 4)])
    assert torch.equal(together, alone)
    assert together.shape == (3, 8, 512) and together.dtype == torch.float32
    assert not torch.equal(together[0], together[1])
    assert abs(float(together.mean())) < 0.1 and abs(float(together.std()) - 1) < 0.1


def test_draw_z_tokens():
    assert len(draw_z([1], 8, 512)[0].unique(dim=0)) == 8
    assert len(draw_z([1], 8, 512, w_space=True)[0].unique(dim=0)) == 1
    assert draw_z([], 8, 512).shape == (0, 8, 512)


def test_draw_z_is_frozen():
    """The image of a seed must not change with a release: values of torch's CPU generator, mt19937."""
    assert torch.allclose(draw_z([0], 1, 16)[0, 0, :3], torch.tensor([-1.1258, -1.1524, -0.2506]), atol=1e-4)


def test_n_tokens():
    assert [n_tokens(size) for size in (32, 64, 128, 256, 512, 1024)] == [8, 10, 12, 14, 16, 18]
    for size in (0, 4, 100):
        with pytest.raises(ValueError, match="power of two"):
            n_tokens(size)


# -- round trip ------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    latents = some_latents()
    noise = [np.random.default_rng(0).normal(size=(3, 1, r, r)) for r in (4, 8, 8)]
    losses = {"lpips": torch.tensor([0.1, 0.2, 0.3]), "mse": [1, 2, None]}
    alignment = [{"quad": np.eye(2)}, None, {}]
    folder = save(
        tmp_path / "Latente ü", latents, noise=noise, losses=losses, alignment=alignment, extra={"step": 1000}
    )
    assert sorted(path.name for path in folder.iterdir()) == ["latents.json", "latents.npy", "noise.npz"]
    published = np.load(folder / "latents.npy")
    assert published.dtype == np.float32 and np.array_equal(published, latents.numpy())

    for path in (folder, folder / "latents.npy", str(folder)):
        read = load_latents(path, expect_space="w++", expect_shape=(8, 16), expect_fingerprint="0123456789abcdef")
        assert torch.equal(read.latents, latents) and len(read) == 3
        assert read.names == ["Gesicht 0 ü.jpg", "Gesicht 1 ü.jpg", "Gesicht 2 ü.jpg"]
        assert (read.space, read.size, read.fingerprint) == ("w++", 32, "0123456789abcdef")
        assert read.losses["lpips"] == pytest.approx([0.1, 0.2, 0.3]) and read.losses["mse"] == [1, 2, None]
        assert read.alignment == [{"quad": [[1, 0], [0, 1]]}, None, {}] and read.extra == {"step": 1000}
        assert [tuple(layer.shape) for layer in read.noise] == [(3, 1, 4, 4), (3, 1, 8, 8), (3, 1, 8, 8)]
        assert torch.equal(read.noise[2], torch.tensor(noise[2], dtype=torch.float32))


def test_w_space_is_repeated(tmp_path):
    w = torch.randn(2, 16)
    read = load_latents(save(tmp_path, w, space="w"), expect_space=("w", "w+"))
    assert torch.equal(read.latents, w[:, None].expand(2, 8, 16))


def test_second_save_leaves_no_stale_noise(tmp_path):
    save(tmp_path, noise=[np.zeros((3, 1, 4, 4))])
    save(tmp_path, some_latents(2))
    read = load_latents(tmp_path)
    assert len(read) == 2 and read.noise is None and not (tmp_path / "noise.npz").exists()


def test_no_latents(tmp_path):
    assert len(load_latents(save(tmp_path, torch.zeros(0, 8, 16)))) == 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"names": ["a"]}, "3 latents, but 1 in names"),
        ({"losses": {"mse": [1.0]}}, "but 1 in losses"),
        ({"alignment": [None] * 4}, "but 4 in alignment"),
        ({"noise": [np.zeros((1, 1, 4, 4))]}, "but 1 in noise"),
        ({"space": "z"}, "expected one of w, w"),
        ({"space": "w"}, "repeat one vector"),
        ({"size": 64}, r"expected \[N, 10, D\] for image size 64"),
        ({"latents": torch.zeros(3, 16)}, r"shape \[3, 16\]"),
        ({"latents": torch.full((3, 8, 16), torch.nan)}, "latent 0 has values that are not finite"),
    ],
)
def test_parts_must_fit(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        save(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("failing_write", [1, 2, 3, 4])
def test_full_disk_leaves_the_previous_save(tmp_path, monkeypatch, failing_write):
    before = some_latents()
    folder = save(tmp_path / "latents", before, noise=[np.zeros((3, 1, 4, 4))])
    writes = 0

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            nonlocal writes
            writes += 1
            if writes == failing_write:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(files, "open", lambda *args: FullDisk(open(*args)), raising=False)
    with pytest.raises(OSError, match="] could not be written: No space left"):
        save(folder, before + 1, names=["x", "y", "z"], noise=[np.ones((3, 1, 4, 4))])
    monkeypatch.undo()
    read = load_latents(folder)
    assert torch.equal(read.latents, before) and read.names[0] == "Gesicht 0 ü.jpg" and not read.noise[0].any()
    assert not list(folder.glob(".*"))


# -- files of others, and wrong ones ---------------------------------------------------------------


def test_bare_upstream_file(tmp_path):
    path = tmp_path / "published.npy"
    np.save(path, some_latents(2, 14, 512).numpy().astype(np.float64))
    read = load_latents(path, expect_space="w++", expect_shape=(14, 512), expect_fingerprint="anything")
    assert read.latents.dtype == torch.float32 and (read.size, read.space, read.fingerprint) == (256, "w++", None)
    assert read.names == ["00000", "00001"]


def test_bare_two_dimensional_file(tmp_path):
    path = tmp_path / "w.npy"
    np.save(path, np.ones((2, 512), np.float32))
    for space in (None, "w", ("w", "w+")):
        read = load_latents(path, expect_space=space, expect_shape=(8, 512))
        assert read.latents.shape == (2, 8, 512) and read.space == "w"
    with pytest.raises(ValueError, match=r"shape \[2, 512\]; expected \[N, L, D\]"):
        load_latents(path)
    with pytest.raises(ValueError, match=r"latents of space w; expected w\+\+"):
        load_latents(path, expect_space=("w++",), expect_shape=(8, 512))
    np.save(path, np.ones((3, 1, 512), np.float32))
    assert load_latents(path, expect_space=("w", "w+"), expect_shape=(8, 512)).latents.shape == (3, 8, 512)


def test_one_face_saved_alone(tmp_path):
    """[L, 512] is one face to a W++ or W+ generator, L vectors where W alone is expected, and else not guessed at."""
    path, face = tmp_path / "face.npy", some_latents(1, 8, 16)
    np.save(path, face[0].numpy())
    for space in ("w++", ("w++",), "w+"):
        read = load_latents(path, expect_space=space, expect_shape=(8, 16))
        assert torch.equal(read.latents, face) and read.names == ["00000"]
    assert load_latents(path, expect_space="w", expect_shape=(8, 16)).latents.shape == (8, 8, 16)
    for space in (("w", "w+"), None):
        with pytest.raises(
            ValueError, match=r"may be one face in W\+ or 8 faces in W: save the former as \[1, 8, 16\]"
        ):
            load_latents(path, expect_space=space, expect_shape=(8, 16))
    with pytest.raises(ValueError, match=r"shape \[8, 16\]; expected \[N, 10, 32\], or \[10, 32\] of one face"):
        load_latents(path, expect_space="w++", expect_shape=(10, 32))


def rosinality_projection(latents, noise=(4, 8, 8)):
    """A projection as rosinality's projector.py saves it."""
    draw = torch.Generator().manual_seed(2)
    return {
        f"faces/people/ü {i}.jpg": {
            "img": torch.zeros(3, 32, 32),
            "latent": latent,
            "noise": [torch.randn(1, 1, r, r, generator=draw) for r in noise],
        }
        for i, latent in enumerate(latents)
    }


def test_projection_of_rosinality(tmp_path):
    path, latents = tmp_path / "project.pt", some_latents()
    saved = rosinality_projection(latents)
    torch.save(saved, path)
    read = load_latents(path, expect_space=("w", "w+"), expect_shape=(8, 16), expect_fingerprint="anything")
    assert torch.equal(read.latents, latents) and (read.size, read.space, read.fingerprint) == (32, None, None)
    assert read.names == ["ü 0.jpg", "ü 1.jpg", "ü 2.jpg"]
    assert [tuple(layer.shape) for layer in read.noise] == [(3, 1, 4, 4), (3, 1, 8, 8), (3, 1, 8, 8)]
    assert torch.equal(read.noise[2][1:2], saved["faces/people/ü 1.jpg"]["noise"][2])
    torch.save({r"C:\faces\a.png": {"latent": torch.ones(16, requires_grad=True)}}, path)
    read = load_latents(path, expect_shape=(8, 16))
    assert torch.equal(read.latents, torch.ones(1, 8, 16)) and read.space == "w" and read.noise is None
    assert read.names == ["a.png"]
    with pytest.raises(ValueError, match=r"latents of space w; expected w\+\+"):
        load_latents(path, expect_space="w++", expect_shape=(8, 16))


def test_projection_of_nvidia(tmp_path):
    path = tmp_path / "projected_w.npz"
    np.savez(path, w=some_latents(1, 14, 512).numpy())
    read = load_latents(path, expect_space=("w", "w+"), expect_shape=(14, 512), expect_fingerprint="anything")
    assert torch.equal(read.latents, some_latents(1, 14, 512)) and (read.names, read.noise) == (["00000"], None)
    whole = path.read_bytes()
    for content, complaint in ((whole[:-50], "truncated"), (b"", "is empty"), (b"some text", "not a .npz file")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            load_latents(path)
    np.savez(path, normal=np.ones((1, 512)))
    with pytest.raises(ValueError, match="is no projected_w.npz: expected .* under the name w"):
        load_latents(path)
    with pytest.raises(FileNotFoundError, match="no such latents file"):
        load_latents(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"g_ema": {"conv1": torch.ones(1)}, "step": 3}, "is no projection of rosinality's projector.py"),
        ({}, "is no projection"),
        (torch.ones(2, 8, 16), "holds a Tensor"),
        ({"a.png": {"latent": Path("code")}}, "holds Python objects"),
        ({"a.png": {"latent": torch.ones(8, 16, dtype=torch.int64)}}, "is no projection"),
        ({"a.png": {"latent": torch.ones(8, 16)}, "b.png": {"latent": torch.ones(16)}}, "of different shapes"),
        (
            rosinality_projection(some_latents(1)) | {"b.png": {"latent": torch.ones(8, 16), "noise": [torch.ones(1)]}},
            "noise maps of different shapes",
        ),
        ({"a.png": {"latent": torch.full((8, 16), torch.nan)}}, "not finite"),
    ],
)
def test_other_pt_files_are_refused(tmp_path, content, complaint):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=complaint):
        load_latents(tmp_path / "a.pt", expect_shape=(8, 16))


@pytest.mark.parametrize(
    ("expected", "complaint"),
    [
        ({"expect_space": "w+"}, r"latents of space w\+\+; expected w\+$"),
        ({"expect_space": ("w", "w+")}, r"w\+\+; expected w or w\+$"),
        ({"expect_shape": (14, 512)}, r"shape \[8, 16\] per image \(size 32\); the generator takes \[14, 512\]"),
        ({"expect_fingerprint": "f" * 16}, "generator 0123456789abcdef; the checkpoint given is ffffffffffffffff"),
    ],
)
def test_mismatch_names_both_sides(tmp_path, expected, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_latents(save(tmp_path), **expected)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such latents file"):
        load_latents(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"latents\.npy: no such latents file"):
        load_latents(tmp_path)
    path = tmp_path / "a.npy"
    np.save(path, some_latents().numpy())
    whole = path.read_bytes()
    for content, complaint in (
        (whole[:-1], "truncated"),
        (whole[:20], "truncated"),
        (b"", "is empty"),
        (b"<!doctype html>", "web page"),
        (b"some text", "not a .npy file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            load_latents(path)
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="not a .npy file"):
        load_latents(path)
    np.save(path, np.ones((2, 8, 16), np.int64))
    with pytest.raises(ValueError, match="holds int64"):
        load_latents(path)
    np.save(path, np.full((2, 8, 16), np.inf))
    with pytest.raises(ValueError, match="not finite"):
        load_latents(path)


def test_noise_is_finite(tmp_path):
    save(tmp_path / "a", noise=[np.full((3, 1, 4, 4), np.nan)])
    with pytest.raises(ValueError, match=r"noise\.npz has values that are not finite"):
        load_latents(tmp_path / "a")
    saved = rosinality_projection(some_latents(1))
    saved["faces/people/ü 0.jpg"]["noise"][1][0, 0, 0, 0] = torch.inf
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: noise maps with values that are not finite"):
        load_latents(tmp_path / "a.pt", expect_shape=(8, 16))
    (tmp_path / "a" / "noise.npz").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match=r"noise\.npz is truncated, damaged"):
        load_latents(tmp_path / "a")


def test_description_of_another_file(tmp_path):
    save(tmp_path)
    np.save(tmp_path / "latents.npy", some_latents(2).numpy())
    with pytest.raises(ValueError, match=r"shape \[2, 8, 16\], but latents\.json describes \[3, 8, 16\]"):
        load_latents(tmp_path)
    save(tmp_path)
    good = json.loads((tmp_path / "latents.json").read_text(encoding="utf-8"))
    wrong = (
        {"names": []},
        {"names": [1, 2, 3]},
        {"size": "32"},
        {"shape": None},
        {"losses": []},
        {"extra": {"condition": 3}},
    )
    for text in ('{"names": [', "[]", "[" * 100_000, *(json.dumps(good | change) for change in wrong)):
        (tmp_path / "latents.json").write_text(text)
        with pytest.raises(ValueError, match=r"latents\.json"):
            load_latents(tmp_path)
