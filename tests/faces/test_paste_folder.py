"""Pasting back, the command: edited faces go into their photos, and nothing of a photo is lost."""

import io
import json
import shutil

import pytest
from aligning import align_cli
from PIL import Image, ImageCms
from points import ASTRONAUT, difference

import align_faces
from common.cli import run
from common.images import read_image, reading_losses
from common.lock import lock_folder
from faces.paste import save_like
from sampling.render import file_names


def test_paste_back_command(tmp_path, astronaut, no_detector, capsys):
    """A turned JPEG with EXIF and a profile: upright, of the same size, with its EXIF, in its format."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    (folder / "ü").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Ada"  # the camera was turned; artist
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = astronaut.crop((0, 0, 512, 400))
    photo.transpose(Image.Transpose.ROTATE_90).save(
        folder / "ü" / "me.jpg", exif=exif, icc_profile=profile, quality=95, subsampling=0, dpi=(72, 72)
    )
    (folder / "ü" / "me.json").write_text(json.dumps(ASTRONAUT.tolist()))
    photo.save(folder / "other.png")
    (folder / "other.json").write_text(json.dumps(ASTRONAUT.tolist()))
    assert align_cli(folder, out) == 0

    edited = tmp_path / "edited"
    shutil.copytree(out / "aligned", edited)
    Image.new("RGB", (8, 8)).save(edited / "stranger.png")
    flags = ["--photos", str(folder), "--paste_back", str(edited), "--alignment", str(out / "alignment.json")]

    def paste(*more):
        argv = [*flags, "--output_dir", str(tmp_path / "pasted"), *more]
        return run(align_faces.main, align_faces.build_parser(), argv)

    with lock_folder(tmp_path / "pasted", "another run"):
        assert paste() == 1
    assert "pasted is in use: another run" in capsys.readouterr().err and not (tmp_path / "pasted").exists()
    assert paste() == 0
    printed = capsys.readouterr()
    assert "2 faces pasted into 2 photos, 1 left out" in printed.out and "no face called stranger" in printed.err
    with Image.open(tmp_path / "pasted" / "ü" / "me.jpg") as result:
        assert result.format == "JPEG" and result.size == (512, 400)
        assert result.getexif()[0x0112] == 1 and result.getexif()[0x013B] == "Ada"
        assert result.info["icc_profile"] and result.info["dpi"] == (72, 72)
    assert difference(read_image(tmp_path / "pasted" / "ü" / "me.jpg"), photo).mean() < 2
    assert read_image(tmp_path / "pasted" / "other.png").tobytes() == photo.tobytes()

    unedited = tmp_path / "unedited"
    unedited.mkdir()
    for path in edited.glob("other*.png"):  # of the two faces one has a image of before the edit
        drawn = Image.new("RGB", (64, 64), (90, 90, 90))
        drawn.save(unedited / path.name)
        drawn.save(path)
    assert paste("--unedited", str(unedited)) == 0
    printed = capsys.readouterr()
    assert "1 faces pasted into 1 photos, 2 left out" in printed.out and "unedited" in printed.err
    assert read_image(tmp_path / "pasted" / "other.png").tobytes() == photo.tobytes(), "nothing was changed"

    before = (folder / "other.png").read_bytes()
    assert paste("--output_dir", str(folder)) == 2 and "would replace the photo" in capsys.readouterr().err
    assert (folder / "other.png").read_bytes() == before

    (folder / "other.png").unlink()
    assert paste() == 0 and "other.png" in capsys.readouterr().err
    photo.crop((0, 0, 300, 300)).save(folder / "ü" / "me.jpg")
    assert paste() == 1
    assert "no face of" in capsys.readouterr().err


def test_formats_that_cannot_hold_a_photo_become_png(tmp_path, astronaut):
    astronaut.resize((40, 40)).quantize(16).save(tmp_path / "old.gif")
    path = save_like(astronaut, tmp_path / "old.gif", tmp_path / "out" / "old.gif")
    assert path.name == "old.gif.png" and Image.open(io.BytesIO(path.read_bytes())).format == "PNG"


@pytest.mark.parametrize(("mode", "options"), [
    ("L", {}), ("P", {}), ("CMYK", {}), ("LAB", {}), ("I;16", {}), ("1", {"compression": "group4"}),
    ("RGB", {"compression": "jpeg"}), ("RGB", {"big_tiff": True, "tiffinfo": {0x13B: "Ada"}}),
])  # fmt: skip
def test_a_tiff_of_any_layout_is_written_whole(tmp_path, astronaut, mode, options):
    """Its own tags of where pixels lie and what they mean do not go into a file of another layout."""
    small, path = astronaut.resize((40, 30)), tmp_path / "a.tif"
    if mode == "LAB":
        small = ImageCms.profileToProfile(small, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB")
    small = small.convert("L").convert("I;16") if mode == "I;16" else small.convert(mode)
    exif = Image.Exif()
    exif.update({0x10F: "Maker", 0x8769: {0x9003: "2020:01:02 03:04:05"}})
    small.save(path, **(options or {"exif": exif.tobytes()}))
    edited = astronaut.resize((40, 30))
    assert difference(read_image(save_like(edited, path, tmp_path / "out" / "a.tif")), edited).max() == 0
    with Image.open(tmp_path / "out" / "a.tif") as written:
        assert written.getexif().get(0x13B) == options.get("tiffinfo", {}).get(0x13B)
        if not options:
            assert written.getexif()[0x10F] == "Maker"
            assert written.getexif().get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"


def test_a_photo_with_damaged_exif_is_written_without_it(tmp_path, astronaut):
    """A text where a number belongs, which Pillow reads but does not write."""
    exif = Image.Exif()
    exif[0x10F] = "Maker"
    astronaut.save(tmp_path / "a.jpg", exif=exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x28\x00\x02"))
    path = save_like(astronaut, tmp_path / "a.jpg", tmp_path / "out" / "a.jpg")
    assert difference(read_image(path), astronaut).mean() < 3 and "exif" not in Image.open(path).info
    assert reading_losses(tmp_path / "a.jpg") == ["nothing of the damaged EXIF block"]


def test_a_crop_is_found_by_what_latents_call_it(tmp_path, astronaut, no_detector):
    """Latents, and so edited faces, have names that any file system takes."""
    photo = tmp_path / "photos" / "9:30 o'clock?.png"
    photo.parent.mkdir()
    astronaut.save(photo)
    photo.with_suffix(".json").write_text(json.dumps(ASTRONAUT.tolist()))
    assert align_cli(photo.parent, tmp_path / "out") == 0
    (crop,) = (tmp_path / "out" / "aligned").iterdir()
    crop.rename(crop.with_name(f"{file_names([crop.name])[0]}.png"))
    flags = ["--paste_back", crop.parent, "--alignment", tmp_path / "out" / "alignment.json"]
    assert align_cli(photo.parent, tmp_path / "pasted", *flags) == 0
    assert (tmp_path / "pasted" / photo.name).is_file() and not crop.exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "/x"])
@pytest.mark.parametrize("field", ["name", "source"])
def test_no_string_of_an_alignment_leads_out_of_the_folder(photos, tmp_path, capsys, field, name):
    out = tmp_path / "out"
    assert align_cli(photos, out) == 0
    state = json.loads((out / "alignment.json").read_text(encoding="utf-8"))
    state["faces"][0][field] = name
    (out / "alignment.json").write_text(json.dumps(state))
    capsys.readouterr()
    flags = ["--paste_back", out / "aligned", "--alignment", out / "alignment.json"]
    status = align_cli(photos, tmp_path / "pasted", *flags)
    if (field, name) == ("source", "a/b"):
        assert status == 0  # a name in a sub-folder, where there is no photo
    else:
        assert status == 1 and "is no name in a folder of photos" in capsys.readouterr().err


def paste_one(tmp_path, photo, astronaut, edit=True):
    """Paste a face that is edited in its middle back into `photo`; the resulting file."""
    folder, out = photo.parent, tmp_path / "out"
    photo.with_suffix(".json").write_text(json.dumps(ASTRONAUT.tolist()))
    assert align_cli(folder, out) == 0
    face = Image.open(out / "aligned" / f"{photo.stem}.png").convert("RGB")
    if edit:
        face.paste((200, 30, 30), (24, 24, 40, 40))
    face.save(out / "aligned" / f"{photo.stem}.png")
    flags = ["--paste_back", out / "aligned", "--alignment", out / "alignment.json"]
    assert align_cli(folder, tmp_path / "pasted", *flags) == 0
    (result,) = (path for path in (tmp_path / "pasted").iterdir() if path.suffix != ".lock")
    return result


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("edit", [False, True])
def test_pasting_keeps_alpha(tmp_path, astronaut, no_detector, suffix, edit):
    photo = tmp_path / "photos" / f"a{suffix}"
    photo.parent.mkdir()
    image = astronaut.convert("RGBA")
    alpha = Image.linear_gradient("L").resize((512, 512)).rotate(90)  # 0 on one side, 255 on the other
    image.putalpha(alpha)
    image.save(photo, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    with Image.open(paste_one(tmp_path, photo, astronaut, edit)) as result:
        assert result.mode == "RGBA" and result.size == (512, 512)
        assert difference(result.getchannel("A"), alpha).max() == 0
        change = difference(result.convert("RGB"), astronaut).max(-1)
    outside = change[:, 400:]
    assert outside.mean() <= (4 if suffix == ".webp" else 0), "the colours beneath are those of the photo"
    if edit:
        seen = Image.alpha_composite(
            Image.new("RGBA", (512, 512), (255,) * 4), Image.open(tmp_path / "pasted" / photo.name)
        )
        middle = tuple(int(v) for v in ASTRONAUT.mean(0))
        assert seen.getpixel(middle)[0] > seen.getpixel(middle)[1] + 40


def test_what_pasting_cannot_keep_is_said(tmp_path, astronaut, no_detector, capsys):
    photo = tmp_path / "photos" / "a.gif"
    photo.parent.mkdir()
    frames = [astronaut.quantize(64), astronaut.rotate(5).quantize(64), astronaut.rotate(9).quantize(64)]
    frames[0].save(photo, save_all=True, append_images=frames[1:])
    assert paste_one(tmp_path, photo, astronaut).name == "a.gif.png"
    assert "a.gif.png has only the first of its 3 frames" in capsys.readouterr().err
