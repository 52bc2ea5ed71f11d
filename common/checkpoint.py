"""Checkpoints: written so that a crash or a full disk cannot harm the previous one, read so that no file can run code.
A `.pt` is a nested dictionary of tensors and plain values, an export (`.safetensors`) a flat dictionary of tensors with
JSON metadata in its header."""

import argparse
import hashlib
import json
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from common.files import atomic_write, open_regular, parse_json

PLAIN = (str, int, float, bool, type(None))
DIGEST = "tensors_fingerprint"  # in the header of a .safetensors file that was written here


class CheckpointError(ValueError):
    """A file that is not the checkpoint it should be, or a state that no checkpoint can hold."""


def save_checkpoint(path, state):
    """Write `state`, nested dicts, lists and tuples of tensors and plain values, to `path`, atomically. Raises
    CheckpointError, before anything is written, naming the first other entry; OSError naming `path` (full disk)."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: a checkpoint is a dict, not a {type(state).__name__}")
    _require_plain(state, "state")
    with atomic_write(path) as file:
        torch.save(state, file)


def _require_plain(value, name):
    """Exact types: a subclass (numpy.float64, a named tuple) pickles as its own class and is refused on reading."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in PLAIN:
                raise CheckpointError(f"{name} has the key {key!r} of type {type(key).__name__}; use str or int")
            _require_plain(item, f"{name}[{key!r}]")
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{name}[{index}]")
    elif kind not in (*PLAIN, torch.Tensor, torch.nn.Parameter):
        raise CheckpointError(f"{name} is a {kind.__module__}.{kind.__qualname__}; expected tensors or plain values")


def save_safetensors(path, tensors, metadata):
    """Write a flat dict of named tensors, and JSON values with their fingerprint into the header, atomically."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, DIGEST: fingerprint(tensors)}
    header = {str(name): json.dumps(value, sort_keys=True) for name, value in metadata.items()}
    data = save(tensors, header)
    end = 8 + int.from_bytes(data[:8], "little")  # of the header, which safetensors writes in a random order
    text = json.dumps(json.loads(data[8:end]), ensure_ascii=False, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text + data[end:])


def require_file(path, what="file"):
    """Path of a file that exists, is not empty and is not a web page or git-lfs pointer saved under its name; `what`:
    the kind of file expected. Raises FileNotFoundError or CheckpointError with the sentence to show."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such {what}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; expected a {what}")
    with open_regular(path) as file:  # neither a pipe, which would block, nor a device, which has no end
        head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise CheckpointError(f"{path} is empty; expected a {what}, save or download it again")
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(f"{path} is a web page, not a {what}: a log-in, quota or error page; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the {what}: run `git lfs pull` where it came from")
    return path


def load_checkpoint(path, map_location="cpu"):
    """The dictionary saved in `path`, tensors on `map_location`; also of PyTorch before 1.6. Never runs code from the
    file: of Python objects it admits argparse.Namespace alone, the plain values that rosinality's train.py saves as
    `args`. Raises FileNotFoundError, or CheckpointError, in one sentence, for a damaged or another file."""
    path = require_file(path, "checkpoint")
    _require_whole_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch's advice on the pickle protocol: no reader can act on it
            state = torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything at all
        if refused := re.search(r"GLOBAL (\S+)", str(error)):  # the pickle opcode that names a class or function
            objects = f"{path} holds Python objects ({refused[1]}) besides tensors, which could run code"
            raise CheckpointError(f"{objects}: re-save its state_dict from the program that wrote it") from error
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0][:200]
        damage = f"truncated, damaged or not a PyTorch checkpoint ({type(error).__name__}: {reason})"
        raise CheckpointError(f"{path} is {damage}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a dictionary of tensors")
    return state


def _require_whole_archive(path, every_byte=False):
    """Refuse a zip checkpoint that lost its end, where the directory is; with `every_byte`, for files of our own, also
    one that is no zip (zeros after a power cut) or fails a checksum."""
    with open(path, "rb") as file:
        magic = file.read(10)
    if magic[8:] == b'{"':
        raise CheckpointError(f"{path} is a safetensors file; expected a PyTorch checkpoint (.pt)")
    if magic[:4] != b"PK\x03\x04":
        if every_byte:
            raise CheckpointError(f"{path} is damaged from its first byte on; use an earlier checkpoint")
        return
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:  # torch.save compresses nothing
                raise CheckpointError(f"{path} is compressed, or claims more than its {size:,} bytes; save it again")
            damaged = archive.testzip() if every_byte else None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeError) as error:
        raise CheckpointError(f"{path} is truncated after {size:,} bytes; save or download it again") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged (record {damaged}); use an earlier checkpoint")


