"""common/images.py: every kind of image is read rightly or refused in one sentence; conversions are exact."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from common import images
from common.grids import make_grid, make_strip, save_grid, similarity_figure
from common.images import (
    ImageError,
    check_header,
    fit_image,
    list_images,
    read_image,
    reading_losses,
    save_image,
    to_pil,
    to_tensor,
    to_uint8,
)
from common.video import save_video

ROOT = Path(__file__).parents[2]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def corners():
    """8x4, each quarter another colour: shows any turn or flip."""
    array = np.zeros((4, 8, 3), np.uint8)
    array[:2, :4], array[:2, 4:], array[2:, :4], array[2:, 4:] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(array)


def palette(transparency=None):
    image = Image.new("P", (4, 4))
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    image.putdata([0, 1] * 8)
    return encode(image, **({} if transparency is None else {"transparency": transparency}))


def rgba(colour, alpha):
    return Image.new("RGBA", (4, 4), (*colour, alpha))


def grey16(value):
    return Image.fromarray(np.full((4, 4), value, np.uint16))


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width, height, depth, colour_type, rows):
    """A PNG of kinds that Pillow reads and cannot write."""
    header = png_chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def png16(colour_type, *channels):
    return raw_png(1, 1, 16, colour_type, b"\0" + struct.pack(f">{len(channels)}H", *channels))


# name, encoded bytes, expected colour of pixel (0, 0)
MODES = [
    ("rgb png", encode(Image.new("RGB", (4, 4), (10, 20, 30))), (10, 20, 30)),
    ("rgb jpeg", encode(Image.new("RGB", (8, 8), RED), "JPEG", quality=100, subsampling=0), (254, 0, 0)),
    ("rgb webp", encode(Image.new("RGB", (4, 4), (10, 20, 30)), "WEBP", lossless=True), (10, 20, 30)),
    ("rgb tiff", encode(Image.new("RGB", (4, 4), (10, 20, 30)), "TIFF"), (10, 20, 30)),
    ("rgb bmp", encode(Image.new("RGB", (4, 4), (10, 20, 30)), "BMP"), (10, 20, 30)),
    ("rgba opaque", encode(rgba(RED, 255)), RED),
    ("rgba clear hides its colour", encode(rgba(RED, 0)), WHITE),
    ("rgba half", encode(rgba(BLACK, 128)), (127, 127, 127)),
    ("rgb with a transparent colour", encode(Image.new("RGB", (4, 4), RED), transparency=RED), WHITE),
    ("palette", palette(), RED),
    ("palette with a transparent entry", palette(0), WHITE),
    ("palette with alphas", palette(bytes([0, 255])), WHITE),
    ("gif", encode(Image.new("RGB", (4, 4), BLUE).convert("P"), "GIF"), BLUE),
    ("grey", encode(Image.new("L", (4, 4), 77)), (77, 77, 77)),
    ("grey jpeg", encode(Image.new("L", (8, 8), 77), "JPEG"), (77, 77, 77)),
    ("grey with a transparent value", encode(Image.new("L", (4, 4), 77), transparency=77), WHITE),
    ("grey and alpha", encode(Image.new("LA", (4, 4), (77, 0))), WHITE),
    ("grey and alpha, opaque", encode(Image.new("LA", (4, 4), (77, 255))), (77, 77, 77)),
    ("1 bit", encode(Image.new("1", (4, 4), 1)), WHITE),
    ("1 bit black", encode(Image.new("1", (4, 4), 0)), BLACK),
    ("cmyk tiff", encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), RED),
    ("cmyk jpeg", encode(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"), BLACK),
    ("16-bit grey png", encode(grey16(257 * 100)), (100, 100, 100)),
    ("16-bit grey png, brightest", encode(grey16(65535)), WHITE),
    ("16-bit grey tiff", encode(grey16(257 * 100), "TIFF"), (100, 100, 100)),
    ("16-bit rgb png", png16(2, 257 * 10, 257 * 20, 257 * 30), (10, 20, 30)),
    ("16-bit rgba png", png16(6, 257 * 10, 257 * 20, 257 * 30, 0), WHITE),
    ("16-bit grey and alpha png", png16(4, 257 * 10, 65535), (10, 10, 10)),
    ("16-bit pgm", b"P5 2 2 65535\n" + struct.pack(">4H", *[257 * 100] * 4), (100, 100, 100)),
    # compressed: Pillow 12 cannot read the raw YCbCr that it writes
    ("YCbCr tiff", encode(Image.new("YCbCr", (4, 4), (128, 128, 128)), "TIFF", compression="tiff_lzw"), (128,) * 3),
]


@pytest.mark.parametrize(("data", "expected"), [m[1:] for m in MODES], ids=[m[0] for m in MODES])
def test_modes(data, expected):
    image = read_image(data)
    assert image.mode == "RGB"
    assert not image.info
    assert np.abs(np.subtract(image.getpixel((0, 0)), expected)).max() <= 1


def test_background_is_the_callers():
    assert read_image(encode(rgba(RED, 0)), background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    half = read_image(encode(rgba((200, 0, 0), 128)), background=BLACK).getpixel((0, 0))
    assert half == (100, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, image_format):
    # EXIF 2.32, tag 0x0112: how the stored image was made from the upright one, undone by reading
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the Image.Transpose that stores it
    upright = corners()
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(image_format, {})
    image = read_image(encode(stored, image_format, exif=exif, **lossless))
    assert image.size == upright.size
    assert np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 8


def test_damaged_exif_is_ignored():
    data = encode(corners(), "PNG", exif=b"Exif\0\0" + b"\xff" * 20)
    assert np.array_equal(read_image(data), corners())


def swapped_profile():
    """An ICC profile whose red is sRGB's green and whose green is sRGB's red."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "tRGB".encode("utf-16-be"))  # else it passes for sRGB
    head, table = profile[:132], profile[132:]
    table = table.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
    return head + table


