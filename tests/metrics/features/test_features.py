"""metrics/features.py and sources.py: features of folders, LMDBs and generators, damaged ones, the cache."""

import json
import os

import numpy as np
import pytest
import torch
from features_of import DIM, copy_of, values
from PIL import Image
from processes import launch

from common.checkpoint import save_checkpoint
from common.generator_file import export_ema
from common.images import to_uint8
from common.latents import save_latents
from common.lmdb_store import DatasetError
from metrics.extractors import build_extractor
from metrics.features import extract, load_features, require_same, save_features
from metrics.flags import Sampling
from metrics.protocol import PROTOCOLS
from metrics.sources import SEED_STRIDE, open_source
from model import Generator, GeneratorConfig, load_generator


def test_folder_as_it_is_and_fitted(face_folder, tiny):
    as_is = extract(open_source(face_folder), tiny, 1000)
    assert as_is.values.shape == (24, DIM) and as_is.info["size"] == 40 and as_is.info["filter"] is None
    assert (as_is.info["n"], as_is.info["chosen"], as_is.info["codec"]) == (24, "all", "png")
    fitted = extract(open_source(face_folder, size=16), tiny, 1000)
    assert (fitted.info["size"], fitted.info["filter"], fitted.info["fit"]) == (16, "lanczos", "crop")
    assert fitted.info["digest"] != as_is.info["digest"] and not torch.equal(fitted.values, as_is.values)


def test_lmdb(face_lmdb, tiny):
    result = extract(open_source(face_lmdb, size=16), tiny, 1000)
    assert (result.info["kind"], result.info["size"], result.info["filter"], result.info["codec"]) == (
        "lmdb",
        16,
        "lanczos",
        "png",
    )
    with pytest.raises(ValueError, match="has the sizes 8, 16, 32: choose one with --size"):
        open_source(face_lmdb)


def test_a_run_folder_is_no_folder_of_images(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "options.json").write_text("{}")
    with pytest.raises(ValueError, match="is a run folder: pass its checkpoints, .*checkpoint"):
        open_source(tmp_path, size=16)


def test_reals_are_drawn_without_replacement(face_lmdb, tiny):
    source = open_source(face_lmdb, size=8)
    chosen = source.choose(10, "drawn", 4)
    assert len(set(chosen)) == 10 and chosen != list(range(10)) and chosen == source.choose(10, "drawn", 4)
    assert chosen != source.choose(10, "drawn", 5) and source.choose(10, "first", 4) == list(range(10))
    assert source.choose(99, "drawn", 4) == list(range(24))
    all_of_them = values(source, tiny)
    assert torch.equal(values(source, tiny, 10, seed=4), all_of_them[chosen])
    paper = build_extractor("tiny", PROTOCOLS["paper"])
    assert extract(source, paper, 10, seed=4).info["chosen"] == "first"


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_changes_nothing(batch, face_lmdb, checkpoint, tiny):
    for source in (open_source(face_lmdb, size=16), open_source(checkpoint, sampling=Sampling(0.7))):
        result = values(source, tiny, 20, batch=batch)
        torch.testing.assert_close(result, values(source, tiny, 20), rtol=1e-3, atol=1e-3)


def test_generated_images_are_those_of_generate(checkpoint):
    """Image i of --seed 2 is generate.py --seeds 2000000+i --noise random."""
    from sampling.render import render, seed_source

    generator = load_generator(checkpoint)
    (images,) = open_source(checkpoint, sampling=Sampling(seed=2)).batches(range(3), 3, "cpu")
    seeds = [2 * SEED_STRIDE + i for i in range(3)]
    source = seed_source(generator, seeds, truncation=1, mean=None, noise="random", noise_seed=0, batch=3)
    expected = np.stack(list(render(generator, source.ws(range(3)), noise=source.noise)))
    assert np.abs(to_uint8(images).astype(int) - expected.astype(int)).max() <= 1


