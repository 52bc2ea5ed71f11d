"""Third-party weights: what each is, where it is looked for, how it is checked. Nothing is downloaded unless asked for.

    python -m common.weights list
    python -m common.weights get vgg16 --weights_dir checkpoints
    python -m common.weights verify

Looked for in `--weights_dir`, $WPP_WEIGHTS, `checkpoints/`, torch's hub cache, and the development data beside the
checkout ($WPP_DATA/weights, `../shared/data/weights`), in this order.
"""

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from common.checkpoint import require_file
from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]


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
    aliases: tuple[str, ...] = ()  # other file names of the same content

    @property
    def files(self):
        return (self.file, *self.aliases)

    @property
    def downloadable(self):
        return self.url.rpartition("/")[2] in self.files


TORCHVISION = "https://download.pytorch.org/models/"
DEX = "https://github.com/siriusdemon/pytorch-DEX/raw/master/dex/pth/"
YUNET = "https://github.com/ShiqiYu/libfacedetection.train/raw/master/onnx/"
BSD = "BSD-3-Clause (torchvision)"
DEX_LICENCE = "academic research only (IMDB-WIKI)"

# torchvision and pytorch-fid put the first 8 digits of the sha256 into the file name; DEX's digests are those of its
# git-lfs pointers; the other digests were computed on the files that this project was developed with. That
# MobileFaceNet comes from the page given is inferred from its layout and preprocessing, not confirmed.
WEIGHTS = {
    weight.name: weight
    for weight in (
        Weight(
            "vgg16",
            "vgg16-397923af.pth",
            TORCHVISION + "vgg16-397923af.pth",
            "397923af",
            527.8,
            BSD,
            "LPIPS (vgg), PRDC features",
        ),
        Weight(
            "alexnet",
            "alexnet-owt-7be5be79.pth",
            TORCHVISION + "alexnet-owt-7be5be79.pth",
            "7be5be79",
            233.1,
            BSD,
            "LPIPS (alex)",
        ),
        Weight(
            "squeezenet1_1",
            "squeezenet1_1-b8a52dc0.pth",
            TORCHVISION + "squeezenet1_1-b8a52dc0.pth",
            "b8a52dc0",
            4.7,
            BSD,
            "LPIPS (squeeze)",
        ),
        Weight(
            "squeezenet1_1_features",
            "squeezenet1_1_features.pth",
            TORCHVISION + "squeezenet1_1-b8a52dc0.pth",
            "435cedb387e95bc8291893f61a3a64f0345b8c23a05139aceef43947efb3d52d",
            2.8,
            BSD,
            "LPIPS (squeeze): the `features` part of squeezenet1_1 alone, rounded to fp16",
        ),
        Weight(
            "mobilefacenet",
            "mobilefacenet.pt",
            "https://github.com/foamliu/MobileFaceNet",
            "90a00ba1d8b0b688af3deb731ed53dca582e6106805d1bc3cfdef55f570493f4",
            3.9,
            "Apache-2.0",
            "identity: 128-d face embedding",
        ),
        Weight(
            "yunet_640",
            "yunet_n_640_640.onnx",
            YUNET + "yunet_n_640_640.onnx",
            "25a606a145a5b6d7271ae138fbd00eba91dad8b83222ae3f2c7ecd0f4a7b0e31",
            0.3,
            "Apache-2.0",
            "face detector with five landmarks",
        ),
        Weight(
            "yunet_320",
            "yunet_n_320_320.onnx",
            YUNET + "yunet_n_320_320.onnx",
            "81dbde155e982455488235acb8ec2dec5d647edf7cf7080d33e4abb69b93a0d2",
            0.3,
            "Apache-2.0",
            "face detector with five landmarks, small input",
        ),
        Weight(
            "inception",
            "pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            "6726825d",
            91.2,
            "Apache-2.0",
            "FID",
            ("weights-inception-2015-12-05-6726825d.pth",),
        ),
        Weight(
            "arcface_ir_se50",
            "model_ir_se50.pth",
            "https://drive.google.com/file/d/1KW7bjndL3QG3sxBbZxreGHigcCCpsDgn/view",
            None,
            167.2,
            "research only (InsightFace_Pytorch)",
            "identity loss of pSp: IR-SE50 ArcFace",
        ),
        Weight(
            "dex_age",
            "age_sd.pth",
            DEX + "age_sd.pth",
            "d754f06341792aecf1c5893269ae849892072532f161b63cd595d713897f5302",
            513.7,
            DEX_LICENCE,
            "DEX apparent age",
        ),
        Weight(
            "dex_gender",
            "gender_sd.pth",
            DEX + "gender_sd.pth",
            "4e2bae5c6959145725c0152c6e5f0e65f0f2d176e3c2f7ff32b87813102767d1",
            512.2,
            DEX_LICENCE,
            "DEX gender",
        ),
    )
}


