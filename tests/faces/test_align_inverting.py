"""`--align` of the three inverting scripts: photos in, aligned faces inverted, every photo accounted for."""

import csv
import json
import sys

import pytest
import torch
from PIL import Image
from points import ASTRONAUT
from processes import run_ranks

import align_faces
import edit_conditional
import faces.folder
import projector
from common.cli import run
from common.images import image_size, read_image
from common.latents import load_latents
from common.lock import lock_folder
from faces.align import crop_aligned, read_alignment
from model import Generator
from pSp.scripts import inference

pytestmark = pytest.mark.usefixtures("undrawn")

SIZE = 128  # of the bundled models
BUNDLED = "checkpoints/face-{}-128.safetensors"
COMMON = "--device cpu --identity none --perceptual scorer:face-scorer --step 2 --mean_samples 20".split()
PSP = "--lpips_net scorer:face-scorer --id_net none --test_workers 0 --device cpu".split()


@pytest.fixture
def photos(tmp_path, astronaut, no_detector):
    """Two photos with a face, whose points are given by hand, and one without."""
    folder = tmp_path / "pho tos"
    (folder / "a b").mkdir(parents=True)
    for name in ("ü 中文.png", "a b/two.png"):
        astronaut.save(folder / name)
        points = json.dumps({"landmarks": ASTRONAUT.tolist()})
        (folder / name).with_suffix(".json").write_text(points, encoding="utf-8")
    Image.new("RGB", (60, 50)).save(folder / "nobody.png")
    return folder


@pytest.fixture
def invert(root, monkeypatch):
    monkeypatch.chdir(root)

    def invert(script, sources, out, *flags):
        """Status of a script, pSp's under the flags of the others."""
        sources = [str(source) for source in sources]
        argv = {
            projector: ["--ckpt", BUNDLED.format("wpp"), "--dataset", *sources, "--output_dir", out, *COMMON],
            edit_conditional: ["--ckpt", BUNDLED.format("cgan"), "--source", *sources, "--output_dir", out, *COMMON],
            inference: ["--checkpoint_path", BUNDLED.format("psp"), "--data_path", *sources, "--exp_dir", out, *PSP],
        }[script]
        return run(script.main, script.build_parser(), [str(arg) for arg in [*argv, *flags]])

    return invert