def test_truncation_and_noise_modes(checkpoint, tiny):
    full, half, none = (values(open_source(checkpoint, sampling=Sampling(psi)), tiny, 12) for psi in (1, 0.5, 0))
    assert full.std(0).mean() > half.std(0).mean() > none.std(0).mean()
    still = open_source(checkpoint, sampling=Sampling(0, noise="const"))
    assert values(still, tiny, 4).std(0).max() < 1e-4  # one mean w, one noise: one image


def test_info_of_a_checkpoint(checkpoint, tmp_path):
    info = open_source(checkpoint).info
    assert (info["step"], info["images"], info["ema"]) == (20, 160, True)
    assert info["fingerprint"] == load_generator(checkpoint).fingerprint and info["space"] == "w++"
    alone, generator = tmp_path / "g.safetensors", load_generator(checkpoint)
    export_ema({"g_ema": generator.state_dict(), "config": generator.config.to_dict(), "step": 20}, alone)
    assert open_source(alone).info["images"] is None, "an export of an earlier version does not tell"


def test_latents(checkpoint, tiny, tmp_path):
    generator = load_generator(checkpoint)
    w = generator.get_latent(generator.draw_z(5, torch.Generator().manual_seed(0)))
    names = [f"{i}.png" for i in range(5)]
    save_latents(tmp_path / "l", w, names=names, space="w++", size=16, fingerprint=generator.fingerprint)
    source = open_source(tmp_path / "l", ckpt=checkpoint, sampling=Sampling(noise="const"))
    (images,) = source.batches(range(5), 8, "cpu")
    torch.testing.assert_close(images, generator(w, input_is_latent=True, randomize_noise=False)[0])
    assert source.n == 5 and values(source, tiny).shape == (5, DIM)
    with pytest.raises(ValueError, match="holds latents: --ckpt names the generator"):
        open_source(tmp_path / "l")
    with pytest.raises(ValueError, match="latents of the generator .*; the checkpoint given is"):
        open_source(tmp_path / "l", ckpt=checkpoint.with_name("000010.safetensors"))


def test_latents_of_generate_are_drawn_as_generate_draws_them(checkpoint, tmp_path):
    """Under the noise that latents.json records, whatever --noise says."""
    from sampling.render import latents_source

    generator = load_generator(checkpoint)
    w, names = generator.get_latent(generator.draw_z(3, torch.Generator().manual_seed(0))), ["a", "b", "c"]
    info = {"names": names, "space": "w++", "size": 16, "fingerprint": generator.fingerprint}
    digests = set()
    for noise, noise_seed in (("const", 0), ("random", 4), ("random", 5)):
        rendering = {"seeds": [7, 8, 9], "truncation": 1.0, "noise": noise, "noise_seed": noise_seed}
        save_latents(tmp_path / "l", w, **info, extra={"rendering": rendering})
        source = open_source(tmp_path / "l", ckpt=checkpoint, sampling=Sampling())
        (images,) = source.batches(range(3), 3, "cpu")
        drawn = np.stack(latents_source(generator, tmp_path / "l").render(generator, range(3)))
        assert np.abs(to_uint8(images).astype(int) - drawn.astype(int)).max() <= 1 and source.info["noise"] == "saved"
        digests.add(source.digest(range(3)))
    assert len(digests) == 3, "their features are cached apart"


def test_latents_of_a_conditional_generator_keep_their_attributes(tmp_path):
    torch.manual_seed(4)
    config, ckpt = GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8, condition_dim=2), tmp_path / "cgan.pt"
    save_checkpoint(ckpt, {"g_ema": Generator(config).state_dict(), "config": config.to_dict()})
    generator = load_generator(ckpt)
    w, attributes = generator.get_latent(generator.draw_z(3, torch.Generator().manual_seed(0))), torch.rand(3, 2)
    info = {"names": ["a", "b", "c"], "space": "w++", "size": 16, "fingerprint": generator.fingerprint}
    save_latents(tmp_path / "saved", w, **info, extra={"condition": {"values": attributes.tolist()}})
    save_latents(tmp_path / "neutral", w, **info)
    source, neutral = (
        open_source(tmp_path / name, ckpt=ckpt, sampling=Sampling(noise="const")) for name in ("saved", "neutral")
    )
    images = torch.cat(list(source.batches([0, 1, 2], 2, "cpu")))
    torch.testing.assert_close(
        images, generator(w, input_is_latent=True, randomize_noise=False, condition=attributes)[0]
    )
    assert (source.info["condition"], neutral.info["condition"]) == ("saved", "neutral")
    assert source.digest([0, 1, 2]) != neutral.digest([0, 1, 2]), "their features are cached apart"