def load_safetensors(path):
    """(tensors, metadata) of a `.safetensors` file, on the CPU. Raises as `load_checkpoint`, also for a changed bit."""
    from safetensors import SafetensorError, safe_open

    def value(text):
        try:
            return parse_json(text, object, source="header", what="JSON")
        except ValueError:  # written by another program: the format itself knows only strings
            return text

    path = require_file(path, "safetensors file")
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = {name: value(text) for name, text in (file.metadata() or {}).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated, damaged or not a safetensors file ({error})") from error
    if metadata.pop(DIGEST, (own := fingerprint(tensors))) != own:
        raise CheckpointError(f"{path} is damaged: its tensors are not those that were written; copy it again")
    return tensors, metadata


def load_export(path):
    """`load_safetensors` of an exported model, which may leave out the tensors that it shares with its `base`, another
    export in its folder. Raises CheckpointError when that file is absent or holds other weights."""
    path = Path(path)
    tensors, metadata = load_safetensors(path)
    base = metadata.get("base")
    if base is None:
        return tensors, metadata
    if not isinstance(base, dict) or not all(isinstance(base.get(name), str) for name in ("file", "fingerprint")):
        raise CheckpointError(f"{path}: `base` of its header does not name a file and a fingerprint")
    file = path.with_name(Path(base["file"]).name)
    if not file.exists():
        raise CheckpointError(f"{path} holds only what differs from {file.name}, which must lie in the same folder")
    shared, header = load_safetensors(file)
    if (found := header.get("fingerprint")) != (expected := base["fingerprint"]):
        raise CheckpointError(f"{path} belongs to a {file.name} with the fingerprint {expected}; this one has {found}")
    return {**shared, **tensors}, metadata


def fingerprint(state_dict):
    """16 hex digits that name a network's exact weights: sha256 over the sorted (name, dtype, shape, bytes)."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def latest_checkpoint(folder):
    """Newest valid `*.pt` in `folder` by the number its name ends with, or None; warns of damaged ones."""
    numbered = [(re.search(r"(\d+)$", path.stem), path) for path in Path(folder).glob("*.pt")]
    for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True):
        try:
            _require_whole_archive(require_file(path, "checkpoint"), every_byte=True)
        except CheckpointError as error:
            warnings.warn(f"{error}: passed over", stacklevel=2)
        else:
            return path
    return None


def load_strictly(network: torch.nn.Module, state: dict, source) -> None:
    """load_state_dict that must fit in every name (but the network's `unused`) and shape, or raises CheckpointError."""
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: getattr(value, "shape", type(value).__name__) for name, value in state.items()}
    wrong = [f"{name} is absent" for name in own if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in own and name not in getattr(network, "unused", ())]
    different = {name: shape for name, shape in found.items() if shape != own.get(name, shape)}
    shapes = {name: shape if isinstance(shape, str) else list(shape) for name, shape in different.items()}
    wrong += [f"{name} is {shape}, expected {list(own[name])}" for name, shape in shapes.items()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source} holds another architecture: {'; '.join(wrong[:3])}{more}")
    network.load_state_dict(state)


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict, source) -> None:
    """Load the moments of Adam or a relative of it; its settings stay. Raises CheckpointError where shapes differ."""
    groups = optimiser.state_dict()["param_groups"]
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    try:
        if (found := sum(len(group["params"]) for group in state["param_groups"])) != len(parameters):
            raise ValueError(f"moments of {found} tensors for {len(parameters)}")
        for i, moments in state["state"].items():  # the optimisers do not look at shapes
            shapes = [list(moments[name].shape) for name in ("exp_avg", "exp_avg_sq")]
            if shapes != [list(parameters[i].shape)] * 2:
                raise ValueError(f"moments {shapes[0]} for {list(parameters[i].shape)}")
        optimiser.load_state_dict({"state": state["state"], "param_groups": groups})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{source} belongs to another network ({error})") from None
