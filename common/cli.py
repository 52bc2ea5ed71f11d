"""Command lines: one parser class and one way to end a script: `run_script(main, build_parser())`.

Exit status: 0, 1 on a user's mistake or a failing machine (one `error: ...` line on stderr), 2 on misuse of the flags,
130 on Ctrl-C, 143 on SIGTERM. A bug keeps its traceback; WPP_TRACEBACK=1 keeps all.
"""

import argparse
import atexit
import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 2000  # characters of an error line
TIMEOUT = 300.0  # seconds that a collective may take
# Choices of flags that several parsers offer
PRECISIONS = ("fp32", "bf16", "fp16")
FITS = ("crop", "pad", "squash")
FILTERS = ("nearest", "box", "area", "bilinear", "hamming", "bicubic", "lanczos")
SPACES = ("w", "w+", "w++")
EXTRAS = {"gradio": "demo.py", "torch_fidelity": "FID and KID", "tensorboard": "TensorBoard's log"}  # package: stage
STAGES = EXTRAS | {"cv2": "finding and pasting faces"}  # the same, with what requirements.txt lists
STOPPING = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))  # no Windows
RESULT_FLAGS = ("output_dir", "exp_name", "exp_dir", "out")  # folders that scripts write to


class UserError(ValueError):
    """A user's mistake, in one sentence: the file or flag, what is expected, what is there."""


class UsageError(UserError):
    """Flags that parse one by one but not together (exit status 2)."""


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing between here and `run` takes it for a failure of its own."""


class Flags(argparse.Namespace):
    """Parsed flags; `given` holds the names of those on the command line (it is no part of `vars`)."""

    __slots__ = ("given",)

    def fill(self, values: dict) -> dict:
        """Set flags that the user did not give; names that are no flags are ignored. Returns those that changed."""
        flags = vars(self)
        free = {name: value for name, value in values.items() if name in flags and name not in self.given}
        changed = {name: value for name, value in free.items() if flags[name] != value}
        flags.update(changed)
        return changed

    def recommend(self, settings: dict, names, source) -> None:
        """`fill` in those of the flags `names` that `source` recommends, if of the right type; rank 0 says which."""
        flags, names = vars(self), {name.rstrip("?") for name in names}  # of a schema as well
        fitting = {name: value for name, value in settings.items() if name in names and is_like(value, flags[name])}
        changed = {} if flags.get("preset") == "published" else self.fill(fitting)
        text = " ".join(f"--{name} {value}" for name, value in changed.items())
        if text and os.environ.get("RANK") in (None, "", "0"):
            print(f"{source} recommends {text} (--preset published: the paper's settings)", file=sys.stderr)


def is_like(value, default) -> bool:
    """Whether `value` has the type of a flag's default; all numbers are one type, and no default admits anything."""
    numbers = isinstance(value, (int, float)) and isinstance(default, (int, float))
    return default is None or type(value) is type(default) or numbers


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help with the line breaks of the description and the defaults that say something."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, where `--foo_bar` and `--foo-bar` are the same flag however it was declared.
    Numbers are finite, whole ones of at most 64 bits. No result goes into a folder of the project's own code."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs})
        for kind, parse in NUMBERS.items():
            self.register("type", kind, parse)

    def parse_known_args(self, args=None, namespace=None):
        args = self._declared_spelling(list(sys.argv[1:] if args is None else args))
        flags, rest = super().parse_known_args(args, Flags() if namespace is None else namespace)
        if namespace is None:
            spelt = {arg.partition("=")[0] for arg in args}
            flags.given = {action.dest for flag, action in self._option_string_actions.items() if flag in spelt}
            positional = [action for action in self._actions if not action.option_strings]
            flags.given |= {a.dest for a in positional if getattr(flags, a.dest, None) != a.default}
        for name in RESULT_FLAGS:
            folder = getattr(flags, name, None)
            if folder and ROOT in (path := Path(folder).resolve(), *path.parents) and any(path.glob("*.py")):
                self.error(f"--{name} {Path(folder)} is a folder of this project's code: choose another")
        return flags, rest

    def add_hidden_alias(self, old, flag):
        """Accept `old`, an earlier name of `flag`, without a word in the help."""
        self._option_string_actions[old] = self._option_string_actions[flag]

    def _declared_spelling(self, args):
        """`args`, each `--long_flag[=value]` spelt as it was declared. Values are left alone."""
        declared = {flag.replace("_", "-"): flag for flag in self._option_string_actions if flag.startswith("--")}
        end = args.index("--") if "--" in args else len(args)
        parts = [arg.partition("=") for arg in args[:end]]
        return ["".join((declared.get(flag.replace("_", "-"), flag), *value)) for flag, *value in parts] + args[end:]


