"""What a training run begins with: weights for the backbone, and the checks of a continued run."""

from __future__ import annotations

from pathlib import Path

from common.checkpoint import CheckpointError, load_strictly
from common.cli import UserError
from common.weights import find
from model import Generator, load_generator
from perceptual.arcface import arcface_state
from pSp.psp import part, pSp


def begin_backbone(net: pSp, init: str, weights_dir=None) -> str:
    """Load IR-SE50 ArcFace into input_layer and body of the encoder, as published; returns what was loaded.

    init: auto (where the file is found and fits), none, or a file, which must fit (UserError, CheckpointError).
    """
    if init == "none":
        return "random weights"
    config = net.config
    fits = (config.width, config.depth, config.mode, config.input_nc) == (64, 50, "ir_se", 3)
    path = find("arcface_ir_se50", weights_dir) if init == "auto" else Path(init)
    if init == "auto" and not (path and fits):
        return f"random weights (IR-SE50 ArcFace {'has another shape' if path else 'is not here'})"
    if not fits:
        raise UserError(
            f"--encoder_init {path} is an IR-SE50 of width 64, this encoder has the depth {config.depth}, "
            f"the width {config.width} and the mode {config.mode}"
        )
    state = arcface_state(path)
    for name in ("input_layer", "body"):
        load_strictly(getattr(net.encoder, name), part(state, name), path)
    return str(path)


def require_size(output_size: int | None, generator: Generator, path) -> None:
    """UserError when --output_size, which the file makes needless, contradicts it."""
    size = generator.config.size
    if output_size not in (None, size):
        raise UserError(f"--output_size {output_size}, but {path} is a generator of {size} px; leave the flag out")


def require_same(net: pSp, flags: dict, source, generator_path=None) -> None:
    """A continued run keeps its networks: CheckpointError when a flag, or another generator file, asks for others."""
    require_size(flags["output_size"], net.decoder, source)
    config = net.config
    stored = {
        "encoder_type": config.encoder_type,
        "encoder_width": config.width,
        "encoder_depth": config.depth,
        "encoder_mode": config.mode,
        "input_size": config.input_size,
    }
    differing = [
        f"--{name} {flags[name]} here, {value} in the file"
        for name, value in stored.items()
        if flags[name] not in (None, 0, value)
    ]
    if differing:
        raise CheckpointError(f"{source} holds another encoder: {'; '.join(differing)}")
    if generator_path is not None and load_generator(generator_path).fingerprint != net.decoder.fingerprint:
        raise CheckpointError(f"{source} was trained on another generator than {generator_path}")
