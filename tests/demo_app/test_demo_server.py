"""The demo page's server: what it gives away, and one visit in headless Chromium."""

import ast
import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from browser import NoBrowserError, Visitor
from PIL import Image

import demo
import demo_app.serve
from common.cli import ROOT
from common.images import save_image
from demo_app.editor import ROUNDS
from demo_app.flags import given_model_flags
from demo_app.layout import build_page
from demo_app.page import HELP, Page, Session, command_of, parse_points
from demo_app.serve import Guard, allowed_hosts
from demo_app.targets import Target

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # of pandas, in gradio's queue

POINTS = [[203.8, 103.3], [246.5, 104.9], [224.1, 129.4], [204.0, 143.4], [242.5, 144.9]]  # of the astronaut

# -- the server ----------------------------------------------------------------------------------------------------


def test_nothing_imports_gradio_but_the_page_when_it_is_built():
    folders = [ROOT, *(folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith("."))]
    files = [file for folder in folders for file in folder.glob("*.py" if folder == ROOT else "**/*.py")]
    assert ROOT / "demo_app/serve.py" in files and ROOT / "pSp" / "scripts" / "train.py" in files
    for file in files:
        body = ast.parse(file.read_text(encoding="utf-8")).body  # the module's own level
        imports = [ast.unparse(part) for part in body if isinstance(part, (ast.Import, ast.ImportFrom))]
        assert "gradio" not in " ".join(imports), file


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """URL of the page, uploads limited to 1 MB; and its temporary folder."""
    folder = tmp_path_factory.mktemp("served")
    before = dict(os.environ)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = demo_app.serve.serve(models, folder, host="127.0.0.1", port=port, max_upload_mb=1)
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
    body = (
        (
            f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        + content
        + b"\r\n--b--\r\n"
    )
    return ask(f"{url}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"})


def test_the_server_gives_away_nothing_else(server, tmp_path):
    url, folder = server
    status, body, headers = ask(url)
    assert status == 200 and b"W++ faces" in body
    assert headers["content-security-policy"].startswith("default-src 'self'")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (
        secret,
        ROOT / "README.md",
        Path("README.md"),
        Path("/etc/passwd"),
        folder / ".." / "secret.txt",
        f"{folder}/../../../../etc/passwd",
        "..%2f..%2fetc/passwd",
        "//etc/passwd",
    ):
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
    assert all(path.is_relative_to(folder) for path in folder.parent.glob("**/evil*.png"))


def test_a_request_cannot_name_a_file_of_this_machine(server, tmp_path):
    """The page's own call for an upload, with the path of a file that was not uploaded."""
    url, _ = server
    status, body, _ = ask(f"{url}/config")
    uploads = [d["id"] for d in json.loads(body)["dependencies"] if ["upload"] in [t[1:] for t in d["targets"]]]
    assert uploads
    secret = save_image(Image.new("RGB", (300, 300)), tmp_path / "secret.png")
    for number in uploads:
        data = [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}, False, ""]
        call = {"data": data, "fn_index": number, "session_hash": f"abc{number}", "event_data": None}
        headers = {"Content-Type": "application/json"}
        status, body, _ = ask(f"{url}/gradio_api/queue/join", json.dumps(call).encode(), headers)
        answer = body.decode()
        if status == 200:
            answer += ask(f"{url}/gradio_api/queue/data?session_hash=abc{number}")[1].decode()
        assert "secret.png: " not in answer and "before" not in answer, answer


def test_misuse_of_the_api_logs_no_traceback(server, capfd):
    """Every call of the page with values that no control of it sends."""
    url, _ = server
    calls = json.loads(ask(f"{url}/config")[1])["dependencies"]
    assert len(calls) > 8
    for call in calls:
        for k, value in enumerate(("x", None, float("nan"), {"path": "/etc/passwd"}, [])):
            session = f"misuse{call['id']}-{k}"
            body = {"data": [value] * len(call["inputs"]), "fn_index": call["id"], "session_hash": session}
            headers = {"Content-Type": "application/json"}
            status, _, _ = ask(f"{url}/gradio_api/queue/join", json.dumps(body).encode(), headers)
            if status == 200:
                ask(f"{url}/gradio_api/queue/data?session_hash={session}")
    assert "Traceback" not in capfd.readouterr().err


