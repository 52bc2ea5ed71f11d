"""The run folder: its options (options.json), what happened (log.jsonl, TensorBoard), and where results go.

RUN/options.json      options, command line, versions, git commit; of an earlier start: options-1.json, -2 ...
RUN/log.jsonl         one JSON object per line: {"step", "time" (seconds since 1970), "group", name: value ...}
RUN/{sample,similarity,checkpoint,tensorboard_log}/
"""

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from common.checkpoint import CheckpointError, latest_checkpoint
from common.cli import ROOT, Flags, UserError, is_like, say
from common.distributed import gather_list
from common.files import atomic_write, open_regular, parse_json, read_json, write_text
from common.lock import lock_folder

LINE = {"step?": float, "time?": (float, str), "group?": str}  # of log.jsonl and metrics.jsonl, whose time is a text
FOLDERS = ("sample", "similarity", "checkpoint", "tensorboard_log")
PACKAGES = ("torch", "torchvision", "numpy", "Pillow", "lmdb", "safetensors", "triton")

# Flags of the machine or of one invocation: a continued run does not take them from its checkpoint
MACHINE = ("device", "ops", "local_rank", "threads", "workers", "test_workers", "weights_dir", "dist_timeout")
INVOCATION = ("exp_name", "exp_dir", "out", "resume", "ckpt", "checkpoint_path", "init_from", "path_positional")


def restore_options(flags: Flags, stored: dict, source, *, keep=()) -> str:
    """Give a continued run the options `stored` in its checkpoint `source`, but for MACHINE, INVOCATION and `keep`; a
    given flag wins. Returns a sentence on those that differ from the file, "" when there are none. Raises
    CheckpointError for an option of the wrong type."""
    values, left = vars(flags), {*MACHINE, *INVOCATION, *keep}
    options = {name: value for name, value in stored.items() if name in values and name not in left}
    for name, value in options.items():
        if name not in flags.given and value is not None and not is_like(value, values[name]):
            expected = type(values[name]).__name__
            raise CheckpointError(f"{source}: its option {name} is {value!r}, expected a {expected}")
    changed = [f"--{n} {values[n]} (was {v})" for n, v in options.items() if n in flags.given and values[n] != v]
    flags.fill(options)
    return f"options of {source}, but {', '.join(changed)}" if changed else ""


def find_start(folder, resume, init_from, *, flag) -> tuple[Path | None, bool]:
    """(file that a training starts from, whether to continue it); (None, False): from random weights. folder: the run's
    checkpoints. resume: "auto", the newest of them if any, or a path. init_from: weights for a new run. flag: the one
    that names the run. Raises UserError where an earlier run would be overwritten, or branched off from anything but
    its newest checkpoint."""
    newest = latest_checkpoint(folder) if folder.is_dir() else None
    if newest is None:
        continues = resume not in (None, "", "auto")
        path = resume if continues else init_from
        return Path(path) if path else None, continues
    held = f"{folder.parent} already holds a run"
    if not resume:
        raise UserError(f"{held} ({newest.name}): --resume auto continues it, another --{flag} starts a new one")
    if resume != "auto" and newest.resolve() != Path(resume).resolve():
        raise UserError(f"{held}, up to {newest.name}: continue {resume} in another --{flag}")
    return newest, True


@contextlib.contextmanager
def open_run(folder, options: dict, dist, *, resume_step: int | None, folders=FOLDERS, wandb=None):
    """The `Run` of a training, which alone writes to its folder; wandb: the project to mirror it to. All ranks call it,
    and none writes before every rank has looked at the folder. Raises UserError when wandb is not installed, or for
    ranks that begin at different steps: what each computes would be wrong for the others."""
    if len(steps := set(gather_list(resume_step))) > 1:
        differing = ", ".join(map(str, sorted(steps)))
        raise UserError(f"the ranks begin at different steps ({differing}): {folder} is not one folder for all of them")
    with lock_folder(folder, "training") if dist.is_main else contextlib.nullcontext():
        if wandb and dist.is_main:  # before the TensorBoard writer, which it mirrors
            try:
                from wandb import init
            except ImportError:
                raise UserError("Weights & Biases is not installed: pip install wandb") from None
            init(project=wandb, name=Path(folder).name, config=options, sync_tensorboard=True, resume="allow")
        with Run(folder, options, main=dist.is_main, resume_step=resume_step, folders=folders) as run:
            yield run


