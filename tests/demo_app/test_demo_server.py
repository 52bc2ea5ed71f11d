"""The demo page's server: what it gives away, and one visit in headless Chromium."""

import ast
import asyncio
import json
import os
import socket
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
from demo_app.serve import Guard, allowed_hosts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # of pandas, in gradio's queue


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


def test_no_move_and_no_download_is_dropped_while_one_is_at_work(server):
    """The last of them waits (gradio's `once` would drop it), so that the page and the download are of the sliders."""
    config = json.loads(ask(f"{server[0]}/config")[1])
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    calls = config["dependencies"]
    saves = [call for call in calls if call["outputs"] == [ids["download"]]]
    moves = [call for call in calls if ids["age"] in call["inputs"]]
    assert len(saves) == 7 and len(moves) == 2
    assert {call["trigger_mode"] for call in saves + moves} == {"always_last"}


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
