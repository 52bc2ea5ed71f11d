"""The demo page: its work without a browser (photo to code to edit to photo, the commands that do the same, refusals),
what its server gives away, one visit in headless Chromium. The scorer of these tests sees brightness and redness."""

import ast
import importlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import NoBrowserError, Visitor
from PIL import Image

import demo
import demo_page
import edit_attribute
from common.cli import run
from common.images import read_image, save_image
from common.latents import load_latents
from common.perceptual import build_perceptual, perceptual_or_none
from common.weights import find
from editing.boundary import fit_boundary
from editing.commands import command_lines, save_results
from editing.refinement import MOST_STEPS, Refinement
from editing.samples import SampledCodes
from editing.session import (
    REACH,
    Edit,
    SessionError,
    draw_face,
    find_boundaries,
    invert,
    load_tools,
    paste,
    read_out,
    render_edit,
    take_photo,
    transfer_smile,
)
from faces.labels import Attribute
from faces.scorer import AttributeScorer, require_images
from pSp.psp import load_psp
from rendering import noise_maps, render

ROOT = Path(__file__).resolve().parents[1]
CKPT = ROOT / "checkpoints" / "face-wpp-32.safetensors"
ENCODER = ROOT / "checkpoints" / "face-psp-32.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # of pandas, in gradio's queue
POINTS = [[203.8, 103.3], [246.5, 104.9], [224.1, 129.4], [204.0, 143.4], [242.5, 144.9]]  # of the astronaut


class ColourScorer(AttributeScorer):
    attributes = (Attribute("age", "years"), Attribute("smile", "value"))

    def margins(self, images):
        images = require_images(images)
        redness = images[:, 0] - images[:, 1:].mean(1)
        return torch.stack([50 + 40 * images.mean((1, 2, 3)), redness.mean((1, 2))], 1)


@pytest.fixture(scope="module")
def boundary_folder(tmp_path_factory):
    """Boundaries of brightness and redness for the bundled generator, one of another generator, and another file."""
    folder = tmp_path_factory.mktemp("boundaries ü")
    generator = demo_generator()
    codes = SampledCodes(generator, range(60))
    pictures = np.stack(list(render(generator, torch.from_numpy(codes[np.arange(60)]).view(60, 8, 512),
                                    noise=noise_maps(generator, "none"))))  # fmt: skip
    scores = ColourScorer()(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).numpy()
    for column, name in ((1, "smile"), (0, "age")):
        boundary = fit_boundary(codes, scores[:, column], ratio=0.3, fit="svm", attribute=name, size=32,
                                fingerprint=generator.fingerprint)  # fmt: skip
        boundary.save(folder / f"{name}.npz")
    replace(boundary, fingerprint="0" * 16, attribute="hat").save(folder / "other.npz")
    np.savez(folder / "noise.npz", noise=np.zeros(3))
    return folder


def demo_generator():
    from model import load_generator

    return load_generator(CKPT, "cpu")


@pytest.fixture(scope="module")
def tools(boundary_folder):
    tools = load_tools(CKPT, "cpu", boundary_folder)
    tools.encoder, tools.encoder_path = load_psp(ENCODER, "cpu", tools.generator), ENCODER
    tools.scorer, tools.perceptual = ColourScorer(), perceptual_or_none("auto")
    if tools.perceptual is None:  # without third-party weights
        tools.perceptual_name = "scorer:face-scorer"
        tools.perceptual = build_perceptual(tools.perceptual_name)
    return tools


@pytest.fixture(scope="module")
def astronaut(tmp_path_factory):
    """Path of the photo that scikit-image ships, and the five points of its face."""
    from skimage import data

    return save_image(data.astronaut(), tmp_path_factory.mktemp("photos") / "astro naut ü.png")


@pytest.fixture(scope="module")
def face(tools, astronaut):
    return invert(tools, take_photo(tools, astronaut, landmarks=POINTS))


# -- faces and edits -----------------------------------------------------------------------------------------------


def test_boundaries_are_found_by_the_generator(tools, boundary_folder):
    assert [path.name for path in find_boundaries(boundary_folder, tools.generator.fingerprint)] == [
        "age.npz",
        "smile.npz",
    ]
    assert list(tools.boundaries) == ["age", "smile"]
    with pytest.raises(FileNotFoundError, match="--boundaries"):
        find_boundaries(boundary_folder / "absent", "")


