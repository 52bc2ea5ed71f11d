"""Report on this machine and what the scripts will use of it, to put into a bug report: packages, processor and GPUs,
which kernels run and why others do not, bundled models, third-party weights. Computes and downloads nothing.

    python tools/doctor.py
"""

import os
import platform
import re
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.checkpoint import require_file
from common.cli import ROOT, ArgumentParser, add_device_flags, run_script
from common.distributed import resolve_device
from common.precision import bf16_pays, processor_name
from common.runs import git_commit, package_versions
from common.weights import WEIGHTS, find, search_folders
from common.workers import n_cores
from op import dispatch


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    add_device_flags(parser, distributed=False)
    return parser


def main(args) -> None:
    for name, value in report(args.device, args.weights_dir, args.ops):
        print(f"{name + ':':16}{value}")


def report(device, weights_dir=None, ops=None) -> list[tuple[str, str]]:
    """The report as (name, description) pairs. Raises ValueError for a device that is not here."""
    device = resolve_device(device, ops=ops)
    here = {name: path for name in WEIGHTS if (path := find(name, weights_dir))}
    texts = [(ROOT / f"requirements{extra}.txt").read_text() for extra in ("", "-extra")]
    required = re.findall(r"^[\w.-]+", "".join(texts), re.MULTILINE)
    versions = package_versions([*required, "triton"])
    compilers = ", ".join(f"{name} {shutil.which(name) or 'absent'}" for name in ("gcc", "nvcc"))
    absent = ", ".join(name for name in WEIGHTS if name not in here)
    bundled = ", ".join(sorted(path.name for path in (ROOT / "checkpoints").glob("face-*")))
    weights = ", ".join(name + unusable(path) for name, path in here.items())
    return [
        ("checkout", f"{ROOT}, commit {git_commit() or 'unknown'}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("packages", ", ".join(f"{name} {version or 'ABSENT'}" for name, version in versions.items())),
        ("processor", processor()),
        *(("GPU", gpu(index)) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)),
        ("CUDA of torch", torch.version.cuda or "none: a build for CPUs, or for other GPUs"),
        ("device", f"{device} (what --device says; auto: cuda, then mps, then cpu)"),
        ("operations", operations(device)),
        ("compilers", f"{compilers}; only Triton needs gcc, nothing needs nvcc"),
        ("bundled", bundled or "no models in checkpoints/: was the checkout complete?"),
        ("weights here", weights or "none: each stage names the fallback that it uses"),
        ("not here", f"{absent}; looked into {', '.join(map(str, search_folders(weights_dir)))}"),
    ]


def unusable(path: Path) -> str:
    """' (UNUSABLE: why)' of a file that is empty, a web page or a pointer; '' of one that may be what its name says."""
    try:
        require_file(path, "weights")
    except (OSError, ValueError) as error:
        return f" (UNUSABLE: {error})"
    return ""


def processor() -> str:
    """Name, cores that this process may use, and whether --precision bf16 pays."""
    bf16 = "pays" if bf16_pays() else "does not pay, as far as can be seen"
    cores = f"{n_cores()} of {os.cpu_count()} processors, {torch.get_num_threads()} threads"
    return f"{processor_name()}, {cores}, {torch.backends.cpu.get_cpu_capability()}; --precision bf16 {bf16}"


def gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    return f"cuda:{index} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"


def operations(device: torch.device) -> str:
    """Kernels that --ops chooses on this device, and the obstacle to Triton's."""
    reason, mode = dispatch.obstacle(device), dispatch.chosen()
    if mode == "ref" or (mode == "auto" and device.type != "cuda") or reason:
        return f"--ops {mode}: plain PyTorch" + (f" ({reason})" if reason else "")
    return f"--ops {mode}: Triton kernels, compiled at their first launch"


if __name__ == "__main__":
    run_script(main, build_parser())
