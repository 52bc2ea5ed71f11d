"""common/images.py, grids.py and video.py: images fitted, converted exactly, set side by side and written whole."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from encoded import BLUE, GREEN, RED, ROOT, noise
from PIL import Image

from common.grids import make_grid, make_strip, save_grid, similarity_figure
from common.images import fit_image, read_image, save_image, to_pil, to_tensor, to_uint8
from common.video import save_video


@pytest.mark.parametrize("size", [(3, 5000), (5000, 3), (1, 1), (10, 7), (64, 64)])
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_fit_any_aspect(size, fit):
    assert fit_image(Image.new("RGB", size, RED), 32, fit=fit).size == (32, 32)


def test_fit_means_what_it_says():
    wide = Image.new("RGB", (96, 32), GREEN)
    wide.paste(Image.new("RGB", (32, 32), RED), (32, 0))
    assert fit_image(wide, 32, fit="crop").getcolors() == [(32 * 32, RED)]
    squashed = fit_image(wide, 30, fit="squash", resample="nearest")
    assert squashed.getpixel((2, 15)) == GREEN and squashed.getpixel((15, 15)) == RED
    padded = fit_image(wide, 96, fit="pad", background=BLUE)
    assert padded.getpixel((48, 5)) == BLUE and padded.getpixel((48, 48)) == RED and padded.getpixel((5, 48)) == GREEN
    same = noise(32)
    assert fit_image(same, 32) is same
    with pytest.raises(ValueError, match="crop, pad, squash"):
        fit_image(same, 16, fit="stretch")
    with pytest.raises(ValueError, match="lanczos"):
        fit_image(same, 16, resample="sharp")


def test_resample_names_are_pillows():
    image = noise(40)
    for name, method in [("lanczos", 1), ("bilinear", 2), ("bicubic", 3), ("box", 4), ("area", 4), ("hamming", 5)]:
        assert np.array_equal(fit_image(image, 16, resample=name), image.resize((16, 16), Image.Resampling(method)))


def test_round_trip_is_exact_and_leaves_the_tensor_alone():
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor(array)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    before = tensor.clone()
    assert np.array_equal(to_uint8(tensor), array)
    assert torch.equal(tensor, before)
    assert np.array_equal(to_uint8(tensor.double()), array)
    assert np.array_equal(to_uint8(tensor[None, None]), array[None, None])
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]


def test_to_tensor_of_pil_and_grey():
    assert torch.equal(to_tensor(noise(8)), to_tensor(np.asarray(noise(8))))
    assert to_tensor(np.zeros((4, 5), np.uint8)).shape == (3, 4, 5)
    with pytest.raises(TypeError, match="float64"):
        to_tensor(np.zeros((4, 4, 3)))


def test_grid():
    images = torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 0.0, 1.0)])
    grid = make_grid(images, nrow=2, padding=2)
    assert grid.shape == (10, 10, 3) and grid.dtype == np.uint8
    assert grid[0, 0].tolist() == [0, 0, 0] and grid[6, 0].tolist() == [255, 255, 255]
    assert (grid[4:6] == 255).all() and (grid[:, 4:6] == 255).all() and (grid[6:, 6:] == 255).all()
    assert make_grid(images, nrow=8).shape == (4, 16, 3)
    with pytest.raises(ValueError, match="at least one"):
        make_grid([])
    with pytest.raises(ValueError, match="one size"):
        make_grid([noise(4), noise(5)])


def test_strip_and_captions():
    images = [noise(64, seed) for seed in range(3)]  # shown twice as large, so that the captions have room
    strip = make_strip(images, ["-1.0", "0", "a caption much too long for its cell"])
    assert strip.width == 3 * 128 + 4 and strip.height > 128
    assert np.array_equal(np.asarray(strip)[:128:2, 1:128:2], images[0])
    below = np.asarray(strip.convert("L"))[128:]
    assert all((below[:, left : left + 128] < 100).any() for left in (0, 130, 260))  # each has ink
    assert (below[:, 128:130] == 255).all() and (below[:, 258:260] == 255).all()  # and keeps to its cell
    with pytest.raises(ValueError):
        make_strip(images, ["a", "b"])


def test_attention_maps_share_one_scale():
    maps = torch.zeros(2, 3, 5, 5)
    maps[0, 0], maps[1, 2] = 1.0, torch.eye(5)
    figure = np.asarray(similarity_figure(maps))
    high, low = (np.abs(figure.astype(int) - colour).sum(-1) < 12 for colour in ((253, 231, 37), (68, 1, 84)))
    top, bottom = figure.shape[0] // 2, figure.shape[1] * 2 // 3
    assert high[:top, : bottom // 2].sum() > 20 * high[:top, bottom // 2 : bottom].sum()  # the whole first map
    assert 0.1 < high[top:, bottom // 2 : bottom].mean() / max(low[top:, bottom // 2 : bottom].mean(), 1e-9) + 0.2
    assert similarity_figure(torch.full((1, 1, 2, 2), 3.0)).size  # a constant has a colour, too


def test_save_image(tmp_path):
    tensor = to_tensor(noise(16))
    saved = save_image(tensor, tmp_path / "new" / "ü 中文 .png")
    assert np.array_equal(read_image(saved), noise(16))
    save_image(np.asarray(noise(16)), tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # 4:4:4
    save_image(noise(16), tmp_path / "a.webp")
    save_grid(tensor[None], tmp_path / "grid.png")
    with pytest.raises(ValueError, match="suffix"):
        save_image(tensor, tmp_path / "a.unknown")
    with pytest.raises(TypeError):
        to_pil(np.zeros((4, 4, 3)))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_save_video(tmp_path, suffix):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg", reason="the package imageio[ffmpeg] is not installed")
    frames = (Image.new("RGB", (33, 31), (40 * i, 0, 0)) for i in range(5))  # odd sides, and a generator
    path = save_video(frames, tmp_path / f"new/film{suffix}", fps=10)
    if suffix == ".mp4":
        import imageio.v2 as imageio

        with imageio.get_reader(path) as reader:
            assert reader.count_frames() == 5
            assert reader.get_data(0).shape == (30, 32, 3)
    else:
        with Image.open(path) as image:
            assert image.n_frames == 5 and image.size == (33, 31)


def test_save_video_refuses(tmp_path):
    with pytest.raises(ValueError, match="avi"):
        save_video([noise(8)], tmp_path / "a.avi")
    with pytest.raises(ValueError, match="at least one frame"):
        save_video([], tmp_path / "a.gif")


def test_mp4_without_imageio_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match="pip install"):
        save_video([noise(8)], tmp_path / "a.mp4")


FULL = """
import resource, sys
import numpy as np
from common.images import save_image
from common.video import save_video
side = int(sys.argv[2])
frames = [np.random.RandomState(i).randint(0, 256, (side, side, 3), np.uint8) for i in range(5120 // side)]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    save_image(frames[0], sys.argv[1]) if sys.argv[1].endswith("png") else save_video(frames, sys.argv[1])
except OSError as error:
    print(error.filename, error.strerror, sep="|")
"""


@pytest.mark.parametrize(
    ("name", "side"), [("a.png", 128), ("a.gif", 128), ("a.webp", 128), ("a.mp4", 128), ("a.mp4", 33)]
)
def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, name, side):
    if name == "a.mp4":
        pytest.importorskip("imageio_ffmpeg", reason="the package imageio[ffmpeg] is not installed")
    path = tmp_path / name
    path.write_bytes(b"old")
    command = [sys.executable, "-c", FULL, str(path), str(side)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"{path}|could not be written: "), (done.stdout, done.stderr)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("size", [33, 128])  # a frame that stays in the pipe's buffer, and one that does not
def test_an_ffmpeg_that_gives_up_is_an_error(tmp_path, monkeypatch, size):
    stand_in = tmp_path / "ffmpeg"
    stand_in.write_text("#!/bin/sh\necho no such codec >&2\nexit 1\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr("common.video._ffmpeg", lambda: str(stand_in))
    with pytest.raises(OSError, match="no such codec") as caught:
        save_video((noise(size, seed) for seed in range(40)), tmp_path / "a.mp4")
    assert caught.value.filename == str(tmp_path / "a.mp4") and os.listdir(tmp_path) == ["ffmpeg"]


@pytest.mark.parametrize(("suffix", "step"), [(".gif", 10), (".webp", 1)])
@pytest.mark.parametrize("fps", [3, 24, 25, 30, 33.3, 50])
def test_an_animation_plays_at_its_rate(tmp_path, suffix, step, fps):
    path = save_video([noise(8, seed) for seed in range(61)], tmp_path / f"a{suffix}", fps=fps)
    shown = []
    with Image.open(path) as image:
        for frame in range(61):
            image.seek(frame)
            image.load()
            shown.append(image.info["duration"])
    assert abs(sum(shown) - 61 * 1000 / fps) <= step / 2 + 1e-6, shown
    assert max(shown) - min(shown) <= step


@pytest.mark.parametrize(
    ("suffix", "fps"), [(".gif", 51), (".gif", 0), (".gif", 1e-3), (".mp4", 0), (".mp4", -1), (".webp", np.nan)]
)
def test_a_rate_that_cannot_be_is_refused(tmp_path, suffix, fps):
    with pytest.raises(ValueError, match="frames per second"):
        save_video([noise(8)], tmp_path / f"a{suffix}", fps=fps)
    assert not list(tmp_path.iterdir())
