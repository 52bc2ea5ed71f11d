"""Start of an encoder's training: the file it continues or takes its weights from, its network, its images."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset

from common.checkpoint import CheckpointError, load_checkpoint, load_strictly
from common.cli import UserError
from common.runs import find_start
from dataset import open_dataset
from model import Generator, load_generator
from pSp.data_configs import DATASETS, find_path, generator_path, training_path
from pSp.encoders import EncoderConfig, init_backbone
from pSp.psp import RESTYLE_PASSES, load_psp, pSp, psp_from_state, psp_state, require_generator
from pSp.settings import GRADUAL, IDENTITY, INTO_W, EncoderFlags

IDENTITY_SAMPLES = 2_000  # generated faces to which IdentityStyleEncoder's function of the embedding is fitted
FIT_BATCH = 20  # of these faces at a time
MEAN_SAMPLES = 10_000  # of the average w, as published


class Start(NamedTuple):
    """A checkpoint, its file, and whether it is continued; no checkpoint: from scratch."""

    state: dict | None
    path: Path | None
    continues: bool


def read_start(exp_dir, resume, checkpoint_path, init_from) -> Start:
    """Find and read what a run starts from; raises as common.runs.find_start. checkpoint_path, the published flag,
    continues a checkpoint; one without optimiser state gives its weights alone."""
    if checkpoint_path and "optimiser" in load_weights(checkpoint_path):
        resume = checkpoint_path
    path, continues = find_start(Path(exp_dir) / "checkpoints", resume, init_from or checkpoint_path, flag="exp_dir")
    return Start(load_weights(path) if path else None, path, continues)


def open_generator(start: Start, given: str | None, exp_dir, *, train_decoder: bool, device) -> Generator | None:
    """The generator to invert into; None: the one that the checkpoint holds."""
    path = generator_path(given, exp_dir) if start.state is None else find_path(given, "stylegan")
    return load_generator(path, device) if path and not (start.continues and train_decoder) else None


def load_weights(path: str | Path) -> dict:
    """A checkpoint, or an exported encoder with the generator beside it in the shape of one."""
    return psp_state(load_psp(path), {}) if Path(path).suffix.lower() == ".safetensors" else load_checkpoint(path)


def build_network(flags: EncoderFlags, start: Start, generator: Generator | None, weights_dir=None) -> tuple[pSp, str]:
    """The network to train, on `generator` or the one of the checkpoint, and in words where it comes from.
    CheckpointError where a continued run's would change."""
    state, source, continues = start
    n_iters, stored = flags.n_iters_per_batch, psp_from_state(state, source) if state is not None else None
    if continues:
        require_same(stored.config, flags, source)
        require_generator(source, stored.decoder.fingerprint, generator)
        stored.n_iters = n_iters or stored.n_iters if stored.refines else 1
        return stored, f"continuing {source}"
    passes = n_iters or (RESTYLE_PASSES if flags.input_nc == 6 else 1)
    if stored is not None and passes > 1 and not stored.refines:
        stored = widen_input(stored, passes, source)
    if generator is None:
        stored.step = 0
        return stored, f"a new run from the encoder and generator of {source}"
    offsets = flags.start_from_latent_avg or (stored is not None and stored.start_from_latent_avg)
    options = {"latent_avg": generator.mean_latent(MEAN_SAMPLES), "start_from_latent_avg": offsets}
    if stored is not None:
        net = pSp(stored.config, generator, **options, n_iters=n_iters or stored.n_iters)
        load_strictly(net.encoder, stored.encoder.state_dict(), source)
        return net, f"a new run from the encoder of {source}"
    kind = flags.encoder_type or (INTO_W if flags.learn_in_w else GRADUAL)
    input_nc = 6 if n_iters is not None and n_iters > 1 else flags.input_nc
    shape = {"encoder_type": kind, "width": flags.encoder_width, "input_nc": input_nc}
    config = EncoderConfig.for_generator(generator.config, **shape)
    net = pSp(config, generator, **options, n_iters=n_iters or RESTYLE_PASSES)
    origin = f"a new run on {generator.path}, backbone from {init_backbone(net.encoder, weights_dir)}"
    net.to(generator.token.device)
    if kind == IDENTITY:
        fit_to_samples(net)
        origin += f", identity fitted to {IDENTITY_SAMPLES:,} generated faces"
    return net, origin


