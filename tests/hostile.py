"""Files of every kind that the toolkit reads, with their readers, and damage done to them."""

import copy
import io
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from psp_networks import tiny_net
from small_generator import make_checkpoint

import align_faces
import convert
import edit_attribute
import generate
import projector
import train_scorer
from common.cli import ArgumentParser, run
from common.distributed import Distributed
from common.images import read_image
from common.latents import save_latents
from common.runs import read_log, restore_options
from dataset import InfiniteSampler
from demo_app.inversions import load_faces
from demo_app.models import Models
from editing.attributes import Condition, read_condition
from editing.boundary import Boundary, load_boundary
from faces.align import align, read_alignment
from interop.export import read_source
from inversion.report import load_result, save_result
from inversion.tuning import load_tuned, save_tuned
from metrics import reconstruction, report
from metrics.features import Features, load_features, save_features
from metrics.protocol import read_records
from model import GeneratorConfig, load_generator
from perceptual.image_metrics import read_measures, write_measures
from pSp.psp import export_encoder, load_psp, psp_state
from scorer.labels import KNOWN, read_labels
from scorer.network import Scorer, ScorerConfig, ScorerNetwork, load_scorer, save_scorer
from training.resume import read_checkpoint
from training.trainer import Trainer, TrainSettings

ALONE = Distributed(0, 1, torch.device("cpu"))
LANDMARKS = [[24, 28], [40, 28], [32, 36], [26, 44], [38, 44]]
HOSTILE = [None, True, -1, 0, 16384, 1e300, 2**63 - 1, "", "x" * 5000, "../../x", "/x", "\udcff", "\0", [], [[]], {}]
HOSTILE += [[[1, 2]] * 4, {"a": {"a": 1}}, float("nan"), float("-inf")]


def command(script, *flags):
    """A reader that is a command line; `FILE` among the flags stands for the file."""

    def read(path):
        arguments = [str(path if flag == "FILE" else flag) for flag in flags]
        return run(script.main, script.build_parser(), arguments)

    return read


def function(call):
    """A reader that is a function, ended as the scripts end: 0, or 1 and a line on stderr; bugs are raised."""
    return lambda path: run(lambda args: call(path) and None, ArgumentParser(), [])