def test_mixed_sizes_are_refused_in_words(face_folder, tiny, tmp_path):
    folder = copy_of(face_folder, tmp_path / "mixed")
    Image.new("RGB", (30, 50)).save(folder / "zz.png")
    with pytest.raises(DatasetError, match="40x40 and zz.png 30x50 pixels: --size N fits them all"):
        values(open_source(folder), tiny)
    assert len(values(open_source(folder, size=16), tiny)) == 25


def test_damaged_images(face_folder, tiny, tmp_path):
    """No image: left out, counted, listed. Sound header but cut short: refused, naming the file."""
    folder = copy_of(face_folder, tmp_path / "damaged")
    (folder / "note.png").write_text("no image")
    with pytest.warns(UserWarning, match="1 of 25 image files are left out: .*note.png"):
        source = open_source(folder)
    result = extract(source, tiny, 1000)
    assert (result.info["n"], result.info["skipped"]) == (24, 1)
    whole = (folder / "face 03.png").read_bytes()
    (folder / "face 03.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning), pytest.raises(DatasetError, match="face 03.png"):
        values(open_source(folder), tiny)


def test_no_such_source(tmp_path, face_folder):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: a folder of images, LMDB, checkpoint"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "inception_ffhq.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled statistics"):
        open_source(tmp_path / "inception_ffhq.pkl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no images"):
        open_source(tmp_path / "empty")


def test_diverged_generator(checkpoint, tiny):
    source = open_source(checkpoint)
    source.generator.to_rgb1.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="generated images 0 to 3 are not finite: diverged weights"):
        values(source, tiny, 4)


def test_features_that_are_not_finite(face_lmdb, tiny):
    tiny.network.network[0].bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="tiny gives features that are not finite"):
        values(open_source(face_lmdb, size=16), tiny)


def test_cache_goes_by_content_and_protocol(face_folder, tmp_path):
    cache = tmp_path / "cache"

    def look(folder, n=1000, protocol="tf-compat", size=None):
        extractor = build_extractor("tiny", PROTOCOLS[protocol])
        result = extract(open_source(folder, size=size), extractor, n, cache_dir=cache)
        return result, extractor.network.seen

    folder = copy_of(face_folder, tmp_path / "one")
    first, seen = look(folder)
    assert seen == 24 and len(list(cache.iterdir())) == 1
    moved = folder.rename(tmp_path / "elsewhere")
    again, seen = look(moved)
    assert seen == 0 and torch.equal(again.values, first.values) and again.info["path"] == str(moved)
    assert [look(moved, n=20)[1], look(moved, protocol="clean")[1], look(moved, size=16)[1]] == [20, 24, 24]
    image = next(iter(moved.glob("face 05.png")))
    times = image.stat()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(image)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert look(moved)[1] == 24


def test_cache_of_a_generator(checkpoint, tmp_path):
    def look(sampling, path=checkpoint):
        extractor = build_extractor("tiny", PROTOCOLS["tf-compat"])
        extract(open_source(path, sampling=sampling), extractor, 6, cache_dir=tmp_path / "cache")
        return extractor.network.seen

    assert [look(Sampling()), look(Sampling()), look(Sampling(0.7)), look(Sampling(seed=1))] == [6, 0, 6, 6]
    assert [look(Sampling(noise="const")), look(Sampling(), checkpoint.with_name("000010.safetensors"))] == [6, 6]


