"""common/weights.py: found in the right order, checked, downloaded only on request and only whole."""

import hashlib
import http.server
import threading
from dataclasses import replace

import pytest

from common import weights
from common.cli import run
from common.weights import WEIGHTS, Weight, build_parser, download, find, get_weight, main, require, verify

CONTENT = bytes(range(256)) * 100
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A registry of one entry, to be had from a file:// URL, and search folders inside `tmp_path` only."""
    origin = tmp_path / "origin" / "toy.pth"
    origin.parent.mkdir()
    origin.write_bytes(CONTENT)
    weight = Weight(
        "toy", "toy.pth", origin.as_uri(), DIGEST[:8], 0.1, "MIT", "tests", "all but tests", ("old_toy.pth",)
    )
    monkeypatch.setattr(weights, "WEIGHTS", {"toy": weight})
    monkeypatch.setattr(weights, "ROOT", tmp_path / "root")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("WPP_WEIGHTS", raising=False)
    return weight


def put(folder, name="toy.pth", content=CONTENT):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def change(monkeypatch, **changes):
    weight = replace(weights.WEIGHTS["toy"], **changes)
    monkeypatch.setitem(weights.WEIGHTS, "toy", weight)
    return weight


# -- the registry ----------------------------------------------------------------------------------


def test_registry():
    files = [file for weight in WEIGHTS.values() for file in weight.files]
    assert len(files) == len(set(files))
    for name, weight in WEIGHTS.items():
        assert (
            weight.name == name
            and weight.url.startswith("https://")
            and weight.licence
            and weight.used_for
            and weight.without
        )
        assert weight.sha256 is None or (len(weight.sha256) in (8, 64) and int(weight.sha256, 16))
        if weight.sha256 is not None and len(weight.sha256) == 8:
            assert weight.sha256 in weight.file  # the publisher's promise, in the name
    assert {name for name, weight in WEIGHTS.items() if not weight.downloadable} == {
        "squeezenet1_1_features",
        "mobilefacenet",
        "arcface_ir_se50",
    }


def test_torchvision_urls():
    from torchvision import models

    for name, published in (
        ("vgg16", models.VGG16_Weights),
        ("alexnet", models.AlexNet_Weights),
        ("squeezenet1_1", models.SqueezeNet1_1_Weights),
    ):
        assert WEIGHTS[name].url == published.IMAGENET1K_V1.url
        assert WEIGHTS[name].size == pytest.approx(published.IMAGENET1K_V1.meta["_file_size"], abs=0.1)


def test_names():
    assert get_weight("vgg16-397923af.pth") is get_weight("vgg16")
    assert get_weight("weights-inception-2015-12-05-6726825d.pth") is get_weight("inception")
    with pytest.raises(ValueError, match="'vgg17'; there are vgg16"):
        get_weight("vgg17")


@pytest.mark.parametrize("name", ["squeezenet1_1_features", "mobilefacenet", "yunet_640"])
def test_development_weights(name):
    if find(name) is None:
        pytest.skip(f"{WEIGHTS[name].file} is not among the development data")
    assert require(name).name == WEIGHTS[name].file


# -- finding and checking --------------------------------------------------------------------------