def make_files(folder: Path) -> dict[str, tuple[Path, list]]:
    """{kind: (a whole file, its readers)}"""
    config = GeneratorConfig(16, 16, 1, channel_max=4)
    ckpt, n = make_checkpoint(config, folder / "g.pt"), config.n_tokens
    draw, cpu = np.random.default_rng(0), ("--device", "cpu")
    w = draw.standard_normal((2, n, 16)).astype(np.float32)
    generator = load_generator(ckpt)
    inner = {"space": "w++", "size": 16, "fingerprint": generator.fingerprint}
    kinds = {}

    def kind(name, path, *readers):
        kinds[name] = (path, list(readers))

    state = Trainer(config, TrainSettings(batch=2), ALONE).state_dict()
    state |= {"options": {"batch": 2, "noise": "none", "iter": 7}, "sampler": InfiniteSampler(5).state_dict()}
    names = tuple(KNOWN)[:2]
    spec = Condition(names, ("probability", "years"), (0.5, 0.3), (1.0, 60.0), "face-scorer", "0" * 16)
    torch.save(state | {"condition": spec.to_dict()}, folder / "training.pt")
    draws = ("--seeds", "0", "--output_dir", folder / "out", *cpu)
    kind("training.pt", folder / "training.pt", function(read_condition), function(continue_training))
    kinds["training.pt"][1].append(command(generate, "--ckpt", "FILE", *draws))
    assert command(convert, "FILE", folder / "g.safetensors")(ckpt) == 0
    weights = function(partial(read_checkpoint, continues=False))
    kind("g.safetensors", folder / "g.safetensors", command(generate, "--ckpt", "FILE", *draws), weights)
    kinds["g.safetensors"][1].append(function(lambda path: read_source(path)))

    losses = {"mse": [0.1, 0.2]}
    rendering = {"seeds": [1, 2], "noise": "none", "noise_seed": None}
    maps = [torch.zeros(2, 1, *m.shape[-2:]) for m in generator.noises.buffers()]
    extra = {"method": "projector", "condition": {"values": [[0.5, 0.5]] * 2}, "rendering": rendering}
    save_latents(folder / "w", w, names=["a", "b"], losses=losses, noise=maps, extra=extra, alignment=[{}, {}], **inner)
    write_measures(folder / "w" / "reconstruction.csv", ["a", "b"], {"mse": [1.0, 2.0]}, perceptual="p", identity=None)
    latents = lambda at: command(generate, "--ckpt", ckpt, "--latents", at, "--output_dir", folder / "out", *cpu)  # noqa: E731
    kind("latents.json", folder / "w" / "latents.json", latents(folder / "w"), command(reconstruction, folder / "w"))
    kind("noise.npz", folder / "w" / "noise.npz", latents(folder / "w"))
    kind("latents.npy", folder / "w" / "latents.npy", latents(folder / "w"), latents("FILE"))
    kind("reconstruction.csv", folder / "w" / "reconstruction.csv", command(reconstruction, folder / "w"))
    kinds["reconstruction.csv"][1].append(function(read_measures))
    torch.save({"/x/ü.png": {"latent": torch.from_numpy(w[0]), "noise": [m[:1] for m in maps]}}, folder / "r.pt")
    kind("rosinality.pt", folder / "r.pt", latents("FILE"))
    np.savez(folder / "projected_w.npz", w=w[:1])
    kind("nvidia.npz", folder / "projected_w.npz", latents("FILE"))

    boundary = Boundary(
        w[:1].reshape(1, -1) / np.linalg.norm(w[0]), 0.1, "age", mean=0.0, std=1.0, accuracies={"train": 1.0}, **inner
    )
    edit = ("--latent", folder / "w", "--identity", "none", "--perceptual", "none", "--at", "1", *cpu)
    edit = command(edit_attribute, "--ckpt", ckpt, "--boundary", "FILE", *edit, "--output_dir", folder / "out")
    read = function(lambda path: load_boundary(path, space="w++", width=n * 16, fingerprint=generator.fingerprint))
    kind("boundary.npz", boundary.save(folder / "boundary.npz"), read, edit)
    np.save(folder / "age.npy", w[:1].reshape(1, -1))
    torch.save(torch.from_numpy(w[0].reshape(-1)), folder / "age.pt")
    kind("direction.npy", folder / "age.npy", read)
    kind("direction.pt", folder / "age.pt", read)

    result = {"latents": w[0], "noise": [m[0].numpy() for m in maps], "steps": 3, "condition": None, "digest": "x"}
    curves = {name: np.zeros(1, np.float32) for name in ("perceptual", "noise", "mse")}
    Image.new("RGB", (16, 16), (90, 120, 30)).save(folder / "face.png")
    settings = ("--step", "1", "--perceptual", "scorer:face-scorer", "--identity", "none", "--mean_samples", "2", *cpu)
    project = (projector, "--ckpt", ckpt, "--dataset", folder / "face.png", *settings, "--output_dir", folder / "p")
    assert command(*project)(None) == 0
    kind("result.npz", folder / "p" / "inversions" / "face.npz", function(load_result), command(*project))
    kind("settings.json", folder / "p" / "inversions" / "settings.json", command(*project))
    save_tuned(folder / "tuned.safetensors", generator)
    read = function(lambda path: load_tuned(path, generator, generator.fingerprint))
    kind("tuned.safetensors", folder / "tuned.safetensors", read)
    save_result(
        folder / "result.npz",
        result | {"curves": curves, "measures": {"perceptual": 0.1, "mse": 0.1, "psnr": 10.0, "ssim": 0.5}},
    )

    attributes = tuple(attribute for attribute, _ in KNOWN.values())[:2]
    network = ScorerNetwork(ScorerConfig(attributes, width=0.1, input_size=32))
    save_scorer(folder / "s.safetensors", Scorer(network), training={}, validation={}, terms="")
    kind("scorer.safetensors", folder / "s.safetensors", function(load_scorer))
    text = {"arch": "torchvision:squeezenet1_1", "weights": "absent.pt", "attributes": ["age"], "outputs": "years"}
    text |= {"input_size": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "channels": "rgb", "range": 1.0}
    (folder / "classifier.json").write_text(json.dumps(text))
    kind("classifier.json", folder / "classifier.json", function(load_scorer))
    net = tiny_net(generator=generator)
    torch.save(psp_state(net, {"batch_size": 2}), folder / "encoder.pt")
    kind("encoder.pt", folder / "encoder.pt", function(load_psp))
    export_encoder(net, folder / "e.safetensors", "g.safetensors")
    kind("encoder.safetensors", folder / "e.safetensors", function(load_psp))

    about = {"kind": "folder", "n": 12, "size": 16, "path": "x", "digest": "0"}
    extractor, protocol = {"name": "scorer", "sha256": "0", "size": 64, "dim": 3}, {"name": "tf-compat"}
    features = Features(torch.from_numpy(draw.standard_normal((12, 3)).astype(np.float32)), about, extractor, protocol)
    save_features(folder / "features.npz", features)
    kind("features.npz", folder / "features.npz", function(load_features))
    record = {"metric": "fid", "value": 3.0, "n_real": 9, "n_fake": 9, "step": 7, "protocol": {"name": "paper"}}
    record |= {"extractor": {"name": "inception"}, "real": {"digest": "1"}, "fake": {"truncation": 1.0, "images": 9}}
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(record | {"step": step}) for step in (7, 8)) + "\n")
    kind("metrics.jsonl", folder / "metrics.jsonl", function(read_records), command(report, "FILE"))
    (folder / "log.jsonl").write_text('{"step": 1, "time": 2.5, "group": "Loss", "d": 1}\n' * 3)
    kind("log.jsonl", folder / "log.jsonl", function(read_log))
    (folder / "recommended.json").write_text(json.dumps({"projector": {"step": 300, "init": None, "x": [1]}}))
    store = (folder / "g.safetensors", folder / "out.safetensors", "--recommended", "FILE")
    kind("recommended.json", folder / "recommended.json", command(convert, *store))

    photos = folder / "photos"
    photos.mkdir()
    Image.fromarray(draw.integers(0, 255, (64, 64, 3), np.uint8)).save(photos / "a.png")
    photos.joinpath("a.json").write_text(json.dumps(LANDMARKS))
    again = ("--photos", photos, "--size", "32", "--n_worker", "1", "--output_dir")
    assert command(align_faces, *again, folder / "crops")(None) == 0
    paste = ("--paste_back", folder / "crops" / "aligned", "--alignment", "FILE", *again, folder / "out")
    readers = function(read_alignment), command(align_faces, *again, folder / "crops"), command(align_faces, *paste)
    kind("alignment.json", folder / "crops" / "alignment.json", *readers)
    (folder / "points.json").write_text(json.dumps({"a.png": LANDMARKS}))
    by_hand = (*again, folder / "crops2", "--landmarks", "FILE", "--overwrite")
    kind("landmarks.json", folder / "points.json", command(align_faces, *by_hand))
    face = asdict(align(Image.open(photos / "a.png"), np.array(LANDMARKS, float), size=32, name="a"))
    info = np.frombuffer(json.dumps([{"alignment": face, "steps": 3}]).encode(), np.uint8)
    layers = {f"w_0_noise_{i}": layer[:1].numpy() for i, layer in enumerate(maps)}
    np.savez(folder / "kept.npz", info=info, w_0=w[:1], **layers)
    models = Models(generator, None, None, None)
    kind("kept.npz", folder / "kept.npz", function(lambda path: load_faces(path, Image.open(photos / "a.png"), models)))

    (folder / "labels.csv").write_text("file,smile,age,sex\na.png,1,30,F\nb.png,0,,M\n")
    evaluate = ("--evaluate", photos, "--scorer", folder / "s.safetensors", "--labels", "FILE", *cpu)
    kind("labels.csv", folder / "labels.csv", function(read_labels), command(train_scorer, *evaluate))
    kind("network.pkl", folder / "n.pkl", function(read_source))
    (folder / "n.pkl").write_bytes(
        b"\x80\x04}\x94\x8c\x05G_ema\x94\x8c\x11torch_utils.persistence\x94\x8c\x01x\x94\x93\x94s."
    )
    image = Image.fromarray(draw.integers(0, 255, (24, 24, 3), np.uint8))
    for suffix in ("avif", "jpg", "png", "gif", "webp", "tiff", "bmp", "ppm", "jp2", "tga"):
        image.save(folder / f"i.{suffix}")
        kind(f"image.{suffix}", folder / f"i.{suffix}", function(read_image))
    return kinds


