"""Measures of reconstructions against scikit-image and by hand, their table on disk, and the paper's table."""

import csv
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import projector
from common.cli import run
from common.images import read_image
from common.latents import save_latents
from metrics import reconstruction
from model import Discriminator, Generator
from perceptual.image_metrics import (
    MEASURES,
    image_digest,
    mean_and_std,
    measure,
    read_measures,
    structural_similarity,
    summary,
    write_measures,
)


class MeanDistance:
    name = "mean"

    def __call__(self, a, b):
        self.size = a.shape[-1]
        return (a - b).abs().mean((1, 2, 3))


class SameFace:
    name = "same"

    def similarity(self, a, b):
        return torch.ones(len(a))


def random_pairs(n=3, size=24, seed=0):
    """Smooth random images in [-1, 1]; the second set is near the first."""
    draw = torch.Generator().manual_seed(seed)
    a = torch.nn.functional.interpolate(torch.rand(n, 3, 6, 6, generator=draw), (size, size), mode="bilinear") * 2 - 1
    return a, (a + 0.2 * torch.randn(a.shape, generator=draw)).clamp(-1, 1)


# -- measures ------------------------------------------------------------------------------------------------------


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = random_pairs()
    expected = [
        metrics.structural_similarity(
            x.permute(1, 2, 0).double().numpy(),
            y.permute(1, 2, 0).double().numpy(),
            data_range=2,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(structural_similarity(a, b).numpy(), expected, rtol=1e-9)
    assert structural_similarity(a, a).tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(ValueError, match="at least 11 pixels"):
        structural_similarity(a[:, :, :8, :8], b[:, :, :8, :8])


def test_measures_by_hand():
    a, b = random_pairs()
    distance = MeanDistance()
    values = measure(a, b, perceptual=distance, identity=SameFace())
    assert list(values) == list(MEASURES) and all(v.dtype == torch.float64 for v in values.values())
    mse = ((a - b).double() ** 2).mean((1, 2, 3))
    torch.testing.assert_close(values["mse"], mse)
    torch.testing.assert_close(values["psnr"], 10 * torch.log10(4 / mse))
    for i in range(3):  # one by one or together
        alone = measure(a[i : i + 1], b[i : i + 1], perceptual=distance)
        assert "identity" not in alone and float(alone["ssim"][0]) == pytest.approx(float(values["ssim"][i]))
    assert measure(a, a, perceptual=distance)["psnr"].isinf().all()


def test_large_images_are_averaged_down_for_the_perceptual_distance():
    a, b = random_pairs(1, 512)
    distance = MeanDistance()
    measure(a, b, perceptual=distance)
    assert distance.size == 256


def test_mean_and_std():
    assert mean_and_std([1.0, 3.0]) == (2, 1), "population deviation"
    assert mean_and_std([1.0, math.inf, 3.0]) == (2, 1), "a perfect reconstruction has no finite PSNR"
    assert all(map(math.isnan, mean_and_std([])))
    text = summary({"perceptual": [0.1, 0.3], "mse": [0.02, 0.02], "psnr": [20, 22]}, perceptual="lpips-vgg")
    assert text == "lpips-vgg 0.2000 +- 0.1000, mse 0.0200 +- 0.0000, psnr 21.00 +- 1.00"


def test_table_on_disk(tmp_path):
    path, names = tmp_path / "reconstruction.csv", ["ü, 1.png", "b.png"]
    values = {"perceptual": [0.1, 0.2], "mse": torch.tensor([0.01, 0.02]), "psnr": [26.0, math.inf], "ssim": [0.5, 1]}
    write_measures(path, names, values, perceptual="lpips-vgg", identity=None, steps=[3, 4])
    found = read_measures(path)
    assert (found.names, found.perceptual, found.identity) == (names, "lpips-vgg", None)
    assert set(found.values) == set(values) and found.values["psnr"] == [26, math.inf]
    assert found.values["mse"] == pytest.approx([0.01, 0.02])
    with open(path, encoding="utf-8", newline="") as file:
        assert [row["steps"] for row in csv.DictReader(file)] == ["3", "4"]
    assert found.originals is None
    images = [np.full((4, 4, 3), value, np.uint8) for value in (0, 1)] + [np.zeros((2, 8, 3), np.uint8)]
    digests = [image_digest(image) for image in images]
    assert len(set(digests)) == 3 and all(len(digest) == 12 for digest in digests)
    write_measures(path, names, values, perceptual="lpips-vgg", identity=None, originals=digests[:2])
    assert read_measures(path).originals == digests[:2]
    path.write_bytes(b"name\xff\n")
    with pytest.raises(ValueError, match="is no reconstruction.csv"):
        read_measures(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is no reconstruction.csv"):
        read_measures(path)
    with pytest.raises(FileNotFoundError, match=r"table of reconstructions"):
        read_measures(tmp_path / "absent.csv")


# -- the paper's table ---------------------------------------------------------------------------------------------


@pytest.fixture
def inversion(tmp_path):
    """make(folder name, space, method, mean of the perceptual distance, ...) -> its folder."""

    def make(
        name,
        space,
        method="projector",
        level=0.1,
        names=("a.png", "b.png"),
        perceptual="lpips-squeeze",
        size=16,
        identity=None,
        originals=None,
    ):
        folder, n = tmp_path / name, len(names)
        latents = np.ones((n, 2 * (size.bit_length() - 2), 32), np.float32)
        extra = {} if method is None else {"method": method}
        save_latents(folder, latents, names=names, space=space, size=size, fingerprint=None, extra=extra)
        values = {"perceptual": [level + 0.01 * (-1) ** i for i in range(n)], "mse": [level / 10] * n, "psnr": [20] * n}
        if identity:
            values["identity"] = [level] * n
        write_measures(
            folder / "reconstruction.csv",
            list(names),
            values,
            perceptual=perceptual,
            identity=identity,
            originals=originals,
        )
        return folder

    return make


def table(*argv, expect=0):
    assert run(reconstruction.main, reconstruction.build_parser(), [*map(str, argv)]) == expect


def test_table_as_text(inversion, capsys):
    table(inversion("wpp", "w++", level=0.09), inversion("w", "w", level=0.2), inversion("psp", "w++", "pSp", 0.36))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Inversion", "(mean", "+-", "std)", "W", "W+", "W++"]
    assert lines[2].split() == ["projector", "Perceptual", "0.2000+-0.0100", "-", "0.0900+-0.0100"]
    assert lines[3].split() == ["projector", "MSE", "0.0200+-0.0000", "-", "0.0090+-0.0000"]
    assert lines[4].split() == ["pSp", "Perceptual", "-", "-", "0.3600+-0.0100"]
    assert lines[-1] == "2 images, mean +- std, perceptual: lpips-squeeze, mse on [-1, 1]"


def test_table_as_csv_and_latex(inversion, tmp_path):
    folders = inversion("wpp", "w++"), inversion("w", "w", level=0.2)
    table(*folders, "--format", "csv", "--output", tmp_path / "t.csv", "--measures", "perceptual,psnr")
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["inversion"] == "projector Perceptual" and rows[0]["w_mean"] == "0.2" and rows[0]["w+_mean"] == ""
    assert rows[1]["w++_mean"] == "20" and "lpips-squeeze" in rows[0]["note"]
    table(*folders, "--format", "latex", "--output", tmp_path / "t.tex", "--measures", "perceptual,psnr")
    text = (tmp_path / "t.tex").read_text()
    assert r"projector Perceptual & $0.2000 \pm 0.0100$ & -- & $0.1000 \pm 0.0100$ \\" in text
    assert r"projector PSNR & $20.00 \pm 0.00$" in text and text.count("tabular") == 2


def test_unlike_numbers_are_refused(inversion, tmp_path, capsys):
    w, other = inversion("w", "w"), inversion("vgg", "w++", perceptual="lpips-vgg")
    table(w, other, expect=1)
    assert f"{w} was measured by lpips-squeeze, {other} by lpips-vgg" in capsys.readouterr().err
    table(w, other, "--measures", "mse")
    more = inversion("more", "w++", names=("a.png", "c.png", "b.png"), level=0.3)
    table(w, more, expect=1)
    assert "hold different images: --common compares the 2 that all have" in capsys.readouterr().err
    table(w, more, "--common")
    assert "2 images" in capsys.readouterr().out
    table(w, inversion("c", "w+", names=("c.png",)), "--common", expect=1)
    assert "no image in common" in capsys.readouterr().err
    again = inversion("again", "w", level=0.3)
    table(w, again, expect=1)
    assert "are both projector in W" in capsys.readouterr().err
    table(w, f"longer={again}")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["longer", "Perceptual", "0.3000+-0.0100", "-", "-"] in lines and lines[2][:2] == ["projector", "Perceptual"]
    table(w, "--measures", "identity", expect=1)
    assert "has no identity" in capsys.readouterr().err
    table(w, "--measures", "beauty", expect=2)
    assert "'beauty' is none of" in capsys.readouterr().err


def test_unlike_protocols_are_refused(inversion, capsys):
    """Another identity network, images of another size, other images under the same names."""
    w = inversion("w", "w", identity="mobilefacenet", originals=["0a", "0b"])
    other = inversion("arcface", "w++", identity="ir_se50")
    table(w, other, "--measures", "mse,identity", expect=1)
    assert f"{w} was measured by mobilefacenet, {other} by ir_se50" in capsys.readouterr().err
    table(w, other)
    assert "identity" not in capsys.readouterr().out
    table(w, inversion("large", "w++", size=32), expect=1)
    assert f"{w} was measured with images of 16 pixels" in capsys.readouterr().err
    table(w, inversion("unaligned", "w++", originals=["0a", "ff"]), expect=1)
    assert f"b.png is another image in {w} than in" in capsys.readouterr().err
    table(w, inversion("same", "w++", names=("b.png", "a.png"), originals=["0b", "0a"]))
    assert "2 images" in capsys.readouterr().out, "the order does not matter"
    more = inversion("more", "w+", names=("c.png", "b.png"), originals=["0c", "0b"])
    table(w, more, "--common", "--measures", "mse")
    assert "1 images" in capsys.readouterr().out


def test_folders_that_are_no_inversions(inversion, tmp_path, capsys):
    table(tmp_path / "absent", expect=1)
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    table(tmp_path / "empty", expect=1)
    assert "is no finished inversion" in capsys.readouterr().err
    nameless = inversion("nameless", "w", method=None)
    table(nameless, expect=1)
    assert "does not tell the method: give --method" in capsys.readouterr().err
    table(nameless, "--method", "hybrid")
    assert "hybrid Perceptual" in capsys.readouterr().out
    (nameless / "latents.json").write_text("{")
    table(nameless, "--method", "hybrid", expect=1)
    assert "is no latents.json" in capsys.readouterr().err


def test_table_of_what_the_projector_writes(tmp_path, tiny_config, tiny_w_config, face_folder, capsys):
    """W, W+ and W++ of the same images make one table; a image that changed under its name is noticed."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted(face_folder.glob("face 0[12].png")):
        shutil.copy(path, photos)
    checkpoints = {}
    for name, config in (("w", tiny_w_config), ("wpp", tiny_config)):
        torch.manual_seed(0)
        networks = {"g_ema": Generator(config).state_dict(), "d": Discriminator(config).state_dict()}
        checkpoints[name] = tmp_path / f"{name}.pt"
        torch.save(networks | {"config": config.to_dict(), "step": 0}, checkpoints[name])

    def project(checkpoint, space, folder):
        argv = [
            "--ckpt",
            checkpoints[checkpoint],
            "--dataset",
            photos,
            "--output_dir",
            folder,
            "--space",
            space,
            "--step",
            2,
            "--perceptual",
            "scorer:face-scorer",
            "--identity",
            "none",
            "--device",
            "cpu",
            "--mean_samples",
            20,
        ]
        assert run(projector.main, projector.build_parser(), [str(flag) for flag in argv]) == 0
        return folder

    folders = [project(*job, tmp_path / f"out {job[1]}") for job in (("wpp", "w++"), ("w", "w"), ("w", "w+"))]
    capsys.readouterr()
    table(*folders, "--format", "csv")
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["inversion"] for row in rows] == ["projector Perceptual", "projector MSE"]
    for folder, space in zip(folders, ("w++", "w", "w+"), strict=True):
        originals, images = (
            np.stack([np.asarray(read_image(path), float) for path in sorted((folder / kind).iterdir())]) / 127.5
            for kind in ("origin", "project")
        )
        mse = np.square(originals - images).mean((1, 2, 3))
        assert float(rows[1][f"{space}_mean"]) == pytest.approx(mse.mean(), rel=1e-4)
        assert float(rows[1][f"{space}_std"]) == pytest.approx(mse.std(), rel=1e-2)
    Image.new("RGB", (40, 40), (200, 0, 0)).save(photos / "face 02.png")
    table(*folders[:2], project("w", "w+", tmp_path / "changed"), expect=1)
    assert f"face 02.png is another image in {folders[0]} than in {tmp_path / 'changed'}" in capsys.readouterr().err