def skipped(folder):
    with open(folder / "skipped.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.parametrize("script", [projector, inference, edit_conditional], ids=lambda script: script.__name__)
def test_photos_are_aligned_first(script, invert, photos, tmp_path, astronaut, capfd):
    out = tmp_path / "öut"
    flags = ["--set", "smile=1"] if script is edit_conditional else []
    assert invert(script, [photos], out, "--align", "auto", *flags) == 0
    assert "warning" not in capfd.readouterr().err
    results = out / "inverted" if script is edit_conditional else out
    saved = load_latents(results)
    assert saved.names == ["two.png", "ü 中文.png"] and skipped(results) == [["nobody.png", "no face"]]
    alignments = read_alignment(out / "alignment.json")
    assert [face["source"] for face in saved.alignment] == ["a b/two.png", "ü 中文.png"]
    crop = read_image(out / "aligned" / "two.png")
    assert crop.tobytes() == crop_aligned(astronaut, alignments["two"]).tobytes() and crop.size[0] >= SIZE

    edited = tmp_path / "edited"
    edited.mkdir()
    crop.save(edited / "two.png")
    argv = ["--paste_back", edited, "--alignment", out / "alignment.json", "--photos", photos]
    argv += ["--output_dir", tmp_path / "pasted"]
    assert run(align_faces.main, align_faces.build_parser(), [str(arg) for arg in argv]) == 0
    assert image_size(tmp_path / "pasted" / "a b" / "two.png") == astronaut.size

    done = [path.stat().st_mtime_ns for path in sorted((out / "aligned").iterdir())]
    assert invert(script, [photos], out, "--align", "auto", *flags) == 0
    assert [path.stat().st_mtime_ns for path in sorted((out / "aligned").iterdir())] == done, "a second start continues"


@pytest.mark.parametrize("script", [projector, inference, edit_conditional], ids=lambda script: script.__name__)
def test_a_folder_in_use_is_refused_before_photos_are_aligned(script, invert, photos, tmp_path, capfd):
    out = tmp_path / "out"
    flags = ["--set", "smile=1"] if script is edit_conditional else []
    with lock_folder(out / "inference_results" if script is inference else out, "another run"):
        assert invert(script, [photos], out, "--align", "auto", *flags) == 1
    assert "is in use: another run" in capfd.readouterr().err and not (out / "aligned").exists()


def test_the_order_of_the_photos_stays(invert, photos, tmp_path):
    """Pairs, and the latents of a bare .npy, go by position: given order, a photo as often as it is given."""
    out, two, other = tmp_path / "out", photos / "a b" / "two.png", photos / "ü 中文.png"
    assert invert(projector, [other, two, other], out, "--align", "auto") == 0
    assert [face["source"] for face in load_latents(out).alignment] == ["ü 中文.png", "a b/two.png", "ü 中文.png"]


def test_crops_are_left_alone_beside_new_photos(invert, photos, tmp_path, capfd):
    home = tmp_path / "faces"
    argv = ["--photos", photos, "--output_dir", home, "--size", 256]
    assert run(align_faces.main, align_faces.build_parser(), [str(arg) for arg in argv]) == 0
    out = tmp_path / "out"
    assert invert(projector, [home / "aligned", photos / "a b" / "two.png"], out, "--align", "auto") == 0
    assert load_latents(out).names == ["two.png", "ü 中文.png", "two.png (2)"]
    assert [path.name for path in (out / "aligned").iterdir()] == ["two.png"], "the crops were not aligned again"
    assert invert(projector, [home / "aligned", photos / "nobody.png"], tmp_path / "none", "--align", "auto") == 0
    assert len(load_latents(tmp_path / "none").names) == 2 and len(skipped(tmp_path / "none")) == 1


def test_results_above_the_photos(invert, photos):
    assert invert(projector, [photos], photos.parent, "--align", "auto") == 0
    assert invert(projector, [photos], photos, "--align", "auto") == 0
    assert load_latents(photos).names == ["two.png", "ü 中文.png"]


def test_references_are_aligned_too(invert, photos, tmp_path, capfd):
    out = tmp_path / "out"
    flags = ["--align", "auto", "--reference", photos]
    assert invert(edit_conditional, [photos / "ü 中文.png"], out, *flags) == 0
    assert sorted(path.name for path in (out / "references" / "aligned").iterdir()) == ["two.png", "ü 中文.png"]
    assert skipped(out / "references") == [["nobody.png", "no face"]]
    capfd.readouterr()
    assert invert(edit_conditional, [photos], tmp_path / "pairs", *flags, "--paired") == 1
    assert "--paired: nobody.png cannot take part (no face)" in capfd.readouterr().err


def test_single_photos_of_several_folders(invert, photos, tmp_path):
    out = tmp_path / "out"
    assert invert(projector, [photos / "ü 中文.png", photos / "a b"], out, "--align", "auto") == 0
    sources = [face.source for face in read_alignment(out / "alignment.json").values()]
    assert sources == ["a b/two.png", "ü 中文.png"], "relative to what they have in common"


@pytest.mark.parametrize("align", ["auto", "off"])
def test_aligned_faces_are_left_alone(invert, photos, tmp_path, capfd, align):
    """Crops that alignment.json tells of, in spite of their size."""
    home = tmp_path / "faces"
    argv = ["--photos", photos, "--output_dir", home, "--size", 256]
    assert run(align_faces.main, align_faces.build_parser(), [str(arg) for arg in argv]) == 0
    assert invert(projector, [home / "aligned"], tmp_path / "out", "--align", align) == 0
    assert not (tmp_path / "out" / "aligned").exists() and "warning" not in capfd.readouterr().err
    assert load_latents(tmp_path / "out").alignment[0]["source"] == "a b/two.png"


def test_raw_photos_are_worth_a_warning(invert, photos, tmp_path, capfd):
    assert invert(projector, [photos / "a b" / "two.png"], tmp_path / "large") == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert "two.png has 512x512 pixels" in line and "--align auto" in line and "align_faces.py" in line
    assert invert(projector, [photos / "nobody.png"], tmp_path / "oblong") == 0
    assert "nobody.png has 60x50 pixels" in capfd.readouterr().err
    Image.new("RGB", (128, 128)).save(tmp_path / "square.png")
    assert invert(projector, [tmp_path / "square.png"], tmp_path / "square") == 0
    assert "warning" not in capfd.readouterr().err
    assert not list(tmp_path.glob("*/aligned"))


def test_an_lmdb_holds_no_photos(invert, face_lmdb, tmp_path, tiny_config, capfd):
    torch.save({"g_ema": Generator(tiny_config).state_dict(), "config": tiny_config.to_dict()}, tmp_path / "g.pt")
    flags = ["--ckpt", tmp_path / "g.pt", "--align", "auto"]
    assert invert(projector, [face_lmdb], tmp_path / "out", *flags) == 0
    assert not (tmp_path / "out" / "aligned").exists() and "warning" not in capfd.readouterr().err


def test_no_face_and_no_detector(invert, photos, tmp_path, capfd, monkeypatch):
    assert invert(projector, [photos / "nobody.png"], tmp_path / "out", "--align", "auto") == 1
    assert "none of 1 photos gave a face (1 no face)" in capfd.readouterr().err
    monkeypatch.setattr(faces.folder, "FaceDetector", absent)
    faces.folder._detector.cache_clear()
    assert invert(projector, [photos / "nobody.png"], tmp_path / "other", "--align", "auto") == 1
    assert "get yunet_640" in capfd.readouterr().err


def absent(*args, **kwargs):
    raise FileNotFoundError("yunet_n_640_640.onnx is not here: run `python -m common.weights get yunet_640`")


@pytest.mark.slow
def test_two_processes_share_the_photos(photos, tmp_path, root):
    (photos / "nobody.png").unlink()  # its workers have no replacement of the detector
    command = [sys.executable, "projector.py", "--ckpt", BUNDLED.format("wpp"), "--dataset", photos, *COMMON]
    run_ranks([*command, "--output_dir", tmp_path / "two", "--align", "auto"], cwd=root)
    assert load_latents(tmp_path / "two").names == ["two.png", "ü 中文.png"]