def test_features_file(face_folder, tiny, tmp_path):
    result = extract(open_source(face_folder), tiny, 10)
    path = tmp_path / "ü f.npz"
    save_features(path, result)
    again = load_features(path)
    assert torch.equal(again.values, result.values) and again.info == result.info and again.protocol == result.protocol
    assert require_same(again, tiny, path) is again
    with pytest.raises(ValueError, match=r"of tiny \(weights 11111111\), protocol tf-compat; .* protocol clean"):
        require_same(again, build_extractor("tiny", PROTOCOLS["clean"]), path)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="has the entries mu, sigma: features made elsewhere"):
        load_features(tmp_path / "foreign.npz")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated, damaged or not a .npz file"):
        load_features(tmp_path / "cut.npz")


@pytest.mark.parametrize(
    "features, known, sentence",
    [
        (np.zeros((3, 4)), '{"about": {"n": 3}', "is no features file: not JSON"),
        (np.zeros((3, 4)), "[1]", "it is a list, not an object"),
        (np.zeros((3, 4)), '{"about": {"n": "3"}}', "`about.n` is a text, not a whole number"),
        (np.zeros((3, 4)), '{"about": {"n": 3, "size": [8]}}', "`about.size` is a list"),
        (np.zeros((3, 4)), None, r"its features have the shape \[3, 4\], expected \[3, 12\]"),
        (np.zeros(3), None, r"the shape \[3\]"),
        (np.full((3, 12), np.nan), None, "values that are not finite"),
        (np.full((3, 12), "x"), None, "holds <U1; expected floating-point numbers"),
    ],
)
def test_features_files_of_the_wrong_shape(features, known, sentence, tmp_path):
    whole = {"about": {"n": 3}, "extractor": {"name": "tiny", "dim": 12}, "protocol": {"name": "clean"}}
    np.savez(tmp_path / "f.npz", features=features, metadata=np.array(known or json.dumps(whole)))
    with pytest.raises(ValueError, match=f"f.npz.*{sentence}"):
        load_features(tmp_path / "f.npz")


def test_damaged_features_files(face_folder, tiny, tmp_path):
    """Cut or with a flipped byte anywhere: one sentence that names the file, or the same values."""
    result = extract(open_source(face_folder), tiny, 10)
    save_features(tmp_path / "whole.npz", result)
    whole = (tmp_path / "whole.npz").read_bytes()
    for position in range(0, len(whole), 37):
        flipped = whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]
        for damaged in (whole[:position], flipped):
            (tmp_path / "f.npz").write_bytes(damaged)
            try:
                assert load_features(tmp_path / "f.npz").values.shape == result.values.shape
            except ValueError as error:
                assert "f.npz" in str(error)


def test_a_cache_that_fails_loses_nothing(face_folder, tiny, tmp_path):
    """The cache folder cannot be made; a cached file is damaged; it holds something else: computed, with a warning."""
    source, cache = open_source(face_folder), tmp_path / "cache"
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="features are not cached"):
        result = extract(source, tiny, 10, cache_dir=tmp_path / "file")
    assert result.values.shape == (10, DIM)
    extract(source, tiny, 10, cache_dir=cache)
    (path,) = cache.iterdir()
    for content in (path.read_bytes()[:300], b"", b"no features"):
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=f"cached features are not used: .*{path.name}"):
            assert torch.equal(extract(source, tiny, 10, cache_dir=cache).values, result.values)
    assert load_features(path).values.shape == (10, DIM), "written anew"


def test_two_writers_of_one_cache(face_folder, tiny, tmp_path):
    """Processes that compute the same features at once all succeed, and the file is whole at every moment."""
    result = extract(open_source(face_folder), tiny, 10)
    save_features(tmp_path / "given.npz", result)
    program = f"""
from metrics.features import load_features, save_features
features = load_features({str(tmp_path / "given.npz")!r})
for _ in range(40):
    save_features({str(tmp_path / "cache" / "f.npz")!r}, features)
    assert load_features({str(tmp_path / "cache" / "f.npz")!r}).values.equal(features.values)
"""
    launch(program, 2)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["f.npz"]