def test_order_of_folders(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("WPP_WEIGHTS", str(tmp_path / "env"))
    assert find("toy", tmp_path / "given") is None
    for folder in ("torch/hub/checkpoints", "root/checkpoints", "env", "given"):
        path = put(tmp_path / folder)  # last first: each one found takes precedence
        assert find("toy", tmp_path / "given") == path
    assert find("toy") == tmp_path / "env" / "toy.pth"


def test_other_file_name(toy, tmp_path):
    path = put(tmp_path / "given", "old_toy.pth")
    assert require("toy", tmp_path / "given") == path


def test_absent(toy, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        require("toy", tmp_path / "given")
    message = str(caught.value)
    for part in (
        "toy.pth (tests; 0 MiB, MIT) is not here",
        "python -m common.weights get toy",
        toy.url,
        str(tmp_path / "given"),
        "without it: all but tests",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (CONTENT + b"x", f"sha256 begins .*, expected {DIGEST[:8]}"),
        (b"<!DOCTYPE html><title>Quota exceeded</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-lfs pointer"),
        (b"", "is empty"),
    ],
)
def test_wrong_file_is_refused(toy, tmp_path, content, complaint):
    path = put(tmp_path / "given", content=content)
    with pytest.raises(ValueError, match=complaint) as caught:
        require("toy", tmp_path / "given")
    assert str(caught.value).startswith(str(path))


def test_unknown_digest_still_detects_pages(toy, tmp_path, monkeypatch):
    weight = change(monkeypatch, sha256=None)
    assert verify(weight, put(tmp_path / "given")) == tmp_path / "given" / "toy.pth"
    with pytest.raises(ValueError, match="web page"):
        verify(weight, put(tmp_path / "given", content=b"<html>"))


# -- downloading -----------------------------------------------------------------------------------


def test_download(toy, tmp_path, monkeypatch):
    assert download("toy") == tmp_path / "root" / "checkpoints" / "toy.pth"
    monkeypatch.setenv("WPP_WEIGHTS", str(tmp_path / "env"))
    assert download("toy").read_bytes() == CONTENT and (tmp_path / "env" / "toy.pth").exists()


@pytest.mark.parametrize("content", [b"<html>quota</html>", b"version https://git-lfs.github.com/spec/v1", b"x", b""])
def test_bad_download_leaves_nothing(toy, tmp_path, content):
    put(tmp_path / "origin", content=content)
    before = put(tmp_path / "root" / "checkpoints", content=b"previous")
    with pytest.raises(ValueError) as caught:
        download("toy")
    assert toy.url in str(caught.value) and ".tmp" not in str(caught.value)
    assert before.read_bytes() == b"previous" and len(list(before.parent.iterdir())) == 1


def test_no_network(toy, tmp_path, monkeypatch):
    change(monkeypatch, url="http://127.0.0.1:9/toy.pth")  # the discard port: nobody listens
    with pytest.raises(OSError, match="http://127.0.0.1:9/toy.pth: .*refused.*by other means"):
        download("toy")
    change(monkeypatch, url="https://example.org/page")
    with pytest.raises(ValueError, match="no direct download: get it from https://example.org/page"):
        download("toy")


def test_server_that_fails(toy, tmp_path, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if "absent" in self.path else 200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        change(monkeypatch, url=f"http://127.0.0.1:{server.server_port}/toy.pth", sha256=None)
        with pytest.raises((ValueError, OSError), match=r"toy\.pth: .*25,?600"):
            download("toy")
        change(monkeypatch, url=f"http://127.0.0.1:{server.server_port}/absent/toy.pth")
        with pytest.raises(OSError, match=r"absent/toy\.pth: Not Found; download it by other means"):
            download("toy")
        server.shutdown()
    assert not list((tmp_path / "root" / "checkpoints").iterdir())


# -- command line ----------------------------------------------------------------------------------


def test_command_line(toy, tmp_path, capsys):
    def command(*arguments):
        status = run(main, build_parser(), list(arguments))
        return status, capsys.readouterr()

    given = ("--weights-dir", str(tmp_path / "given"))
    status, shown = command("list", *given)
    assert status == 0 and "absent" in shown.out and "without it: all but tests" in shown.out
    status, shown = command("get", "toy", *given)
    assert status == 0 and "licence MIT" in shown.out and str(tmp_path / "given" / "toy.pth") in shown.out
    status, shown = command("verify", *given)
    assert status == 0 and "toy.pth: ok" in shown.out
    put(tmp_path / "given", content=b"other")
    status, shown = command("verify", *given)
    assert status == 1 and "error: " in shown.out
    status, shown = command("get")
    assert status == 2 and "from toy" in shown.err
    status, shown = command("get", "unknown")
    assert status == 1 and "there are toy" in shown.err
    assert command("burn")[0] == 2