def test_the_largest_bundled_generator_is_the_default(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="--ckpt"):
        demo.default_generator()
    for name in ("face-wpp-32", "face-wpp-128", "face-wpp-64", "face-wpp-256-conditional", "face-psp-512"):
        (tmp_path / "checkpoints" / f"{name}.safetensors").touch()
    assert demo.default_generator().name == "face-wpp-128.safetensors"


def test_a_photo_is_aligned_and_inverted(tools, face):
    assert face.method == "encoder" and face.code.shape == (8, 512) and face.crop.size == (256, 256)
    assert face.name == "astro_naut_ü" and face.source == "astro naut ü.png"
    inversion = render_edit(tools, face, Edit()).inversion
    target = np.asarray(face.crop.resize((32, 32), Image.Resampling.LANCZOS), np.float32)
    mean, _ = tools.generator(tools.mean, input_is_latent=True, noise=face.noise)
    mean = (mean[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(inversion - target).mean() < 0.8 * np.abs(mean - target).mean()


def test_the_detector_finds_the_same_face(tools, astronaut, face):
    if not find("yunet_640") and not find("yunet_320"):
        pytest.skip("no weights of the face detector: python -m common.weights get yunet_640")
    found = take_photo(tools, astronaut)
    assert np.abs(np.subtract(found.alignment.quad, face.alignment.quad)).max() < 2


def test_a_picture_that_is_aligned_already(tools, tmp_path, face):
    path = save_image(face.crop, tmp_path / "aligned.png")
    again = take_photo(tools, path, landmarks="aligned")
    assert again.alignment.whole and np.array_equal(np.asarray(again.crop), np.asarray(face.crop))


def test_sliders_move_what_they_say(tools, face):
    age, smile = (list(tools.scorer.names).index(name) for name in ("age", "smile"))
    values = [
        tools.scorer(torch.from_numpy(view.edited).permute(2, 0, 1)[None] / 127.5 - 1)[0].tolist()
        for view in (render_edit(tools, face, Edit(edit)) for edit in ({}, {"age": 3}, {"age": -3}, {"smile": 3}))
    ]
    assert values[2][age] + 2 < values[0][age] < values[1][age] - 2
    assert values[3][smile] > values[0][smile] + 0.02
    unchanged, half = render_edit(tools, face, Edit({"age": 0})), render_edit(tools, face, Edit({"age": 2}, (4, 7)))
    assert np.array_equal(unchanged.code, face.code) and np.array_equal(unchanged.edited, unchanged.inversion)
    assert np.array_equal(half.code[:4], face.code[:4]) and not np.array_equal(half.code[4:], face.code[4:])
    with pytest.raises(SessionError, match="layers 5 to 2"):
        render_edit(tools, face, Edit({"age": 1}, (5, 2)))
    rows = read_out(tools, face, half)
    assert [row[0] for row in rows] == ["age", "smile"] and rows[0][1] == "years"
    assert float(rows[0][4]) > float(rows[0][3])


def test_the_smile_of_a_reference_is_reached(tools):
    face, reference = draw_face(tools, 3), draw_face(tools, 8)
    found, wanted, reached = transfer_smile(tools, face, reference, Edit())
    assert abs(reached - wanted) < 0.005 and 0 < abs(found) <= REACH
    view = render_edit(tools, face, Edit({"smile": found}))
    assert float(read_out(tools, face, view)[1][4]) == pytest.approx(wanted, abs=0.011)


def test_pasting_touches_the_face_only(tools, face):
    view = render_edit(tools, face, Edit({"age": 3}))
    photo = np.asarray(face.photo, np.int16)
    for mode in ("change", "face"):
        changed = np.abs(np.asarray(paste(face, view, mode), np.int16) - photo).max(-1) > 0
        rows, columns = np.nonzero(changed)
        quad = np.array(face.alignment.quad)
        assert changed.any() and rows.min() >= quad[:, 1].min() - 1 and rows.max() <= quad[:, 1].max() + 1
        assert columns.min() >= quad[:, 0].min() - 1 and columns.max() <= quad[:, 0].max() + 1
    unedited = paste(face, render_edit(tools, face, Edit()), "change")
    assert np.array_equal(np.asarray(unedited), photo)  # nothing was changed, nothing is lost
    assert paste(face, view, longest=100).size == (100, 100)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "empty", "tiny", "large", "cut short", "small face", "no face"])