@torch.no_grad()
def fit_to_samples(net: pSp) -> None:
    """Fit IdentityStyleEncoder's units and function of the embedding to faces that the generator draws, whose w is
    known. The same on all ranks."""
    generator, draw, embeddings, offsets = net.decoder, torch.Generator().manual_seed(0), [], []
    for _ in range(IDENTITY_SAMPLES // FIT_BATCH):
        w = generator.get_latent(generator.draw_z(FIT_BATCH, draw).to(net.latent_avg.device))
        images = net.face_pool(net.render(w)).clamp(-1, 1)
        embeddings.append(net.encoder.embed(net.fit(images)).cpu())
        offsets.append((w - net.latent_avg).cpu())
    net.encoder.fit(torch.cat(embeddings), torch.cat(offsets))


def widen_input(net: pSp, n_iters: int, source) -> pSp:
    """The start of a refining encoder (ReStyle) from `net`, one of a single pass: the first convolution does not see
    the reconstruction yet, and each pass gives 1 / n_iters of the offsets, so that all together give the w of `net`.
    Whole offsets in each pass would overshoot (docs/results/inversion.md). Raises CheckpointError."""
    blind, whole = net.config.encoder_type == IDENTITY, not net.start_from_latent_avg
    if blind or whole:
        what = f"an {IDENTITY}, which sees a face alone" if blind else "an encoder that gives w, not offsets"
        raise CheckpointError(f"{source} holds {what}: it cannot start one of several passes")
    state = net.encoder.state_dict()
    colours = state["input_layer.0.weight"]  # [width, 3, 3, 3]
    state["input_layer.0.weight"] = torch.cat([colours, torch.zeros_like(colours)], 1)  # [width, 6, 3, 3]
    for name in state:
        if name.rpartition(".")[0].endswith("linear"):  # the last layer of every encoder, one or one per token
            state[name] = state[name] / n_iters
    wide = pSp(replace(net.config, input_nc=6), net.decoder, net.latent_avg, n_iters=n_iters)
    load_strictly(wide.encoder, state, source)
    return wide


def require_same(config: EncoderConfig, flags: EncoderFlags, source) -> None:
    """Raise CheckpointError when flags ask for another encoder than the one that is continued."""
    stored = {"encoder_type": config.encoder_type, "encoder_width": config.width, "input_nc": config.input_nc}
    kind = flags.encoder_type or (INTO_W if flags.learn_in_w else None)
    here = {"encoder_type": kind, "encoder_width": flags.encoder_width, "input_nc": flags.input_nc}
    differing = [f"--{n} {here[n]} here, {v} in the file" for n, v in stored.items() if here[n] not in (None, 0, v)]
    if differing:
        raise CheckpointError(f"{source} holds another encoder: {'; '.join(differing)}")


def open_images(size: int, kind: str, train_path: str | None, test_path: str | None, *, holdout, val_images):
    """Training data and held-out data of a data-set type, uint8 [3, size, size]. Without images to test on, in flags or
    pSp/data_configs.py, they are the share `holdout` of the training images. val_images: the first of them; 0: all."""
    test = find_path(test_path, DATASETS[kind].test)
    images, held_out = open_dataset(training_path(train_path, kind), size), open_dataset(test, size) if test else None
    if held_out is None:
        order = np.random.RandomState(0).permutation(len(images))  # the same split whatever --seed is
        n = max(1, round(holdout * len(images)))
        if n >= len(images):
            raise UserError("a single training image cannot be split: pass --test_path")
        images, held_out = Subset(images, sorted(order[n:].tolist())), Subset(images, sorted(order[:n].tolist()))
    return images, Subset(held_out, range(min(val_images or len(held_out), len(held_out))))