def test_icc_srgb_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), np.uint8))
    assert np.array_equal(read_image(encode(noise, icc_profile=profile)), noise)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_icc_is_converted(mode):
    image = Image.new("RGB", (8, 8), (200, 30, 60)).convert(mode)
    colour = read_image(encode(image, icc_profile=swapped_profile())).getpixel((0, 0))
    assert np.abs(np.subtract(colour, (30, 200, 60))).max() <= 2


LAB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize("profile", [b"not a profile", b"", LAB_PROFILE], ids=["text", "empty", "lab"])
def test_unusable_icc_is_ignored(profile):
    assert read_image(encode(Image.new("RGB", (4, 4), (1, 2, 3)), icc_profile=profile)).getpixel((0, 0)) == (1, 2, 3)


def noise(size=64, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3), np.uint8))


def half(image_format):
    data = encode(noise(), image_format)
    return data[: len(data) // 2]


BAD = [
    ("truncated.jpg", half("JPEG"), "truncated"),
    ("truncated.png", half("PNG"), None),
    ("truncated.webp", half("WEBP"), None),
    ("truncated.bmp", half("BMP"), None),
    ("truncated.tif", half("TIFF"), None),
    ("truncated.gif", half("GIF"), None),
    ("empty.png", b"", "empty"),
    ("text.png", b"hello, this is text\n", "not in a known image format"),
    ("page.jpg", b"<!DOCTYPE html><html></html>", "not in a known image format"),
    ("bomb.png", raw_png(30000, 30000, 8, 2, b"\0"), "megapixels"),
    ("float.tif", encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "float"),
    ("int32.tif", encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "16 bits"),
]


@pytest.mark.parametrize(("name", "data", "reason"), BAD, ids=[b[0] for b in BAD])
def test_bad_files_are_refused_by_name(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError):
        read_image(data)


def test_absent_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError):
        read_image(tmp_path)


def test_check_header(tmp_path):
    for name, data in [("good.png", encode(noise())), ("text.png", b"text"), ("empty.png", b"")]:
        (tmp_path / name).write_bytes(data)
    assert check_header(tmp_path / "good.png") is None
    assert "known image format" in check_header(tmp_path / "text.png")
    assert "empty" in check_header(tmp_path / "empty.png")
    assert check_header(tmp_path / "nowhere.png")


def test_list_images(tmp_path):
    for name in ["b.PNG", "a/deep/ü 中文 .jpeg", "a.webp", ".hidden.png", ".cache/x.png", "notes.txt", "a/x.JPG"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    names = [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)]
    assert names == ["a.webp", "a/deep/ü 中文 .jpeg", "a/x.JPG", "b.PNG"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        list_images(tmp_path / "b.PNG")


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
    images = [noise(48, seed) for seed in range(3)]
    strip = make_strip(images, ["-1.0", "0", "a caption much too long for its cell"])
    assert strip.width == 3 * 48 + 4 and strip.height > 48
    assert np.array_equal(np.asarray(strip)[:48, :48], images[0])
    below = np.asarray(strip.convert("L"))[48:]
    assert all((below[:, left : left + 48] < 100).any() for left in (0, 50, 100))  # each has ink
    assert (below[:, 48:50] == 255).all() and (below[:, 98:100] == 255).all()  # and keeps to its cell
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


def test_heic_without_its_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._register_heif.cache_clear()
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))  # as some phones' exports are named
    assert "pip install pillow-heif" in check_header(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="a.jpg cannot be read.*pip install pillow-heif"):
        read_image(tmp_path / "a.jpg")
    images._register_heif.cache_clear()


# -- what would stop or harm the reader ----------------------------------------------------------------------------