def test_bad_uploads_get_a_sentence(kind, tools, tmp_path, astronaut):
    path = tmp_path / "up load.png"
    if kind == "no face" and not find("yunet_640") and not find("yunet_320"):
        pytest.skip("no weights of the face detector: python -m common.weights get yunet_640")
    expected = {
        "text": "image format",
        "empty": "empty",
        "tiny": "20x20 pixels",
        "large": "81 megapixels",
        "cut short": "truncated",
        "small face": "face in up load.png is too small",
        "no face": "no face",
    }[kind]
    if kind == "large":
        Image.new("1", (9000, 9000)).save(path)
    elif kind == "cut short":
        path.write_bytes(astronaut.read_bytes()[:90_000])
    elif kind in ("text", "empty"):
        path.write_bytes(b"not a picture" if kind == "text" else b"")
    else:
        Image.new("RGB", (20, 20) if kind == "tiny" else (200, 200), (90, 120, 60)).save(path)
    points = (np.array(POINTS) / 50).tolist() if kind == "small face" else None
    with pytest.raises(SessionError, match=expected) as caught:
        take_photo(tools, path, landmarks=points)
    message = str(caught.value)
    assert "up load.png" in message and str(tmp_path) not in message and "\n" not in message


def test_without_a_detector_the_points_can_be_given(tools, astronaut, monkeypatch):
    def absent(task):
        raise FileNotFoundError("yunet_n_640_640.onnx is not here")

    monkeypatch.setattr("editing.session.align_photo", absent)
    with pytest.raises(SessionError, match="give the five points by hand"):
        take_photo(tools, astronaut)


def test_points_are_read_however_they_are_typed():
    assert demo_page.parse_points(json.dumps({"landmarks": POINTS})) == POINTS
    assert demo_page.parse_points(" ".join(f"({x}; {y})" for x, y in POINTS)) == POINTS
    with pytest.raises(SessionError, match="got 3"):
        demo_page.parse_points("1 2 3")


# -- refining ------------------------------------------------------------------------------------------------------


def test_refining_comes_closer_and_can_be_stopped(tools, face):
    work = Refinement(tools, face, 30)
    work.join(120)
    assert work.error is None and work.step == 30 and work.picture.shape == (32, 32, 3)
    assert work.result.method == "projector" and work.result.steps == 30
    target = np.asarray(face.crop.resize((32, 32), Image.Resampling.LANCZOS), np.float32)
    before, after = (
        np.square(render_edit(tools, each, Edit()).inversion - target).mean() for each in (face, work.result)
    )
    assert after < 0.7 * before
    stopped = Refinement(tools, face, MOST_STEPS)
    while not stopped.step:
        time.sleep(0.02)
    stopped.cancel()
    stopped.join(20)
    assert not stopped.running and stopped.result is None and stopped.error is None and stopped.step < 100


def test_refining_is_limited(tools, face):
    with pytest.raises(SessionError, match=str(MOST_STEPS)):
        Refinement(tools, face, MOST_STEPS + 1)
    with pytest.raises(SessionError, match="exact already"):
        Refinement(tools, draw_face(tools, 0), 10)


# -- files and commands --------------------------------------------------------------------------------------------


def run_commands(text, monkeypatch):
    """Every line in this process; `cp` and `mkdir` by the shell."""
    monkeypatch.setattr(edit_attribute, "load_scorer", lambda *args, **kwargs: ColourScorer())
    for line in text.splitlines():
        words = shlex.split(line)
        if words[0] != "python":
            subprocess.run(line, shell=True, check=True)
            continue
        script = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        parser = script.build_parser()
        extra = [flag for flag in ("--device", "cpu") if "--device" in parser._option_string_actions]
        assert run(script.main, parser, [*words[2:], *extra]) == 0, line


