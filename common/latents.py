"""Latents: drawn from seeds, kept in files that say what they are.

A folder of latents holds `latents.npy` (float32 [N, L, D], the file of the published projector), `latents.json` (names,
space, image size, fingerprint of the generator, losses per image, alignment), and `noise.npz` when the noise maps were
optimised too. This module also reads a bare `.npy` of the published tools, which tells nothing of its origin, and the
projections of rosinality (`.pt`) and of NVIDIA (`projected_w.npz`).
"""

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import numpy as np
import torch

from common.arrays import read_npy, read_npz, require_floats
from common.checkpoint import load_checkpoint, require_file
from common.cli import SPACES, UsageError, UserError
from common.files import atomic_write, read_json
from common.runs import to_plain

MAX_SEEDS = 10_000_000  # of one command: a longer list would fill the memory before the first image
RENDERING = {"seeds?": [int], "noise?": (str, None), "noise_seed?": (int, None)}
# Of latents.json (common/files.py)
SCHEMA = {"names": [str], "shape": [int], "size": int, "space?": (str, None), "fingerprint?": (str, None)}
SCHEMA |= {"losses?": ({str: [(float, None)]}, None), "alignment?": ([object], None), "noise?": (bool, None)}
SCHEMA |= {"extra?": ({"condition?": {"values": [[float]]}, "rendering?": RENDERING}, None)}


def parse_seeds(text, flag="--seeds"):
    """'0-35,40' -> [0, 1, ..., 35, 40], in the order given. Raises UsageError naming the part that is none."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= 2**32:  # the generator takes 32 bits
            raise UsageError(f"{flag} {text}: {part.strip()!r} is no seed (0 to {2**32 - 1}), no range like 0-35")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise UsageError(f"{flag} {text[:40]}: more than {MAX_SEEDS:,} seeds")
        seeds += range(first, last + 1)
    return seeds


def parse_layers(text, n_tokens, flag="--layers"):
    """'0-3,8' -> [0, 1, 2, 3, 8]; UsageError when it cannot be read, UserError beyond the last layer."""
    try:
        layers = parse_seeds(text)
    except ValueError:
        raise UsageError(f"{flag} {text}: expected layers such as 0-3 or 0-3,8") from None
    if max(layers) >= n_tokens:
        raise UserError(f"{flag} {text}: this generator has the layers 0-{n_tokens - 1}")
    return layers


def draw_z(seeds, n_tokens, dim, *, w_space=False):
    """Standard normal z, float32 [N, n_tokens, dim] on the CPU; image i depends on seeds[i] alone, neither batch size
    nor device changes it. W++ draws one vector per token; with `w_space` one vector is repeated over the tokens."""
    z = torch.empty(len(seeds), n_tokens, dim)
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        z[index] = torch.randn(1 if w_space else n_tokens, dim, generator=generator)  # [1|T, D] -> [T, D]
    return z


def n_tokens(size):
    """Latents per image of a generator for `size` x `size`: 2 (log2(size) - 1). ValueError off powers of two."""
    if size < 8 or size & (size - 1):
        raise ValueError(f"image size {size}: expected a power of two from 8")
    return 2 * (size.bit_length() - 2)


@dataclass
class Latents:
    """Latents and the metadata of their file; of other programs' only a `.pt` has noise, none fingerprint or losses."""

    latents: torch.Tensor  # float32 [N, L, D], CPU
    names: list[str]  # N, in the order of the latents
    space: str | None
    size: int
    fingerprint: str | None = None  # of the generator
    losses: dict[str, list[float]] = field(default_factory=dict)  # each N values
    alignment: list | None = None  # N transforms, as align_faces.py records them, or None
    noise: list[torch.Tensor] | None = None  # per layer, float32 [N, 1, r, r]
    extra: dict = field(default_factory=dict)
    path: Path | None = None

    def __len__(self):
        return len(self.latents)