def test_a_refinement_without_a_photo_leaves_the_page_as_it_is(server):
    """It follows every upload, a refused one too, whose message must stay: gradio empties what gets no answer."""
    url, _ = server
    config = json.loads(ask(f"{url}/config")[1])
    (steps,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == "steps"]
    calls = [call for call in config["dependencies"] if call["inputs"][-1:] == [steps]]
    assert len(calls) == 2, "after an upload, and by its button"
    for call in calls:
        body = {"data": [None, 40], "fn_index": call["id"], "session_hash": f"none{call['id']}"}
        headers = {"Content-Type": "application/json"}
        assert ask(f"{url}/gradio_api/queue/join", json.dumps(body).encode(), headers)[0] == 200
        answer = ask(f"{url}/gradio_api/queue/data?session_hash=none{call['id']}")[1].decode()
        events = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line.startswith("data: ")]
        (last,) = [event["output"]["data"] for event in events if event["msg"] == "process_completed"]
        assert last[1:] == [{"__type__": "update"}] * (len(call["outputs"]) - 1), last  # the first is the session


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


def test_other_names_of_this_machine_are_refused(server):
    """DNS rebinding: a foreign name that resolves to 127.0.0.1."""
    port = urllib.parse.urlsplit(server[0]).port
    for host, expected in (("evil.example", 403), (f"evil.example:{port}", 403), (f"localhost:{port}", 200)):
        status, body, _ = ask(server[0], headers={"Host": host})
        assert status == expected, (host, body)
    assert allowed_hosts("0.0.0.0") is None and "127.0.0.1" in allowed_hosts("localhost")
    sent = []

    async def send(event):
        sent.append(event)

    scope = {"type": "websocket", "path": "/x", "headers": [(b"host", b"evil.example")]}
    asyncio.run(Guard(None, {"127.0.0.1"})(scope, None, send))
    assert sent[0]["type"] == "websocket.close"


# -- what the controls do ----------------------------------------------------------------------------------------------


@pytest.fixture
def page(models, tmp_path):
    return Page(models, tmp_path)


def test_upload_edit_refine_download(page, astronaut):
    *stages, answer = page.upload(astronaut, json.dumps(POINTS))
    assert stages[0]["message"].startswith("Finding the face")
    session, (before, after) = answer["session"], answer["compare"]
    assert np.array_equal(before, after) and answer["age"] == 0
    moved = page.move(session, 0, page.models.generator.config.n_tokens - 1, -8)
    assert not np.array_equal(*moved["compare"]) and "**age**" in moved["readout"]
    assert re.search(r"ages are read to ±\d+ years", moved["readout"]), "the read-out's own error stands beside it"
    assert moved["command"].endswith("--age -8") and re.fullmatch(r"age -\d+\.\d\d", moved["distances"])
    coarse = page.move(session, 0, 2, -8)
    assert not np.array_equal(coarse["compare"][1], moved["compare"][1]), "three layers move instead of all"
    assert coarse["command"] == "", "edit_photos.py moves all layers"
    every = page.models.generator.config.n_tokens
    assert np.array_equal(page.move(session, 0, every - 1, -8)["compare"][1], moved["compare"][1])
    refined = list(page.refine(session, 20))
    assert "0 of 20 steps" in refined[0]["message"] and "Refined" in refined[-1]["message"]
    assert session.editor.faces[0].steps == 20
    with Image.open(page.save(session)["download"]) as saved, Image.open(astronaut) as photo:
        assert saved.format == photo.format and saved.size == photo.size
        assert np.abs(np.asarray(saved, float) - np.asarray(photo.convert("RGB"), float)).max() > 10


def test_an_upload_that_was_deleted_meanwhile(page, astronaut, tmp_path):
    upload = Path(shutil.copy(astronaut, tmp_path / "upload.png"))
    *_, answer = page.upload(upload, json.dumps(POINTS))
    upload.unlink()
    assert "upload the photo again" in page.save(answer["session"])["message"]


def test_a_small_face_of_a_large_photo(page, tmp_path):
    """A frame of 80 pixels has 13 in the preview, of the 16 that the generator draws."""
    at = np.array([3000, 300])
    points = at + [[-10, -5], [10, -5], [0, 5], [-8, 15], [8, 15]]
    path = save_image(Image.new("RGB", (6000, 600), (90, 90, 90)), tmp_path / "far.jpg")
    *_, answer = page.upload(path, json.dumps(points.tolist()))
    editor = answer["session"].editor
    assert 1100 < editor.photo.width < 1500 and editor.faces[0].alignment.side >= 16
    *_, answer = page.upload(path, json.dumps((at + (points - at) / 6).tolist()))
    assert "too small: 13 pixels" in answer["message"], "of the photo, not of its preview"