def number(kind, fits, expected: str):
    """A `type` for flags: a number of a kind that fits; argparse shows what was expected where it does not."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text[:20]!r}")

    return parse


def whole(least=-(2**63), most=2**63 - 1):
    """A `type` for flags: a whole number in a range."""
    return number(int, lambda value: least <= value <= most, f"a whole number from {least} to {most}")


positive_int, count = whole(1), whole(0)
seed_number = whole(0, 2**32 - 1)  # what NumPy and PyTorch both take
finite = number(float, math.isfinite, "a finite number")
positive = number(float, lambda value: 0 < value < math.inf, "a finite number above 0")
NUMBERS = {int: whole(), float: finite}  # what type=int and type=float stand for in every ArgumentParser


def several(kind):
    """A `type` for flags: values of another `type` with commas between, as a tuple."""
    return lambda text: tuple(map(NUMBERS.get(kind, kind), text.split(",")))


def add_device_flags(parser, *, distributed=True):
    """Add `--device` and `--ops`; distributed: and what several processes need."""
    add = parser.add_argument
    add("--device", default="auto", help="auto | cpu | cuda[:i] | mps; auto takes the first there is")
    ops = "kernels: auto (Triton on CUDA, else PyTorch) | ref (PyTorch) | triton; default: $WPP_OPS, else auto"
    add("--ops", choices=("auto", "ref", "triton"), help=ops)
    if not distributed:
        return
    add("--local_rank", type=int, default=0, help="given by torch.distributed.launch; ignored")
    add("--dist_timeout", type=positive, default=TIMEOUT, help="seconds after which a silent process counts as dead")


def require_one_start(flags, published):
    """Raise UsageError unless one of --resume, `published` and --init_from is given, or --resume auto and --init_from:
    weights for where there is no run to continue yet."""
    given = [flag for flag in ("resume", published, "init_from") if getattr(flags, flag)]
    if len(given) > 1 and (flags.resume, given) != ("auto", ["resume", "init_from"]):
        raise UsageError(f"--{given[0]} and --{given[1]} exclude each other: continue a run, or start one from weights")


def run(main, parser, argv=None):
    """Parse `argv` (default: the command line), call `main(args)` and return the exit status, an int. ValueError,
    OSError and lack of memory become one line on stderr; any other exception is a bug and let through."""
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse: 0 after --help, 2 on misuse
        return stop.code or 0
    try:
        with _sigterm_unwinds():
            return int(main(args) or 0)
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    except Terminated:
        return _report("terminated", 143)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():  # `... | head`, which is no error
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes both at exit
            return 0
        message = _one_line(error)
        if message is None or os.environ.get("WPP_TRACEBACK"):
            raise
        return _report(f"error: {message}", 2 if isinstance(error, UsageError) else 1)


def _reader_has_gone() -> bool:
    """Whether nobody reads this process's stdout or stderr any more."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextlib.contextmanager
def _sigterm_unwinds():
    """Let SIGTERM unwind the stack (files are closed, locks released); a second one ends the process at once."""
    owner = os.getpid()

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked worker
            os.kill(os.getpid(), signal.SIGTERM)
        raise Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StopSignal:
    """Orderly stop of a run after its step: `raised` turns true at SIGTERM, Ctrl-C or when the terminal is closed
    (SIGHUP, unless nohup has it ignored); a later one interrupts. Within ECHO_S it is the same one: torchrun passes on
    to its workers what a terminal, pkill or a scheduler sent to all."""

    ECHO_S = 3.0

    def __init__(self):
        self.raised, self._since = False, 0.0
        for number in STOPPING:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def error(self, step: int) -> UserError:
        """The error that a run ends with after its last step, which it has saved."""
        return UserError(f"stopped at step {step}, checkpoint written: --resume auto continues")

    def _handle(self, number, frame):
        if not self.raised:
            self.raised, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > self.ECHO_S:
            raise KeyboardInterrupt


def run_script(main, parser):
    """Parse the command line, call `main(args)`, and end the process with the status of `run`."""
    if hasattr(sys.stdout, "reconfigure"):  # a file name need not be valid UTF-8, a log file shows a line at once
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    exit_process(run(main, parser))


def exit_process(status):
    """End the process with `status`. One of several ranks ends without taking the interpreter apart: a thread of
    torch.distributed that still lets go of a tensor would abort it (SIGABRT; pytorch's pull request 179291)."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _one_line(error):
    """The sentence to show for a user's error; None for a bug, which deserves its traceback."""
    if is_out_of_memory(error):
        text = f"out of memory: {str(error).splitlines()[0] if str(error) else 'the machine has no more'}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
        text += f" ({error.filename2})" if error.filename2 is not None else ""
    elif isinstance(error, ModuleNotFoundError) and error.name in STAGES:
        file = "requirements-extra.txt" if error.name in EXTRAS else "requirements.txt"
        text = f"{STAGES[error.name]} needs the package {error.name}: pip install -r {file}"
    elif isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError):  # never a considered message
        text = str(error) or type(error).__name__
    else:
        return None
    text = " ".join(line.strip() for line in text.splitlines())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."  # a message may quote what a file holds


def is_out_of_memory(error) -> bool:
    """Lack of memory of a GPU, or of the machine: PyTorch raises a RuntimeError that names its allocator."""
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return allocator or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's


def _report(line, status):
    rank = os.environ.get("RANK", "0")
    say(line if rank == "0" else f"{line} (rank {rank})")
    return status


def say(line: str) -> None:
    """Print a line on stderr. A reader that has gone, such as `| tee log`, which Ctrl-C ends first, ends nothing."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