def test_entries_that_are_no_files_are_listed_and_refused(tmp_path):
    """Nothing is filtered before it is counted: a reader reports what it cannot read."""
    (tmp_path / "good.png").write_bytes(encode(noise()))
    (tmp_path / "dangling.png").symlink_to("gone.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    found = {path.name: check_header(path) for path in list_images(tmp_path)}
    assert list(found) == ["dangling.png", "good.png", "loop.png", "pipe.png", "zero.png"]
    assert found.pop("good.png") is None
    assert found["dangling.png"] == "is a link to gone.png, which does not exist"
    assert "pipe" in found["pipe.png"] and "device" in found["zero.png"] and "symbolic" in found["loop.png"]
    for name, reason in found.items():
        with pytest.raises(ImageError, match=f"{name} cannot be read as an image: {reason}"):
            read_image(tmp_path / name)


def test_a_folder_that_may_not_be_opened_is_listed(tmp_path):
    program = """
import os, sys
from common.images import check_header, list_images
check_header(sys.argv[1] + "/a.png")
if os.getuid() == 0:
    os.setuid(65534)
for path in list_images(sys.argv[1]):
    print(path.name, check_header(path))
"""
    tmp_path.chmod(0o755)
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        if parent.stat().st_uid == os.getuid() and len(parent.parts) > 2:
            parent.chmod(0o755)
    (tmp_path / "a.png").write_bytes(encode(noise()))
    (tmp_path / "locked").mkdir(mode=0o000)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "a.png None\nlocked Permission denied\n", done.stderr


def test_whatever_a_decoder_raises_is_an_image_error(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encode(noise()))
    for error in (RuntimeError("Failed to decode image"), MemoryError(), AttributeError("x"), RecursionError()):

        def load(self, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "load", load)
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
        with pytest.raises(ImageError, match="a.png cannot be read"):
            read_image(tmp_path / "a.png")


def test_postscript_never_reaches_ghostscript(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: pytest.fail("a program was started"))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    for name in ("a.eps", "a.jpg"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match="not in a known image format"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError):
        read_image(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_just_below_the_limit_needs_less_than_a_gigabyte(mode):
    """A small file of 109 megapixels: more than any camera's but the largest phones'."""
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    program = f"""
import io, resource, struct, zlib
import numpy as np
from common.images import ImageError, read_image
def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
def png(width, height):
    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(b"\\0" + bytes({channels} * width)) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, {dict(RGB=2, RGBA=6, L=0)[mode]}, 0, 0, 0)
    return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
read_image(png(64, 64))
data = png(11000, 9900)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = read_image(data)
print(image.size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    size, _, megabytes = done.stdout.strip().rpartition(" ")
    assert size == "(11000, 9900)" and int(megabytes) < 1000, (done.stdout, done.stderr)


def test_what_reading_leaves_out_is_told(tmp_path):
    frames = [noise(8, seed) for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    grey16(40000).save(tmp_path / "grey.png")
    (tmp_path / "rgb16.png").write_bytes(raw_png(4, 4, 16, 2, bytes(4 * (1 + 24))))
    noise(8).save(tmp_path / "plain.jpg")
    assert {path.name: reading_losses(path) for path in list_images(tmp_path)} == {
        "a.gif": ["only the first of its 3 frames"],
        "a.tif": ["only the first of its 3 pages"],
        "grey.png": ["8 of its 16 bits per channel"],
        "rgb16.png": ["8 of its 16 bits per channel"],
        "plain.jpg": [],
    }


def test_alpha_is_kept_where_it_is_asked_for():
    image = read_image(encode(rgba((200, 10, 20), 128)), background=None)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (200, 10, 20, 128)
    assert read_image(encode(noise(4)), background=None).mode == "RGB"
    assert read_image(palette(transparency=0), background=None).mode == "RGBA"


# -- what would leave half a file ----------------------------------------------------------------------------------

FULL = """
import resource, sys
import numpy as np
from common.images import save_image
from common.video import save_video
frames = [np.random.RandomState(i).randint(0, 256, (128, 128, 3), np.uint8) for i in range(20)]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    save_image(frames[0], sys.argv[1]) if sys.argv[1].endswith("png") else save_video(frames, sys.argv[1])
except OSError as error:
    print(error.filename, error.strerror, sep="|")
"""


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.webp", "a.mp4"])
def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, name):
    if name == "a.mp4":
        pytest.importorskip("imageio_ffmpeg", reason="the package imageio[ffmpeg] is not installed")
    path = tmp_path / name
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"{path}|could not be written: "), (done.stdout, done.stderr)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [name]


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


@pytest.mark.parametrize(("suffix", "fps"), [(".gif", 51), (".gif", 0), (".mp4", 0), (".mp4", -1), (".webp", np.nan)])
def test_a_rate_that_cannot_be_is_refused(tmp_path, suffix, fps):
    with pytest.raises(ValueError, match="frames per second"):
        save_video([noise(8)], tmp_path / f"a{suffix}", fps=fps)
    assert not list(tmp_path.iterdir())