def save_latents(folder, w, **metadata):
    """Write a folder of latents; every file is complete on the disk before the first of them takes its name. w: float
    [N, L, D], tensor or array, L = n_tokens(size); for space 'w' also [N, D], repeated over L. metadata: fields of
    `Latents`. Raises ValueError when the parts do not fit each other or a latent is not finite; OSError naming the
    file."""
    folder, w, saved = Path(folder), _array(w), Latents(w, **metadata)
    if saved.space not in SPACES:
        raise ValueError(f"space {saved.space!r}: expected one of {', '.join(SPACES)}")
    if w.ndim == 2 and saved.space == "w":
        w = np.repeat(w[:, None], n_tokens(saved.size), axis=1)  # [N, D] -> [N, L, D]
    _check_latents(w, folder, saved.size)
    if saved.space == "w" and (w != w[:, :1]).any():
        raise ValueError(f"{folder}: latents of space w repeat one vector over all tokens, these differ: they are w+")
    noise = None if saved.noise is None else [_array(layer) for layer in saved.noise]
    parts = {"names": saved.names} | ({} if saved.alignment is None else {"alignment": saved.alignment})
    parts |= {f"losses[{name!r}]": values for name, values in saved.losses.items()}
    parts |= {f"noise[{index}]": layer for index, layer in enumerate(noise or [])}
    for part, values in parts.items():
        if len(values) != len(w):
            raise ValueError(f"{folder}: {len(w)} latents, but {len(values)} in {part}")

    info = {"format": 1, "names": [str(name) for name in saved.names], "space": saved.space, "size": saved.size}
    info |= {"shape": w.shape, "fingerprint": saved.fingerprint, "losses": saved.losses, "alignment": saved.alignment}
    text = json.dumps(to_plain(info | {"noise": noise is not None, "extra": saved.extra}), ensure_ascii=False, indent=1)
    with ExitStack() as files:  # left in reverse order: the description takes its name last
        files.enter_context(atomic_write(folder / "latents.json")).write(text.encode(errors="backslashreplace"))
        if noise is not None:
            layers = {f"noise_{index:02d}": layer for index, layer in enumerate(noise)}
            np.savez(files.enter_context(atomic_write(folder / "noise.npz")), **layers)
        # numpy.save, but through `file.write`, whose error on a full disk carries its errno
        file = files.enter_context(atomic_write(folder / "latents.npy"))
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(w))
        file.write(w.data)
    if noise is None:
        (folder / "noise.npz").unlink(missing_ok=True)  # of an earlier save


def _array(values):
    values = values.detach().cpu() if isinstance(values, torch.Tensor) else values
    return np.ascontiguousarray(values, dtype=np.float32)


def _check_latents(latents, path, size):
    length, found = n_tokens(size), list(latents.shape)
    if latents.ndim != 3 or found[1] != length:
        raise ValueError(f"{path}: latents of shape {found}; expected [N, {length}, D] for image size {size}")
    finite = np.isfinite(latents).all(axis=(1, 2))
    if not finite.all():
        raise ValueError(f"{path}: latent {int(finite.argmin())} has values that are not finite")


def load_latents(path, *, expect_space=None, expect_shape=None, expect_fingerprint=None):
    """Latents from a folder, its `latents.npy`, or another program's file: a bare `.npy` (see `_bare`), `w` of NVIDIA's
    `projected_w.npz`, or rosinality's `.pt`. expect_space: a space or several; expect_shape: (L, D) of one image;
    expect_fingerprint: the generator's, or several that will do. What a bare file does not tell is taken as
    expected. Raises FileNotFoundError, or ValueError naming both sides."""
    path = Path(path)
    file = path / "latents.npy" if path.is_dir() else path
    sidecar = file.with_name("latents.json")
    spaces = (expect_space,) if isinstance(expect_space, str) else expect_space
    if file.suffix == ".pt":
        latents = _projected(file, spaces, expect_shape)
    elif file.suffix == ".npz":  # of stylegan2-ada-pytorch's and stylegan3's projector.py: [1, L, D]
        arrays = read_npz(file, "latents file (.npz)")
        if "w" not in arrays:
            raise ValueError(f"{file} is no projected_w.npz: expected floating-point latents under the name w")
        latents = _bare(require_floats(arrays["w"], file), file, spaces, expect_shape)
    else:
        array = require_floats(read_npy(file, "latents file (.npy)"), file)
        described = file.name == "latents.npy" and sidecar.exists()
        latents = _described(array, file, sidecar) if described else _bare(array, file, spaces, expect_shape)
    latents.path = path
    _expect(latents, spaces, expect_shape, expect_fingerprint)
    return latents