def continue_training(path):
    start = read_checkpoint(path)
    args = ArgumentParser().parse_args([])
    restore_options(args, start.options, path)
    trainer = Trainer(start.config, TrainSettings(batch=2), ALONE)
    trainer.load_state_dict(start.state, path)
    InfiniteSampler(5).load_state_dict(start.state["sampler"])


KINDS = (
    "training.pt g.safetensors latents.json noise.npz latents.npy reconstruction.csv rosinality.pt nvidia.npz".split()
)
KINDS += "boundary.npz direction.npy direction.pt result.npz settings.json scorer.safetensors classifier.json".split()
KINDS += "encoder.pt encoder.safetensors features.npz metrics.jsonl log.jsonl recommended.json alignment.json".split()
KINDS += "landmarks.json kept.npz labels.csv network.pkl tuned.safetensors".split()
IMAGES = [f"image.{suffix}" for suffix in ("avif", "jpg", "png", "gif", "webp", "tiff", "bmp", "ppm", "jp2", "tga")]


def places(value, path=()):
    """Every place in nested dicts and lists, as keys and indices that lead there."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def change(value, path, draw, hostile):
    """`value` with the place `path` removed, given another entry beside it, or replaced."""
    if not path:
        return draw.choice(hostile)
    value = list(value) if isinstance(value, tuple) else copy.copy(value)
    if len(path) > 1:
        value[path[0]] = change(value[path[0]], path[1:], draw, hostile)
    elif (what := draw.random()) < 0.2:
        del value[path[0]]
    elif what < 0.3 and isinstance(value, dict):
        value["\u00fcnknown"] = draw.choice(hostile)
    else:
        value[path[0]] = draw.choice(hostile)
    return value


def damage_json(text: str, draw) -> str:
    if draw.random() < 0.1:
        return draw.choice(
            ["[" * 100_000, '{"a":' * 100_000, "9" * 400, "1e999", "NaN", '"' + "x" * 9_000_000, text * 2]
        )
    value = json.loads(text)
    return json.dumps(change(value, draw.choice(list(places(value))), draw, HOSTILE))


def damage_array(array: np.ndarray, draw) -> np.ndarray:
    if array.dtype.kind in "US":
        return np.array(damage_json(str(array), draw))
    if array.dtype == np.uint8:
        return np.frombuffer(damage_json(array.tobytes().decode(), draw).encode("utf-8", "surrogatepass"), np.uint8)
    broken = array.astype(np.float64, copy=True)
    if broken.size:
        broken.flat[0] = draw.choice([np.nan, np.inf, 1e300])
    others = [broken.astype(array.dtype), array[..., None], array[:0], array.reshape(-1), array[..., :-1], array[0]]
    return draw.choice([*others, array.astype(np.int64), array.astype("U3"), array.astype(complex), np.float32(3)])


def damage(path: Path, draw) -> bytes:
    data, suffix = path.read_bytes(), path.suffix
    if draw.random() < 0.25 or suffix in (".csv", ".pkl") or suffix[1:] in " ".join(IMAGES):
        return damage_bytes(data, draw)
    if suffix == ".json":
        return damage_json(data.decode(), draw).encode("utf-8", "surrogatepass")
    if suffix == ".jsonl":
        lines = data.decode().splitlines()
        lines[draw.randrange(len(lines))] = damage_json(lines[0], draw)
        return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
    out = io.BytesIO()
    if suffix == ".npy":
        np.save(out, damage_array(np.load(path), draw))
    elif suffix == ".npz":
        arrays = dict(np.load(path))
        name = draw.choice(list(arrays))
        kept = arrays | (
            {name: damage_array(arrays[name], draw)} if draw.random() < 0.8 else {"\u00fcber": np.zeros(3)}
        )
        np.savez(out, **{key: value for key, value in kept.items() if key != name or draw.random() < 0.85})
    elif suffix == ".pt":
        value, nan = torch.load(path, weights_only=True), torch.full((2, 3), float("nan"))
        hostile = [item for item in HOSTILE if item != "\udcff"]
        hostile += [
            nan,
            torch.zeros(0),
            torch.ones(2, 3, dtype=torch.complex64),
            torch.tensor(True),
            torch.ones(1, 2, 3, 4),
        ]
        torch.save(change(value, draw.choice(list(places(value))), draw, hostile), out)
    else:
        with safetensors.safe_open(path, "pt") as opened:
            header = {key: value for key, value in opened.metadata().items() if key != "tensors_fingerprint"}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        name = draw.choice([*header, *header, draw.choice(list(tensors))])
        if name in header:
            header[name] = damage_json(header[name], draw).encode("utf-8", "replace").decode()
        else:
            tensors[name] = draw.choice([torch.zeros(0), tensors[name][None], tensors[name].bool(), torch.ones(2, 2)])
        out.write(safetensors.torch.save(tensors, header))
    return out.getvalue()


def damage_bytes(data: bytes, draw) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 3, 20))):
        damaged[draw.randrange(len(damaged) if draw.random() < 0.5 else min(300, len(damaged)))] = draw.randrange(256)
    return bytes(damaged[: draw.randrange(len(damaged))] if draw.random() < 0.4 else damaged)
