"""Evaluation protocols: what is done to images before the extractor, and the stamp that every result carries.

FIDs cannot be reproduced where resize, codec or sample count went unsaid (Parmar et al. 2022, arXiv 2104.11222): each
result is a line of `metrics.jsonl` that says all of it, and `require_alike` refuses to compare what is not alike.

| protocol  | images                    | resize to the extractor                     | numbers to compare with        |
|-----------|---------------------------|---------------------------------------------|--------------------------------|
| paper     | as generated, no rounding | bilinear, no antialias (VGG-16: none)       | the W++ paper, pytorch-fid     |
| tf-compat | rounded to 8 bits         | TensorFlow 1's bilinear, no antialias       | torch-fidelity, most papers    |
| clean     | rounded to 8 bits         | bicubic, antialiased, as Pillow in float    | clean-fid's `clean` mode       |

From more real images than --n_sample, `paper` takes the first for FID, as the published code does; everything else
draws, without replacement (the published PRDC drew with it, which shrinks the radii: not repeated here).
"""

import functools
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from common.cli import UserError
from common.files import open_regular, parse_json
from common.runs import git_commit, package_versions, to_plain

# Entries that may differ between numbers set side by side: where things lie, what is being compared, and when
FREE = set("value std time code notes step images device fake.images fake.digest fake.noise_seed".split())
FREE |= {f"{side}.{name}" for side in ("real", "fake") for name in "path seed kind fingerprint space step".split()}

# The entries of a record that are read again; others are only compared
FAKE = {"truncation?": (float, None), "images?": (float, None), "fingerprint?": (str, None), "digest?": (str, None)}
RECORD = {"metric": str, "value": (float, None), "n_fake": (int, None), "step?": (int, None), "fake": FAKE}
RECORD |= {"real?": ({"digest?": (str, None)}, None)}


@dataclass(frozen=True)
class Protocol:
    """Steps between an image and the extractor."""

    name: str = "tf-compat"
    quantised: bool = True  # generated images rounded and clamped to 8 bits, as a file holds them
    resize: str = "bilinear-tf1"
    antialias: bool = False

    def to_255(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] or float [N, 3, H, W] in [-1, 1] -> float32 in 0..255."""
        if images.dtype == torch.uint8:
            return images.float()
        images = (images.float() + 1) * 127.5
        return images.round().clamp(0, 255) if self.quantised else images

    def resize_to(self, x: torch.Tensor, size: int | None) -> torch.Tensor:
        """float [N, 3, H, W] -> [N, 3, size, size]; None, or the size it has already: unchanged."""
        if size is None or tuple(x.shape[2:]) == (size, size):
            return x
        if self.resize == "bilinear-tf1":
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

            return interpolate_bilinear_2d_like_tensorflow1x(x, size=(size, size), align_corners=False)
        x = F.interpolate(x, (size, size), mode=self.resize, antialias=self.antialias, align_corners=False)
        return x.clamp(0, 255) if self.quantised else x  # bicubic overshoots


_protocols = (Protocol("paper", False, "bilinear"), Protocol(), Protocol("clean", True, "bicubic", True))
PROTOCOLS = {protocol.name: protocol for protocol in _protocols}


def make_record(metric: str, value, *, real: dict | None, fake: dict, protocol: dict, extractor: dict, **details):
    """One result as a line of `metrics.jsonl`. real, fake: `info` of the sources with `n`; real None: path length."""
    real, fake = dict(real or {}), dict(fake)
    record = {"metric": metric, "value": value, "n_real": real.pop("n", None), "n_fake": fake.pop("n")}
    record |= {"step": fake["step"]} if fake.get("step") is not None else {}
    record |= {**details, "protocol": protocol, "extractor": extractor, "real": real, "fake": fake}
    return to_plain(record | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "code": _code_version()})


@functools.cache
def _code_version() -> dict:
    versions = package_versions(("torch", "torchvision", "torch-fidelity", "lpips", "pillow"))
    return {"git": git_commit(), **{name: version for name, version in versions.items() if version}}


def append_records(path: str | Path, records: Iterable[dict]) -> None:
    """Add one JSON line per record to `path`, which is created when absent."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path) -> list[dict]:
    """Records of a metrics.jsonl; values that are not finite are None. Raises ValueError naming a line that is none."""
    with open_regular(path) as file:
        lines = {f"{path}, line {number}": line for number, line in enumerate(file.read().splitlines(), 1)}
    return [parse_json(line, RECORD, source=source, what="result of metrics/") for source, line in lines.items()]


def flat(record: dict, prefix: str = "") -> dict:
    """Nested entries under dotted names."""
    entries = {}
    for name, value in record.items():
        entries |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return entries


def unlike(first: dict, second: dict, vary: Iterable[str] = ()) -> list[str]:
    """Differences that make two results incomparable; vary: dotted names that may differ, as in `fake.truncation`."""
    sides = flat(first), flat(second)
    names = dict.fromkeys(name for side in sides for name in side if not name.startswith("code."))
    pairs = {name: [side.get(name) for side in sides] for name in names if name not in FREE | set(vary)}
    text = {name: ["unknown" if value is None else value for value in pair] for name, pair in pairs.items()}
    return [f"{name} {text[name][0]} against {text[name][1]}" for name, (a, b) in pairs.items() if a != b]


def require_alike(records: list[dict], *, vary: Iterable[str] = (), allow: bool = False) -> list[str]:
    """Differences in protocol between results of one metric, each with the first. Raises ValueError unless `allow`."""
    differences = list(dict.fromkeys(line for record in records[1:] for line in unlike(records[0], record, vary)))
    if differences and not allow:
        alike = f"these numbers were not computed alike ({'; '.join(differences[:4])})"
        raise UserError(f"{records[0]['metric']}: {alike}: compute them alike, or pass --allow_unlike")
    return differences