def _projected(file, spaces, expect_shape):
    """rosinality's projector.py: {path of an image: {"latent": [L, D] or, of W, [D], "noise": [1, 1, r, r] each}}."""
    images = load_checkpoint(require_file(file, "latents file (.pt)"))
    ws = [entry.get("latent") if isinstance(entry, dict) else None for entry in images.values()]
    if not ws or not all(torch.is_tensor(w) and w.is_floating_point() for w in ws):
        raise ValueError(f"{file} is no projection of rosinality's projector.py: expected a latent of each image")
    maps = [entry.get("noise") for entry in images.values()]
    try:
        array = _array(torch.stack(ws))
        noise = None if None in maps else [torch.cat(layer).detach().float() for layer in zip(*maps, strict=True)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: latents or noise maps of different shapes ({error})") from error
    array = require_floats(array, file)
    latents = _bare(array[:, None] if array.ndim == 2 else array, file, spaces, expect_shape)  # [N, D]: N images
    latents.names = [PureWindowsPath(str(path)).name for path in images]  # takes either kind of slash
    if noise is not None and not all(bool(torch.isfinite(layer).all()) for layer in noise):
        raise ValueError(f"{file}: noise maps with values that are not finite")
    latents.noise = noise
    return latents


def _described(array, file, sidecar):
    info = read_json(sidecar, SCHEMA, what="description of latents")
    if list(array.shape) != info["shape"] or len(info["names"]) != len(array):
        described = f"{sidecar.name} describes {info['shape']} with {len(info['names'])} names"
        raise ValueError(f"{file} has the shape {list(array.shape)}, but {described}")
    _check_latents(array, file, info["size"])
    noise = None
    if info.get("noise"):
        layers = read_npz(path := file.with_name("noise.npz"), "noise file")
        noise = [torch.from_numpy(require_floats(layers[name], path)) for name in sorted(layers)]
    losses, extra = info.get("losses") or {}, info.get("extra") or {}
    space, fingerprint, alignment = (info.get(name) for name in ("space", "fingerprint", "alignment"))
    w = torch.from_numpy(array)
    return Latents(w, info["names"], space, info["size"], fingerprint, losses, alignment, noise, extra)


def _bare(array, file, spaces, expect_shape):
    """Latents of a file that says nothing: [N, L, D]; [N, 1, D], one vector per image (W); or two axes. [L, D] is how
    this field saves one face, [N, D] how it saves N vectors of W. L rows are one face to a W++ generator; where N
    vectors of W and a W+ face are both expected they could be either, and are refused."""
    length = array.shape[1] if array.ndim == 3 else 0
    expected = "[N, L, D], L even and at least 4"
    space = spaces[0] if spaces is not None and len(spaces) == 1 else None
    if expect_shape is not None:
        length, dim = expect_shape
        expected = f"[N, {length}, {dim}], or [{length}, {dim}] of one face"
        one_face, takes_w = array.shape == (length, dim), spaces is None or "w" in spaces
        if one_face and takes_w and space is None:
            either = f"one face in W+ or {length} faces in W: save the former as [1, {length}, {dim}]"
            raise ValueError(f"{file}: {[length, dim]} may be {either}, the latter as [{length}, 1, {dim}]")
        if one_face and not takes_w:
            array = array[None]  # [L, D] -> [1, L, D]
        elif array.shape[1:] in ((dim,), (1, dim)):
            array, space = np.repeat(array.reshape(len(array), 1, -1), length, axis=1), "w"
        length = array.shape[1] if array.ndim == 3 else 0
    if length < 4 or length % 2:
        raise ValueError(f"{file}: latents of shape {list(array.shape)}; expected {expected}")
    size = 2 ** (length // 2 + 1)
    _check_latents(array, file, size)
    return Latents(torch.from_numpy(array), [f"{index:05d}" for index in range(len(array))], space, size)


def _expect(latents, spaces, shape, fingerprint):
    if spaces is not None and latents.space is not None and latents.space not in spaces:
        raise ValueError(f"{latents.path}: latents of space {latents.space}; expected {' or '.join(spaces)}")
    found = tuple(latents.latents.shape[1:])
    if shape is not None and found != tuple(shape):
        per_image = f"latents of shape {list(found)} per image (size {latents.size})"
        raise ValueError(f"{latents.path}: {per_image}; the generator takes {list(shape)}")
    accepted = (fingerprint,) if fingerprint is None or isinstance(fingerprint, str) else tuple(fingerprint)
    if None not in accepted and latents.fingerprint not in (None, *accepted):
        given, made = ", trained from ".join(accepted), f"latents of the generator {latents.fingerprint}"
        raise ValueError(f"{latents.path}: {made}; the checkpoint given is {given}")