def to_plain(value):
    """`value` in types of JSON: tensors and arrays become lists, paths strings, non-finite numbers None."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, range)):
        return [to_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        return to_plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_json(path, value):
    """Write `value` (see `to_plain`) as readable UTF-8 JSON, atomically."""
    write_text(path, json.dumps(to_plain(value), indent=2, ensure_ascii=False) + "\n", errors="backslashreplace")


def claim_folder(file: Path, settings: dict, *, results: str, otherwise: str) -> None:
    """Record in `file` the settings on which the results of its folder depend, for results of the same settings alone;
    results: what they are. UserError for those of others; otherwise: what to do then."""
    settings = to_plain(settings)
    earlier = read_json(file, dict, what=f"settings of {results}") if file.is_file() else settings
    if changed := [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]:
        changes = "; ".join(f"{name} {earlier.get(name)}, now {settings.get(name)}" for name in changed[:3])
        raise UserError(f"{file.parent} holds {results} made with other settings ({changes}): {otherwise}")
    write_json(file, settings)


class Run:
    """A run folder open for writing by the main process; with `main=False` (other ranks) nothing is written. options:
    a dict. resume_step: the log of an earlier start is dropped from this step on. folders: created inside. Raises
    OSError naming the folder."""

    def __init__(self, folder, options, *, main=True, resume_step=None, folders=FOLDERS):
        self.folder = Path(folder)
        self.main = main
        self._log = self._board = None
        if not main:
            return
        for name in folders:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if (earlier := self.folder / "options.json").exists():
            count = len(list(self.folder.glob("options-*.json")))
            earlier.rename(self.folder / f"options-{count + 1}.json")
        circumstances = {  # enough to repeat the run
            "options": options,
            "command": [sys.executable, *sys.argv],
            "world_size": int(os.environ.get("WORLD_SIZE") or 1),
            "versions": {"python": platform.python_version()} | {n: v for n, v in package_versions().items() if v},
            "platform": platform.platform(),
            "git": git_commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self.write_json("options.json", circumstances)
        if (log := self.folder / "log.jsonl").exists():
            truncate_log(log, math.inf if resume_step is None else resume_step)
        self._log = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        try:
            from torch.utils.tensorboard import SummaryWriter  # 1 to 2 s: only where it is used

            self._board = SummaryWriter(str(self.folder / "tensorboard_log"), purge_step=resume_step)
        except ImportError as error:
            warnings.warn(f"no TensorBoard log ({error}): pip install -r requirements-extra.txt", stacklevel=2)

    def path(self, *parts):
        """Path inside the run folder, whose parent exists on the main process."""
        path = self.folder.joinpath(*parts)
        if self.main:
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, step, group, **scalars):
        """One line of log.jsonl, one TensorBoard point `group/name` per number. Reading a tensor is a host sync."""
        if self._log is None:
            return
        scalars = to_plain(scalars)
        line = {"step": step, "time": round(time.time(), 3), "group": group, **scalars}
        self._log.write(json.dumps(line, ensure_ascii=False) + "\n")
        for name, value in scalars.items():
            if self._board is not None and isinstance(value, (int, float)):
                self._board.add_scalar(f"{group}/{name}", value, step)

    def write_json(self, name, value):
        """Write `value` to the file `name` of the run folder."""
        if self.main:
            write_json(self.folder / name, value)

    def close(self):
        for output in (self._log, self._board):
            if output is not None:
                output.close()
        self._log = self._board = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def package_versions(names=PACKAGES):
    """{package: version, None where it is absent}; by default of those that results depend on."""
    versions = dict.fromkeys(names)
    for package in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def git_commit():
    """Commit of this checkout, with '+changes' where the work tree differs; None without git or repository."""

    def git(*command):
        command = ["git", "-C", str(ROOT), *command]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def read_log(path):
    """The lines of a log.jsonl as dicts, but for a last one torn by a crash. Raises ValueError for any other damage."""
    with open_regular(path) as file:
        *whole, torn = file.read().split(b"\n")  # a whole line ends with a newline
    records = []
    for number, line in enumerate(whole, 1):
        try:
            records.append(parse_json(line, LINE, source=f"{path}, line {number}", what="line of a log"))
        except ValueError:
            if number == len(whole) and not torn:
                break
            raise
    return records


def truncate_log(path, step):
    """Drop the lines of `step` and later, and a torn last line, so that a resumed run repeats nothing. Atomic."""
    records = [record for record in read_log(path) if record.get("step", -1) < step]
    with atomic_write(path) as file:
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


class StepBar(tqdm):
    """Progress over training steps: a bar on a terminal, a line per `report` in a log file; nothing unless `main`."""

    def __init__(self, total, initial=0, *, main=True):
        super().__init__(total=total, initial=initial, unit="step", dynamic_ncols=True, disable=None if main else True)
        self.main, self.since, self.warned = main, (time.perf_counter(), initial), False

    def speed(self, step: int, batch: int) -> tuple[float, float, float]:
        """Seconds since the last call, images per second of them (`batch` a step), and seconds left from `step` on."""
        now, (then, first) = time.perf_counter(), self.since
        self.since, per_step = (now, step), (now - then) / max(1, step - first)
        return now - then, batch / per_step, (self.total - step) * per_step

    def report(self, step, text):
        if not self.disable:
            self.set_postfix_str(text)
        elif self.main:
            say(f"step {step} of {self.total}: {text}")

    def warn(self, text):
        """Print a warning above the bar."""
        self.clear()
        say(f"warning: {text}")


def peak_bytes() -> int:
    """Most memory that this process ever had resident; 0 where the system does not tell."""
    status = Path("/proc/self/status")  # Linux's ru_maxrss begins at the size of the process that started this one
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return 1024 * int(found[1])
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def format_duration(seconds):
    """'42s', '3m 05s', '2h 03m' or '1d 02h': two units are enough for an estimate; '?' when not finite."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(0, round(seconds))
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= length:
            return f"{seconds // length}{unit} {seconds % length // part:02d}{smaller}"
    return f"{seconds}s"