@pytest.mark.parametrize("how", ["encoder", "projector", "drawn"])
def test_the_commands_give_the_same_pictures(how, tools, face, astronaut, tmp_path, monkeypatch):
    if how == "drawn":
        face = draw_face(tools, 5)
    if how == "projector":
        work = Refinement(tools, face, 4)
        work.join(60)
        face = work.result
    mode = "face" if how == "projector" else "change"
    edit = Edit({"age": 1.5, "smile": -2.0}, (0, 5) if how == "projector" else None)
    view = render_edit(tools, face, edit)
    monkeypatch.chdir(tmp_path)
    paths = save_results(tools, face, edit, view, tmp_path / "files", mode)
    shutil.copy(astronaut, tmp_path)
    zipfile.ZipFile(paths[-1]).extractall(tmp_path)
    text = (tmp_path / "commands.txt").read_text(encoding="utf-8")
    assert text.strip() == command_lines(tools, face, edit, mode)
    run_commands(text, monkeypatch)
    (frame,) = (tmp_path / "out" / "edited" / "frames").iterdir()
    assert np.array_equal(np.asarray(Image.open(frame)), view.edited)
    assert np.array_equal(np.asarray(Image.open(paths[0])), view.edited)
    if how != "drawn":
        pasted = read_image(tmp_path / "out" / "pasted" / astronaut.name)
        assert np.array_equal(np.asarray(pasted), np.asarray(Image.open(paths[1])))


def test_the_downloaded_latents_render_the_picture(tools, face, tmp_path):
    edit = Edit({"smile": 2})
    view = render_edit(tools, face, edit)
    paths = save_results(tools, face, edit, view, tmp_path)
    assert [path.name for path in paths] == [
        "astro_naut_ü-edited.png",
        "astro_naut_ü-photo.png",
        "astro_naut_ü-latents.zip",
    ]
    zipfile.ZipFile(paths[-1]).extractall(tmp_path / "zip")
    for name, picture in (("inverted", view.inversion), ("edited", view.edited)):
        saved = load_latents(
            tmp_path / "zip" / name, expect_space="w++", expect_fingerprint=tools.generator.fingerprint
        )
        (rendered,) = render(tools.generator, saved.latents, noise=saved.noise)
        assert np.abs(rendered.astype(np.int16) - picture).max() <= 1  # another batch: rounding
    assert saved.extra["edit"]["distances"] == {"smile": 2}


# -- the server ----------------------------------------------------------------------------------------------------


def test_nothing_but_the_page_imports_gradio():
    folders = [ROOT, *(folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith("."))]
    files = [file for folder in folders for file in folder.glob("*.py" if folder == ROOT else "**/*.py")]
    assert ROOT / "demo_page.py" in files and ROOT / "pSp" / "scripts" / "train.py" in files
    for file in files:
        body = ast.parse(file.read_text(encoding="utf-8")).body  # the module's own level
        imports = [ast.unparse(part) for part in body if isinstance(part, (ast.Import, ast.ImportFrom))]
        assert "gradio" not in " ".join(imports), file


@pytest.fixture(scope="module")
def server(tools, tmp_path_factory):
    """URL of the page, uploads limited to 1 MB; and its temporary folder."""
    folder = tmp_path_factory.mktemp("served")
    before = dict(os.environ)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = demo_page.serve(tools, folder, host="127.0.0.1", port=port, max_upload_mb=1)
    yield f"http://127.0.0.1:{port}", folder
    blocks.close()
    os.environ.clear()
    os.environ.update(before)


def ask(url, data=None, headers=None):
    """(status, body, headers) of a request."""
    request = urllib.request.Request(url, data, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def send_file(url, name, content):
    body = (f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n").encode() + content + b"\r\n--b--\r\n"  # fmt: skip
    return ask(f"{url}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"})


def test_the_server_gives_away_nothing_else(server, tmp_path):
    url, folder = server
    status, body, headers = ask(url)
    assert status == 200 and b"W++ faces" in body
    assert headers["content-security-policy"].startswith("default-src 'self'")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, ROOT / "README.md", Path("README.md"), Path("/etc/passwd"), folder / ".." / "secret.txt",
                 f"{folder}/../../../../etc/passwd", "..%2f..%2fetc/passwd", "//etc/passwd"):  # fmt: skip
        assert ask(f"{url}/gradio_api/file={path}")[0] in (403, 404), path
    for path in ("http://127.0.0.1:9/x", "/https://example.org/", "HTTP:%2F%2Fexample.org"):
        status, body, _ = ask(f"{url}/gradio_api/file={path}")
        assert status == 403 and b"not fetched" in body
    assert ask(f"{url}/docs")[0] == 404


