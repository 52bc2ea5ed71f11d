"""Reader of the network pickles of NVlabs/stylegan2-ada-pytorch and NVlabs/stylegan3 without running anything in them.

Such a `.pkl` is a pickle of {"G", "D", "G_ema", ...}. Each module in it is a call of
`torch_utils.persistence._reconstruct_persistent_obj` on its class name, attributes and Python source, which NVIDIA's
own reader executes. Here that call keeps class name and attributes; the few other names that such a pickle may ask for
are replaced as well, and every name beyond them is refused.
"""

import io
import math
import pickle
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from common.checkpoint import PLAIN, CheckpointError, require_file

NETWORKS = ("G", "D", "G_ema")
DEEPEST = 16  # modules within modules; a StyleGAN2 network has five levels
MOST = 2000  # modules of a network, a shared one counted at each place; a StyleGAN2 network has about a hundred


@dataclass
class Layer:
    """A module."""

    kind: str  # the name of its class
    values: dict  # its plain attributes


@dataclass
class Network:
    """A module with all that is in it, by dotted name; the network itself is the layer ""."""

    layers: dict[str, Layer] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # parameters and buffers


def read_networks(path) -> dict[str, Network]:
    """The networks G, D and G_ema of an NVIDIA pickle, as far as it has them. Raises CheckpointError for all else."""
    path = require_file(path, "network pickle")
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"PK\x03\x04":
        raise CheckpointError(f"{path} is a PyTorch checkpoint, no network pickle: give it a name that ends with .pt")
    if head[:1] != b"\x80":  # the opcode that every pickle since protocol 2 begins with
        raise CheckpointError(f"{path} is not a pickle; expected a network pickle of NVIDIA's (.pkl)")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's on TypedStorage, the form that pickled tensors have
            content = _Unpickler(file, path).load()
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}; expected NVIDIA's dictionary of networks")
        modules = {name: content[name] for name in NETWORKS if isinstance(content.get(name), _Module)}
        networks = {name: Network() for name in modules}
        for name, module in modules.items():
            _collect(module, "", networks[name])
    except (OSError, MemoryError, CheckpointError):
        raise
    except Exception as error:  # a damaged pickle can raise anything at all
        if refused := re.search(r"GLOBAL (\S+)", str(error)):  # torch's reader of the numbers of a tensor
            raise _refusal(path, refused[1]) from error
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        damaged = f"{path} is truncated, damaged or not one of NVIDIA's network pickles ({reason})"
        raise CheckpointError(damaged) from error
    if not networks:
        raise CheckpointError(f"{path} holds none of the networks {', '.join(NETWORKS)}")
    return networks


class _Module:
    """A persistent object as it lies in the file: nothing of its class exists here."""

    __slots__ = ("kind", "state")

    def __init__(self, meta):
        if meta["type"] != "class" or not isinstance(meta["class_name"], str) or not isinstance(meta["state"], dict):
            raise ValueError("a persistent object that is no module")
        self.kind, self.state = meta["class_name"], meta["state"]


class _DType:
    """numpy.dtype of a number."""

    __slots__ = ("code", "order")

    def __init__(self, code, align=False, copy=True):
        if not re.fullmatch(r"[biuf][1248]", code):
            raise ValueError(f"numpy numbers of type {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError(f"numpy's byte order {state[1]!r}")
        self.order = state[1]


class _Array:
    """A numpy array, ignored: they occur only in the attributes of StyleGAN3."""

    __slots__ = ()

    def __init__(self, *content):
        pass

    __setstate__ = __init__


def _number(dtype, data):
    """numpy.float64(1.41) and the like, as Python's number."""
    import numpy as np

    return np.frombuffer(data, dtype=dtype.order + dtype.code)[0].item()


class _Tensor:
    """A tensor, or the numbers [n] of one, out of the pickle's reach: BUILD would call torch.Tensor.__setstate__."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def _storage(data):
    """The numbers of a tensor, which lie in the pickle as a file of torch.save within the file."""
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return _Tensor(torch.empty(0, dtype=storage.dtype).set_(storage))


def _tensor(storage, offset, size, stride, *rest):
    if math.prod(size) > storage.value.numel():
        raise ValueError(f"a tensor {list(size)} of {storage.value.numel()} numbers")
    return _Tensor(storage.value.as_strided(size, stride, offset))  # checks the bounds; set_ would enlarge a storage


class _Call:
    """Object given to the pickle for a name: a function that it can call but not change."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise ValueError("the pickle sets attributes of a function")


ALLOWED = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Call(_Module),
    ("dnnlib.util", "EasyDict"): dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *rest: data),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch.storage", "_load_from_bytes"): _Call(_storage),
    ("numpy", "dtype"): _Call(_DType),
    ("numpy", "ndarray"): _Call(_Array),
}
for _numpy in ("numpy.core", "numpy._core"):  # before and since numpy 2
    ALLOWED[f"{_numpy}.multiarray", "scalar"] = _Call(_number)
    ALLOWED[f"{_numpy}.multiarray", "_reconstruct"] = _Call(_Array)
    ALLOWED[f"{_numpy}.numeric", "_frombuffer"] = _Call(_Array)


def _refusal(path, name: str) -> CheckpointError:
    foreign = f"{path} asks for {name!r}, which is no part of a StyleGAN2 network of NVIDIA's"
    return CheckpointError(f"{foreign}; reading it could run code, so it is refused")


class _Unpickler(pickle.Unpickler):
    """pickle calls only what `find_class` returned: nothing is imported, nothing outside ALLOWED is reached."""

    def __init__(self, file, path):
        super().__init__(file)
        self.path = path

    def find_class(self, module, name):
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "dnnlib.tflib.network":
            raise CheckpointError(f"{self.path} is a TensorFlow pickle, which legacy.py of NVlabs/stylegan3 converts")
        raise _refusal(self.path, f"{module}.{name}")


def _collect(module: _Module, prefix: str, network: Network, depth: int = 0) -> None:
    """Enter `module` and all below it in `network`, under dotted names that begin with `prefix`."""
    if depth > DEEPEST or len(network.layers) > MOST:
        raise ValueError(f"more than {MOST} modules, or {DEEPEST} within each other")
    state = module.state
    plain = {name: value for name, value in state.items() if type(value) in PLAIN}
    network.layers[prefix.removesuffix(".")] = Layer(module.kind, plain)
    for group in ("_parameters", "_buffers"):  # frozen layers (--freezed) keep their weights as buffers
        for name, value in state[group].items():
            if isinstance(value, _Tensor) and isinstance(value.value, torch.Tensor):
                network.tensors[prefix + name] = value.value
            elif value is not None:
                raise ValueError(f"{prefix}{name} is a {type(value).__name__}, not a tensor")
    for name, child in state["_modules"].items():
        if isinstance(child, _Module):
            _collect(child, f"{prefix}{name}.", network, depth + 1)
        elif child is not None:
            raise ValueError(f"{prefix}{name} is a {type(child).__name__}, not a module")
