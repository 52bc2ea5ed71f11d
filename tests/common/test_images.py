"""common/images.py: every kind of image is read rightly or refused in one sentence."""

import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from encoded import BLACK, BLUE, RED, ROOT, WHITE, corners, encode, grey16, noise, palette, png16, raw_png, rgba
from PIL import Image, ImageCms

from common import images
from common.images import ImageError, check_header, list_images, read_image, reading_losses

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


def test_heic_without_its_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._register_heif.cache_clear()
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))  # as some phones' exports are named
    assert "pip install pillow-heif" in check_header(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="a.jpg cannot be read.*pip install pillow-heif"):
        read_image(tmp_path / "a.jpg")
    images._register_heif.cache_clear()


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


def test_a_folder_that_may_not_be_opened_is_listed():
    program = """
import os, sys
from common.images import check_header, list_images
check_header(sys.argv[1] + "/a.png")
if os.getuid() == 0:
    os.setuid(65534)
for path in list_images(sys.argv[1]):
    print(path.name, check_header(path))
"""
    with tempfile.TemporaryDirectory() as folder:  # pytest closes the parents of tmp_path to other users
        os.chmod(folder, 0o755)
        Path(folder, "a.png").write_bytes(encode(noise()))
        Path(folder, "locked").mkdir(mode=0o000)
        done = subprocess.run([sys.executable, "-c", program, folder], cwd=ROOT, capture_output=True, text=True)
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells a process's own peak of memory")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_just_below_the_limit_needs_less_than_a_gigabyte(mode):
    """A small file of 109 megapixels: more than any camera's but the largest phones'."""
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    program = f"""
import re, struct, zlib
from pathlib import Path
from common.images import read_image
def peak():  # the process's own, while ru_maxrss begins at that of the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
def png(width, height):
    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(b"\\0" + bytes({channels} * width)) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, {dict(RGB=2, RGBA=6, L=0)[mode]}, 0, 0, 0)
    return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
read_image(png(64, 64))
data = png(11000, 9900)
before = peak()
image = read_image(data)
print(image.size, (peak() - before) // 1024)
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