def get_weight(name):
    """The registry's entry for a name or file name. Raises ValueError with the names there are."""
    for weight in WEIGHTS.values():
        if name in (weight.name, *weight.files):
            return weight
    raise UserError(f"no weights called {name!r}; there are {', '.join(WEIGHTS)}")


def search_folders(weights_dir=None):
    """Folders in which weights are looked for, first to last; they need not exist."""
    import torch.hub

    data = os.environ.get("WPP_DATA") or ROOT.parent / "shared" / "data"
    given = [weights_dir, os.environ.get("WPP_WEIGHTS")]
    fixed = [ROOT / "checkpoints", Path(torch.hub.get_dir()) / "checkpoints", Path(data) / "weights"]
    return [Path(folder) for folder in given if folder] + fixed


def find(name, weights_dir=None):
    """Path of the weights called `name`, unchecked, or None. Raises ValueError for an unknown name."""
    weight = get_weight(name)
    paths = (folder / file for folder in search_folders(weights_dir) for file in weight.files)
    return next((path for path in paths if path.is_file()), None)


def require(name, weights_dir=None):
    """Path of the weights called `name`, checked against their sha256 where it is known.

    Raises FileNotFoundError with the URL and the place to put the file; ValueError when the file found is another one.
    """
    weight = get_weight(name)
    path = find(name, weights_dir)
    if path is None:
        action = (
            f"run `python -m common.weights get {weight.name}` or download" if weight.downloadable else "get it from"
        )
        raise FileNotFoundError(
            f"{weight.file} ({weight.used_for}; {weight.size:.0f} MiB, {weight.licence}) is not here: {action} "
            f"{weight.url} and put it into {_home(weights_dir)}"
        )
    return verify(weight, path)


def verify(weight, path):
    """`path`, when it holds `weight`. Raises ValueError (web page, git-lfs pointer, empty, another sha256)."""
    path = require_file(path, "weights file")
    if weight.sha256 is not None:
        found = file_sha256(path)
        if not found.startswith(weight.sha256):
            raise UserError(
                f"{path} is not the {weight.name} known here (sha256 begins {found[:16]}, expected "
                f"{weight.sha256[:16]}): get it again from {weight.url}"
            )
    return path


def file_sha256(path):
    """64 hex digits of a file, read block by block (hashlib.file_digest came with Python 3.11)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _home(weights_dir=None):
    """Folder for new weights."""
    return Path(weights_dir or os.environ.get("WPP_WEIGHTS") or ROOT / "checkpoints")


def download(name, weights_dir=None):
    """Fetch the weights `name` into `weights_dir` (default $WPP_WEIGHTS, else `checkpoints/`) and return their path.

    The file appears only when it is complete and is what the registry knows. Raises ValueError when it is not, or
    cannot be had by a plain download; OSError naming the URL when the network fails.
    """
    weight = get_weight(name)
    path = _home(weights_dir) / weight.file
    if not weight.downloadable:
        raise UserError(f"{weight.file} has no direct download: get it from {weight.url} and put it into {path.parent}")
    try:
        with urllib.request.urlopen(weight.url, timeout=60) as response, atomic_write(path) as file:
            _copy(response, file, weight)
            file.flush()
            _verify_download(weight, file.name)
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(f"{weight.url}: {reason}; download it by other means into {path.parent}") from error
    return path


def _verify_download(weight, temporary):
    try:
        verify(weight, temporary)
    except ValueError as error:  # the temporary file is about to go: say where it came from
        raise UserError(str(error).replace(temporary, weight.url)) from error


def _copy(response, file, weight):
    from tqdm import tqdm

    total = int(response.headers.get("Content-Length") or 0) or None
    with tqdm(total=total, unit="B", unit_scale=True, desc=weight.file, disable=None) as progress:
        while block := response.read(2**20):
            file.write(block)
            progress.update(len(block))
    if total is not None and file.tell() < total:
        raise UserError(f"{weight.url}: the connection ended after {file.tell():,} of {total:,} bytes; try again")


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
        print(f"{weight.name:24}{weight.size:7.1f} MiB  {weight.licence:36}{weight.used_for}\n    {state}")
    return status


if __name__ == "__main__":
    run_script(main, build_parser())
