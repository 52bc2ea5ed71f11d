"""Start of an encoder's training: the file it continues or takes its weights from, its network, its images."""

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset, Subset

from common.checkpoint import CheckpointError, load_checkpoint, load_strictly
from common.cli import UserError
from common.runs import find_start
from dataset import open_dataset
from model import Generator
from pSp.encoders import EncoderConfig, init_backbone
from pSp.psp import RESTYLE_PASSES, load_psp, pSp, psp_from_state, psp_state, require_generator
from pSp.settings import GRADUAL, INTO_W, EncoderFlags

MEAN_SAMPLES = 10_000  # of the average w, as published


def read_start(exp_dir, resume, checkpoint_path, init_from) -> tuple[dict | None, Path | None, bool]:
    """(state, its file, whether to continue it); (None, None, False): from scratch. Raises as common.runs.find_start.
    checkpoint_path, the published flag, continues a checkpoint; one without optimiser state gives its weights alone."""
    if checkpoint_path and "optimiser" in load_weights(checkpoint_path):
        resume = checkpoint_path
    path, continues = find_start(Path(exp_dir) / "checkpoints", resume, init_from or checkpoint_path, flag="exp_dir")
    return load_weights(path) if path else None, path, continues


def load_weights(path: str | Path) -> dict:
    """A checkpoint, or an exported encoder with the generator beside it in the shape of one."""
    return psp_state(load_psp(path), {}) if Path(path).suffix.lower() == ".safetensors" else load_checkpoint(path)


def build_network(
    flags: EncoderFlags,
    state: dict | None,  # as source and continues, of read_start
    source: Path | None,
    continues: bool,
    generator: Generator | None,  # None: the one in `state`
    weights_dir=None,
) -> tuple[pSp, str]:
    """The network to train, and in words where it comes from. CheckpointError where a continued run's would change."""
    n_iters, stored = flags.n_iters_per_batch, psp_from_state(state, source) if state is not None else None
    if continues:
        require_same(stored.config, flags, source)
        require_generator(source, stored.decoder.fingerprint, generator)
        stored.n_iters = n_iters or stored.n_iters if stored.refines else 1
        return stored, f"continuing {source}"
    if generator is None:
        stored.step = 0
        return stored, f"a new run from the encoder and generator of {source}"
    options = {"latent_avg": generator.mean_latent(MEAN_SAMPLES), "start_from_latent_avg": flags.start_from_latent_avg}
    if stored is not None:
        net = pSp(stored.config, generator, **options, n_iters=n_iters or stored.n_iters)
        load_strictly(net.encoder, stored.encoder.state_dict(), source)
        return net, f"a new run from the encoder of {source}"
    kind = flags.encoder_type or (INTO_W if flags.learn_in_w else GRADUAL)
    input_nc = 6 if n_iters is not None and n_iters > 1 else flags.input_nc
    shape = {"encoder_type": kind, "width": flags.encoder_width, "input_nc": input_nc}
    config = EncoderConfig.for_generator(generator.config, **shape)
    net = pSp(config, generator, **options, n_iters=n_iters or RESTYLE_PASSES)
    return net, f"a new run on {generator.path}, backbone from {init_backbone(net.encoder, weights_dir)}"


def require_same(config: EncoderConfig, flags: EncoderFlags, source) -> None:
    """Raises CheckpointError when flags ask for another encoder than the one that is continued."""
    stored = {"encoder_type": config.encoder_type, "encoder_width": config.width, "input_nc": config.input_nc}
    pairs = [(name, getattr(flags, name), value) for name, value in stored.items()]
    differing = [
        f"--{name} {here} here, {there} in the file" for name, here, there in pairs if here not in (None, 0, there)
    ]
    if differing:
        raise CheckpointError(f"{source} holds another encoder: {'; '.join(differing)}")


def open_images(size: int, training: str, test: str | None, *, holdout: float, val_images: int):
    """Training data and held-out data, uint8 [3, size, size]. test: path of the held-out images; None: the share
    `holdout` of the training images. val_images: the first of them; 0: all."""
    images: Dataset = open_dataset(training, size)
    if test is not None:
        held_out = open_dataset(test, size)
    else:
        order = np.random.RandomState(0).permutation(len(images))  # the same split whatever --seed is
        n = max(1, round(holdout * len(images)))
        if n >= len(images):
            raise UserError("a single training image cannot be split: pass --test_path")
        images, held_out = Subset(images, sorted(order[n:].tolist())), Subset(images, sorted(order[:n].tolist()))
    if val_images:
        held_out = Subset(held_out, range(min(val_images, len(held_out))))
    return images, held_out
