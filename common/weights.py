"""Third-party weights: what each is, where it is looked for, how it is checked. Nothing is downloaded unless asked for.

    python -m common.weights list
    python -m common.weights get vgg16 --weights_dir checkpoints
    python -m common.weights verify

Looked for in `--weights_dir`, $WPP_WEIGHTS, `checkpoints/` and torch's hub cache, in this order. The face detector and
the identity network are bundled; no stage needs the others, and `list` says what it takes instead.
"""

import hashlib
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from common.cli import ROOT, ArgumentParser, UsageError, UserError, run_script


@dataclass(frozen=True)
class Weight:
    """One file. `sha256` is the whole digest, as many leading digits as its publisher gives, or None when unknown."""

    name: str
    file: str
    url: str  # of the file itself when it ends with its name, else of the page where it is to be had
    sha256: str | None
    size: float  # MiB
    licence: str
    used_for: str
    without: str  # what works without it
    aliases: tuple[str, ...] = ()  # other file names of the same content

    @property
    def files(self):
        return (self.file, *self.aliases)

    @property
    def downloadable(self):
        return self.url.rpartition("/")[2] in self.files


# torchvision and pytorch-fid put the first 8 digits of the sha256 into the file name; DEX's digests are those of its
# git-lfs pointers; the others were computed on the files that this project was developed with. That MobileFaceNet comes
# from the page given is inferred from its layout and preprocessing, not confirmed.
_rows = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
WEIGHTS = {row["name"]: Weight(**row) for row in _rows}


def get_weight(name):
    """The registry's entry for a name or file name. Raises ValueError with the names there are."""
    for weight in WEIGHTS.values():
        if name in (weight.name, *weight.files):
            return weight
    raise UserError(f"no weights called {name!r}; there are {', '.join(WEIGHTS)}")


def search_folders(weights_dir=None):
    """Folders in which weights are looked for, first to last; they need not exist."""
    import torch.hub

    given = [Path(folder) for folder in (weights_dir, os.environ.get("WPP_WEIGHTS")) if folder]
    return [*given, ROOT / "checkpoints", Path(torch.hub.get_dir()) / "checkpoints"]


def find(name, weights_dir=None):
    """Path of the weights called `name`, unchecked, or None. Raises ValueError for an unknown name."""
    weight = get_weight(name)
    paths = (folder / file for folder in search_folders(weights_dir) for file in weight.files)
    return next((path for path in paths if path.is_file()), None)


def require(name, weights_dir=None):
    """Path of the weights called `name`, checked. Raises FileNotFoundError with the URL, ValueError for others."""
    weight, path = get_weight(name), find(name, weights_dir)
    if path is None:
        get = f"run `python -m common.weights get {weight.name}` or download" if weight.downloadable else "get it from"
        raise FileNotFoundError(
            f"{weight.file} ({weight.used_for}; {weight.size:.0f} MiB, {weight.licence}) is not here: {get} "
            f"{weight.url} and put it into {search_folders(weights_dir)[0]}; without it: {weight.without}"
        )
    return verify(weight, path)


def verify(weight, path):
    """`path`, when it holds `weight`. Raises ValueError (web page, git-lfs pointer, empty, another sha256)."""
    from common.checkpoint import require_file

    path = require_file(path, "weights file")
    if weight.sha256 is not None and not (found := file_sha256(path)).startswith(weight.sha256):
        another = f"(sha256 begins {found[:16]}, expected {weight.sha256[:16]})"
        raise UserError(f"{path} is not the {weight.name} known here {another}: get it again from {weight.url}")
    return path


def file_sha256(path):
    """64 hex digits of a file, read block by block (hashlib.file_digest came with Python 3.11)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def download(name, weights_dir=None):
    """Fetch the weights `name` into `weights_dir` (default $WPP_WEIGHTS, else `checkpoints/`) and return their path.
    Raises ValueError when they are not what the registry knows, or have no direct link; OSError naming the URL when the
    network fails. In neither case is there a new file."""
    from tqdm import tqdm

    from common.files import atomic_write

    weight = get_weight(name)
    path = search_folders(weights_dir)[0] / weight.file
    if not weight.downloadable:
        raise UserError(f"{weight.file} has no direct download: get it from {weight.url} and put it into {path.parent}")
    try:
        with urllib.request.urlopen(weight.url, timeout=60) as response, atomic_write(path) as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=weight.file, disable=None) as progress:
                while block := response.read(2**20):
                    progress.update(file.write(block))
            if total is not None and (n_bytes := file.tell()) < total:
                raise UserError(f"the connection ended after {n_bytes:,} of {total:,} bytes; try again")
            file.flush()
            verify(weight, file.name)
    except ValueError as error:  # the temporary file has gone: say where it came from
        raise UserError(f"{weight.url}: {str(error).replace(file.name, 'the download')}") from error
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(f"{weight.url}: {reason}; download it by other means into {path.parent}") from error
    return path


def build_parser():
    parser = ArgumentParser(prog="python -m common.weights", description=__doc__)
    parser.add_argument("action", choices=("list", "get", "verify"), help="show all, download some, check those here")
    parser.add_argument("names", nargs="*", help="names from the list; none means all for list and verify")
    parser.add_argument("--weights_dir", type=Path, help="folder looked into first, and for downloads")
    return parser


def main(args):
    if args.action == "get":
        if not args.names:
            raise UsageError(f"get: name the weights to download, from {', '.join(WEIGHTS)}")
        for weight in map(get_weight, args.names):
            print(f"{weight.name}: licence {weight.licence}; {weight.used_for}")
            print(download(weight.name, args.weights_dir))
        return 0

    status = 0
    for weight in map(get_weight, args.names or WEIGHTS):
        path = find(weight.name, args.weights_dir)
        state = path or "absent"
        if args.action == "verify" and path is not None:
            try:
                verify(weight, path)
                state = f"{path}: {'ok' if weight.sha256 else 'present, its sha256 is not known'}"
            except ValueError as error:
                state, status = f"error: {error}", 1
        print(f"{weight.name:24}{weight.size:7.1f} MiB  {weight.licence:36}{weight.used_for}")
        print(f"    {state}\n    without it: {weight.without}")
    return status


if __name__ == "__main__":
    run_script(main, build_parser())