def test_uploads_are_limited_and_stay_in_the_folder(server):
    url, folder = server
    status, body, _ = send_file(url, "../../../evil ü.png", b"x" * 1000)
    assert status == 200 and all(Path(path).resolve().is_relative_to(folder.resolve()) for path in json.loads(body))
    assert send_file(url, "big.png", b"x" * 1_100_000)[0] == 413
    assert not list(folder.parent.glob("**/evil*.png")) or all(
        p.is_relative_to(folder) for p in folder.parent.glob("**/evil*.png")
    )


def test_a_request_cannot_name_a_file_of_this_machine(server, tmp_path):
    """The page's own call for an upload, with the path of a file that was not uploaded."""
    url, _ = server
    status, body, _ = ask(f"{url}/config")
    config = json.loads(body)
    (number,) = {d["id"] for d in config["dependencies"] if d["api_name"] == "upload"} or {None}
    secret = save_image(Image.new("RGB", (300, 300)), tmp_path / "secret.png")
    data = [None, {"path": str(secret), "meta": {"_type": "gradio.FileData"}}, False, "", 0, 7, "change", 0, 0]
    call = {"data": data, "fn_index": number, "session_hash": "abc", "event_data": None, "trigger_id": None}
    status, body, _ = ask(
        f"{url}/gradio_api/queue/join", json.dumps(call).encode(), {"Content-Type": "application/json"}
    )
    answer = body.decode()
    if status == 200:
        _, stream, _ = ask(f"{url}/gradio_api/queue/data?session_hash=abc")
        answer = stream.decode()
    assert "secret.png: aligned" not in answer and '"success": true' not in answer.replace(
        '"success":true', '"success": true'
    )


def test_only_this_machine_is_answered(server):
    port = urllib.parse.urlsplit(server[0]).port
    assert demo.build_parser().parse_args([]).host == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing; asks for the outer address
        try:
            probe.connect(("192.0.2.1", 9))
            outer = probe.getsockname()[0]
        except OSError:
            outer = "127.0.0.1"
    if outer.startswith("127."):
        pytest.skip("this machine has no address but its own")
    with pytest.raises(OSError):
        socket.create_connection((outer, port), timeout=3)


# -- the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def visitor(server, tmp_path):
    (tmp_path / "down").mkdir()
    try:
        visitor = Visitor(server[0], tmp_path / "down")
    except NoBrowserError as error:
        pytest.skip(str(error))
    yield visitor
    visitor.close()


def test_a_visit(visitor, astronaut, tmp_path):
    """A bad upload, a photo, an edit, a refinement that is stopped, the downloads, a drawn face; no other server."""
    broken = tmp_path / "notes.png"
    broken.write_text("these are notes")
    visitor.upload("#upload", broken)
    assert "notes.png cannot be read as an image" in visitor.wait_for_text("#message", "cannot be read")

    if not find("yunet_640") and not find("yunet_320"):  # no detector: the points by hand
        visitor.click("#byhand button")
        visitor.type("#points textarea, #points input", json.dumps(POINTS))
    visitor.upload("#upload", astronaut)
    assert "inverted by the encoder" in visitor.wait_for_text("#message", "aligned")
    edited = visitor.wait("the edited face", lambda: visitor.one("#edited img").get_attribute("src"))
    visitor.type("#age input[type=number]", "3")
    visitor.wait_for_text("#commands", "--at 3")
    visitor.wait("the edit", lambda: visitor.one("#edited img").get_attribute("src") != edited)
    photo, inversion, after = (float(v) for v in visitor.text("#readout").split("years)")[1].split()[:3])
    assert after > inversion + 2 and photo > 0

    visitor.click("#refine")
    visitor.wait_for_text("#message", "Refining: step")
    visitor.click("#stop")
    visitor.wait_for_text("#message", "stopped")

    visitor.click("#prepare")
    visitor.wait_for_text("#files", "zip")
    archive = visitor.download("#files a[download$='.zip'], #files a[href$='.zip']")
    names = zipfile.ZipFile(archive).namelist()
    assert {"commands.txt", "inverted/latents.npy", "edited/latents.npy", "alignment.json"} <= set(names)

    visitor.click("#drawn img", 1)
    assert "Seed 1" in visitor.wait_for_text("#message", "Seed")
    assert visitor.hosts() == {"127.0.0.1"}