def test_a_drawn_face_needs_no_refinement(page):
    session = page.pick(2)["session"]
    assert list(page.refine(session, 60)) == []
    first, second = (Path(page.save(session)["download"]) for _ in range(2))
    assert second.name == "seed0002-edited.png" and second.is_file()
    another = page.pick(3, session)["session"]
    assert second.is_file(), "the page offers it until the next one"
    third = Path(page.save(another)["download"])
    assert not first.parent.exists() and not second.exists(), "files that are no longer offered fill the disk"
    (state,) = (block for block in build_page(page.models, page.folder).blocks.values() if block.stateful)
    state.delete_callback(another)  # an hour after the tab was closed
    assert not third.parent.exists()


def test_a_slider_waits_while_the_photo_is_refined(page):
    session = page.pick(2)["session"]
    moved = threading.Thread(target=page.move, args=(session, 0, 3, *[1.0] * len(page.names)))
    with session.lock:  # as a step of the refinement holds it
        moved.start()
        moved.join(0.2)
        assert moved.is_alive()
    moved.join()
    assert session.values == [1.0] * len(page.names) and session.result.faces[0].positions


def test_the_photo_shown_last_is_the_corrected_one(page, astronaut, monkeypatch):
    """A drag that waits while its slider is released comes after the release; a refinement may end after both."""
    *_, answer = page.upload(astronaut, json.dumps(POINTS))
    session, made, edit = answer["session"], [], answer["session"].editor.edit
    monkeypatch.setattr(
        session.editor, "edit", lambda targets, *, rounds: made.append((*targets, rounds)) or edit(targets, rounds=0)
    )
    page.move(session, 0, 3, -8)
    page.move(session, 0, 3, -8, rounds=ROUNDS)
    assert page.move(session, 0, 3, -8) == {} and made == [("age", 0), ("age", ROUNDS)]
    assert page.move(session, 0, 2, -8) and page.move(session, 0, 3, -7) and made[2:] == [("age", 0)] * 2
    assert list(page.refine(session, 20)) and made[4:] == [("age", 0), ("age", ROUNDS)]


def test_no_move_and_no_download_is_dropped_while_one_is_at_work(server):
    """The last of them waits (gradio's `once` would drop it), so that the page and the download are of the sliders."""
    config = json.loads(ask(f"{server[0]}/config")[1])
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    calls = config["dependencies"]
    saves = [call for call in calls if call["outputs"] == [ids["download"]]]
    moves = [call for call in calls if ids["age"] in call["inputs"]]
    assert len(saves) == 7 and len(moves) == 2
    assert {call["trigger_mode"] for call in saves + moves} == {"always_last"}


def test_damaged_uploads_get_a_sentence(page, tmp_path, no_face):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8\xff\xe0 nothing")
    for path, expected in ((damaged, "cannot be read as an image"), (no_face, "no face was found")):
        *_, answer = page.upload(path, "")
        assert expected in answer["message"] and str(tmp_path) not in answer["message"]
    *_, answer = page.upload(no_face, "1 2 three")
    assert "five points" in answer["message"]


def test_an_aligned_face_is_taken_whole(page, editor, tmp_path):
    path = save_image(editor.faces[0].crop, tmp_path / "crop.png")
    *_, answer = page.upload(path, "")
    assert answer["session"].editor.faces[0].alignment.whole


def test_a_new_photo_ends_the_refinement_of_the_one_before(page, astronaut):
    *_, answer = page.upload(astronaut, json.dumps(POINTS))
    refining = page.refine(answer["session"], 400)
    assert "0 of 400" in next(refining)["message"]
    page.pick(1, answer["session"])
    assert list(refining) == [] and answer["session"].editor.faces[0].steps <= 20
    *_, answer = page.upload(astronaut, json.dumps(POINTS))
    refining = page.refine(answer["session"], 400)
    next(refining)
    list(page.upload(None, "", answer["session"]))
    assert list(refining) == []


def test_a_refused_photo_leaves_the_one_before(page, astronaut, no_face):
    """Its refinement, which follows every upload, writes over no refusal; it goes on when it is asked for."""
    *_, answer = page.upload(astronaut, json.dumps(POINTS))
    session = answer["session"]
    *_, answer = page.upload(no_face, "", session)
    assert "no face was found" in answer["message"] and list(page.refine(session, 20)) == []
    page.resume(session)
    *_, answer = page.refine(session, 10)
    assert session.editor.faces[0].steps == 10 and answer["message"].startswith("Refined")
    assert page.replace(session)["message"] == HELP, "a photo that is removed while it is refined"


