"""What the demo page's server gives away, and one visit in headless Chromium."""

import ast
import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import pytest
from browser import NoBrowserError, Visitor
from photos import POINTS, ROOT
from PIL import Image

import demo
import demo_app.page
from common.images import save_image
from common.weights import find

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # of pandas, in gradio's queue

# -- the server ----------------------------------------------------------------------------------------------------


def test_nothing_but_the_page_imports_gradio():
    folders = [ROOT, *(folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith("."))]
    files = [file for folder in folders for file in folder.glob("*.py" if folder == ROOT else "**/*.py")]
    assert ROOT / "demo_app/page.py" in files and ROOT / "pSp" / "scripts" / "train.py" in files
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
    blocks = demo_app.page.serve(tools, folder, host="127.0.0.1", port=port, max_upload_mb=1)
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


def test_a_visit(visitor, astronaut, face, tmp_path):
    """A bad upload, a photo, an edit, a refinement that is stopped, the downloads, a drawn face, a cast expression; no
    other server."""
    broken = tmp_path / "notes.png"
    broken.write_text("these are notes")
    visitor.upload("#upload", broken)
    assert "notes.png cannot be read as an image" in visitor.wait_for_text("#message", "cannot be read")

    if not find("yunet_640"):  # no detector: the points by hand
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

    visitor.upload("#reference", broken)
    visitor.click("#cast")
    visitor.wait_for_text("#message", "notes.png cannot be read as an image")
    visitor.click("#framed input")
    visitor.upload("#reference", save_image(face.crop, tmp_path / "lender.png"))
    visitor.type("#steps input[type=number]", "50")
    visitor.click("#cast")
    visitor.wait_for_text("#message", "The expression of lender.png was cast: smile")
    visitor.wait_for_text("#commands", "edit_conditional.py")
    visitor.click("#prepare")
    visitor.wait_for_text("#files", "zip")
    archive = visitor.download("#files a[download$='.zip'], #files a[href$='.zip']")
    assert b"--reference" in zipfile.ZipFile(archive).read("commands.txt")
    assert visitor.hosts() == {"127.0.0.1"}