def test_points_by_hand_are_of_one_photo(page, astronaut, no_face):
    *_, refused = page.upload(no_face, "1 2 three")
    *_, taken = page.upload(astronaut, json.dumps(POINTS))
    assert "points" not in refused and taken["points"] == ""


def test_sliders_show_an_expression_that_is_taken_over(page, astronaut, monkeypatch):
    """It is the last word on a smile, until the slider is moved again; eyes, which have no slider, stay with it."""
    monkeypatch.setattr("demo_app.page.expression_of", lambda *_: {"smile": Target(0.251), "eyes_open": Target(0.9)})
    shown = []
    monkeypatch.setattr(page, "names", ["smile"])
    monkeypatch.setattr(page, "show", lambda session, **_: shown.append((session.values, session.expression)) or {})
    session = Session(None, "me.jpg", before={"smile": 0.1}, values=[1.0])
    *_, answer = page.take_expression(session, astronaut)
    assert answer["smile"] == 0.25 and shown == [([0.25], {"eyes_open": Target(0.9)})]


def test_without_a_photo_the_controls_say_so(page):
    assert HELP in page.move(None, 0, 5, 0)["message"] and HELP in page.reset(None)["message"]
    assert list(page.refine(None, 60)) == [] and page.save(None) == {}
    assert "must not come after" in page.move(page.pick(0)["session"], 4, 2, 0)["message"]


# -- the browser -------------------------------------------------------------------------------------------------------


@pytest.fixture
def visitor(server, tmp_path):
    (tmp_path / "down").mkdir()
    try:
        visitor = Visitor(server[0], tmp_path / "down", width=1366, height=768)
    except NoBrowserError as error:
        pytest.skip(str(error))
    yield visitor
    visitor.close()


def test_a_visit(visitor, astronaut, tmp_path):
    """A bad upload, a photo that is refined by itself, an edit, the download, a drawn face; no other server."""
    broken = tmp_path / "notes.png"
    broken.write_text("these are notes")
    visitor.one("#samples img")  # the page is there as soon as its samples are
    visitor.upload("#upload", broken)
    visitor.wait_for_text("#message", "notes.png: the file cannot be read as an image")
    visitor.upload("#upload", astronaut)
    visitor.wait_for_text("#message", "Refined")
    box = visitor.one("#compare").rect
    assert visitor.one("#age").rect["y"] + visitor.one("#age").rect["height"] < 768 > box["y"] + box["height"]
    visitor.type("#age input[type=number]", "-8")
    visitor.wait_for_text("#readout", "target")
    original = np.asarray(Image.open(astronaut))

    def edited():
        saved = visitor.download("#download")
        assert "-edited" in saved.stem
        return not np.array_equal(np.asarray(Image.open(saved)), original)

    visitor.wait("the edit in the download", edited)
    visitor.click("#samples img", 1)
    visitor.wait_for_text("#message", "seed0001")
    visitor.resize(390, 844)
    visitor.wait("no overflow", lambda: visitor.driver.execute_script("return document.body.scrollWidth") <= 390)
    assert visitor.hosts() == {"127.0.0.1"}


def test_the_command_is_quoted_for_a_shell():
    name = "it's $HOME.jpg"
    command = command_of(name, {"age": Target(15, relative=True), "eyes_open": Target(1)})
    assert shlex.split(command) == ["python", "edit_photos.py", name, "--age", "+15"]
    assert shlex.quote(name) in command, "no shell replaces a variable"
    assert command_of("-me.jpg", {"smile": Target(1)}) == "python edit_photos.py ./-me.jpg --smile 1"


def test_the_command_names_the_models_of_the_page(page, editor):
    words = ["--ckpt", "my faces.safetensors", "--conditional", "none"]
    page.flags = given_model_flags(demo.build_parser().parse_args([*words, "--port", "7000"]))
    assert shlex.split(page.flags) == words
    session = Session(editor, "me.jpg", Path("me.jpg"), before={"age": 40.0}, values=[5.0])
    assert page.show(session)["command"] == f"python edit_photos.py me.jpg --age +5 {page.flags}"


def test_points_are_typed_in_any_form_and_scaled_about_the_corner():
    text = "eyes 20.5,30; 40 30., nose (30.5;.5), mouth: 22 50 38 50"
    points = [[20.5, 30], [40, 30], [30.5, 0.5], [22, 50], [38, 50]]
    assert parse_points(" ", 1) is None and np.array_equal(parse_points(text, 1), points)
    assert np.allclose(parse_points(text, 0.5)[1], [19.75, 14.75])  # the middle of pixel 40 lies 40.5 from the corner
