"""FID and KID: closed form, torch-fidelity on the same folders, the protocols' resizing, and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common import weights
from common.images import to_uint8
from metrics import extractors
from metrics.distance import compute_fid, compute_kid, frechet_distance
from metrics.evaluation import evaluate
from metrics.extractors import Extractor, build_extractor, metric_name
from metrics.features import extract
from metrics.protocol import PROTOCOLS
from metrics.sources import open_source

NAME = "random-net"


def gaussian_with(mean, cov, n, seed):
    """Samples [n, D] whose mean and covariance are exactly these."""
    draw = np.random.default_rng(seed).standard_normal((n, len(mean)))
    draw -= draw.mean(0)
    whitened = draw @ np.linalg.inv(np.linalg.cholesky(np.cov(draw, rowvar=False))).T
    return torch.from_numpy(whitened @ np.linalg.cholesky(cov).T + mean).float()


def random_network(dim=24):
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, dim, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


@pytest.fixture
def random_extractor(monkeypatch):
    """Name of an extractor of random weights."""

    def build(protocol, weights_dir):
        return Extractor(NAME, random_network(), 48, 24, (128.0,) * 3, (128.0,) * 3, "0" * 64)

    monkeypatch.setitem(extractors.EXTRACTORS, NAME, build)

    return NAME


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 60 and 50 noisy 40x40 images, the second one darker."""
    draw = np.random.default_rng(0)
    result = []
    for name, n, level in (("real", 60, 140), ("fake", 50, 100)):
        folder = tmp_path_factory.mktemp(name)
        for i in range(n):
            blotch = draw.normal(level, 30, (5, 5, 3)).repeat(8, 0).repeat(8, 1)
            pixels = (blotch + draw.normal(0, 12, (40, 40, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        result.append(folder)
    return result


# -- the distance --------------------------------------------------------------------------------------------------


def test_closed_form_of_two_gaussians():
    mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    var_a, var_b = np.array([4.0, 1.0, 9.0]), np.array([1.0, 1.0, 0.25])
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(var_a) - np.sqrt(var_b)) ** 2).sum()
    assert frechet_distance(mean_a, np.diag(var_a), mean_b, np.diag(var_b)) == pytest.approx(expected, rel=1e-9)
    real, fake = gaussian_with(mean_a, np.diag(var_a), 500, 0), gaussian_with(mean_b, np.diag(var_b), 400, 1)
    value, notes = compute_fid(real, fake)
    assert value == pytest.approx(expected, rel=1e-5) and notes == []


def test_closed_form_of_rotated_gaussians():
    """Covariances that do not commute: tr (A B)^½ by eigenvalues of A^½ B A^½."""
    draw = np.random.default_rng(1)
    a, b = (m @ m.T + np.eye(6) for m in draw.standard_normal((2, 6, 6)))
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    expected = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    zero = np.zeros(6)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)
    assert compute_fid(gaussian_with(zero, a, 300, 2), gaussian_with(zero, b, 300, 3))[0] == pytest.approx(
        expected, rel=1e-4
    )


def test_a_set_has_no_distance_to_itself():
    features = gaussian_with(np.zeros(8), np.eye(8), 1200, 0)
    assert abs(compute_fid(features, features)[0]) < 1e-4
    assert abs(compute_kid(features, features)[0]) < 0.05


def test_too_few_samples_are_said():
    features = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    value, notes = compute_fid(features, features[:15] + 1)
    assert np.isfinite(value) and "15 samples cannot fill a covariance of 32 dimensions" in notes[0]
    _, result = compute_kid(features, features[:15])
    assert result["subset_size"] == 15 and "subsets of 15, not 1000" in result["notes"][0]


def test_refusals():
    features = torch.randn(30, 4)
    broken = features.clone()
    broken[3, 1] = torch.nan
    for compute in (compute_fid, compute_kid):
        with pytest.raises(ValueError, match="fake features have values that are not finite"):
            compute(features, broken)
        with pytest.raises(ValueError, match="real features have 4 dimensions, fake ones 3"):
            compute(features, features[:, :3])
        with pytest.raises(ValueError, match=r"real features have the shape \[1, 4\]; expected \[N, D\], N at least 2"):
            compute(features[:1], features)


# -- against torch-fidelity ----------------------------------------------------------------------------------------


def test_equals_torch_fidelity_on_the_same_folders(folders, random_extractor):
    """The whole way, from PNG files to FID and KID, with one random network registered on both sides."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Theirs(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.network = random_network()

        @staticmethod
        def get_provided_features_list():
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "pooled"

        def forward(self, x):
            x = interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(48, 48), align_corners=False)
            return (self.network((x - 128) / 128),)

    real, fake = folders
    torch_fidelity.register_feature_extractor(NAME, Theirs)
    try:
        theirs = torch_fidelity.calculate_metrics(
            input1=str(fake),
            input2=str(real),
            fid=True,
            kid=True,
            kid_subset_size=50,
            feature_extractor=NAME,
            cuda=False,
            cache=False,
            verbose=False,
            save_cpu_ram=True,
        )
    finally:
        del FEATURE_EXTRACTORS_REGISTRY[NAME]
    extractor = build_extractor(random_extractor, PROTOCOLS["tf-compat"])
    sides = [extract(open_source(folder), extractor, 100, batch=16) for folder in folders]
    ours = {record["metric"]: record["value"] for record in evaluate(*sides, ("fid", "kid"))}
    assert ours[f"fid-{NAME}"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours[f"kid-{NAME}"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random Inception weights in torch-fidelity's layout: the real ones are not to be had here."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with torch.device("meta"):
        names = _inception_on_meta(module).state_dict()
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, value in names.items():
        if not value.is_floating_point():
            state[name] = torch.zeros(value.shape, dtype=value.dtype)
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = torch.ones(value.shape)
        elif value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=draw) * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = torch.zeros(value.shape)
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path


def _inception_on_meta(module):
    original = module.torch.load, module.FeatureExtractorInceptionV3.load_state_dict
    module.torch.load = lambda *args, **kwargs: {}
    module.FeatureExtractorInceptionV3.load_state_dict = lambda *args, **kwargs: None
    try:
        return module.FeatureExtractorInceptionV3("meta", ["2048"], feature_extractor_weights_path="none")
    finally:
        module.torch.load, module.FeatureExtractorInceptionV3.load_state_dict = original


def test_inception_is_torch_fidelitys(inception_file, monkeypatch):
    """Our layer sequence gives the features of the library's forward, under tf-compat; `paper` feeds [-1, 1]."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(weights, "require", lambda name, weights_dir=None: inception_file)
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(inception_file))
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    (expected,) = theirs(images)
    ours = build_extractor("inception", PROTOCOLS["tf-compat"])
    torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-6)
    assert ours.dim == expected.shape[1] and len(ours.sha256) == 64
    paper = build_extractor("inception", PROTOCOLS["paper"])
    as_floats = images.float() / 127.5 - 1
    resized = F.interpolate(as_floats, (299, 299), mode="bilinear", align_corners=False)  # pytorch-fid
    torch.testing.assert_close(paper(as_floats), paper.network(resized).flatten(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(paper(images), paper(as_floats), rtol=1e-4, atol=1e-5)


def test_vgg16_ends_after_fc2(monkeypatch, tmp_path):
    """fc2 with its ReLU, as the paper's PRDC takes it; on a narrow VGG, since the real one weighs half a gigabyte."""
    import torchvision

    class Narrow(nn.Module):
        def __init__(self, weights=None):
            super().__init__()
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU())
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            hidden = [nn.Linear(8 * 49, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 4096), nn.ReLU(), nn.Dropout()]
            self.classifier = nn.Sequential(*hidden, nn.Linear(4096, 10))

    vgg = Narrow().eval()
    torch.save(vgg.state_dict(), tmp_path / "vgg.pth")
    monkeypatch.setattr(torchvision.models, "vgg16", Narrow)
    monkeypatch.setattr(weights, "require", lambda name, weights_dir=None: tmp_path / "vgg.pth")
    images = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(2)) * 2 - 1

    paper = build_extractor("vgg16", PROTOCOLS["paper"])
    hidden = vgg.classifier[:5](vgg.avgpool(vgg.features(images)).flatten(1))  # [-1, 1] at its own size
    torch.testing.assert_close(paper(images), hidden, rtol=1e-4, atol=1e-5)
    assert paper(images).min() == 0 and paper.dim == 4096

    clean = build_extractor("vgg16", PROTOCOLS["clean"])
    x = (
        F.interpolate(
            torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).float(),
            (224, 224),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        ).clamp(0, 255)
        / 255
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = vgg.classifier[:5](vgg.avgpool(vgg.features((x - mean) / std)).flatten(1))
    torch.testing.assert_close(clean(images), expected, rtol=1e-4, atol=1e-4)


# -- protocols -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(40, 96), (120, 50)])
def test_clean_resizes_as_pillow_does_in_float(sizes):
    before, after = sizes
    pixels = np.random.default_rng(0).integers(0, 256, (before, before, 3), dtype=np.uint8)
    channels = [
        Image.fromarray(pixels[:, :, c].astype(np.float32)).resize((after, after), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    expected = np.stack([np.asarray(channel) for channel in channels]).clip(0, 255)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    np.testing.assert_allclose(PROTOCOLS["clean"].resize_to(x, after)[0].numpy(), expected, atol=2e-3)


def test_protocols_differ_where_they_should():
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.6 - 1.3  # beyond [-1, 1]
    quantised = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
    for name in ("tf-compat", "clean"):
        assert torch.equal(PROTOCOLS[name].to_255(images), PROTOCOLS[name].to_255(quantised))
    assert PROTOCOLS["paper"].to_255(images).max() > 255
    x = quantised.float()
    small = {name: protocol.resize_to(x, 24) for name, protocol in PROTOCOLS.items()}
    assert small["clean"].std() < 0.8 * small["tf-compat"].std()  # antialiasing averages noise, sampling keeps it
    assert not torch.allclose(small["paper"], small["tf-compat"], atol=1)  # half a pixel apart
    assert all(torch.equal(protocol.resize_to(x, 64), x) for protocol in PROTOCOLS.values())
    assert all(torch.equal(protocol.resize_to(x, None), x) for protocol in PROTOCOLS.values())


def test_fallbacks_are_named(random_extractor):
    assert metric_name("fid", "inception") == "fid" and metric_name("fid", "squeeze") == "fid-squeeze"
    assert metric_name("precision", "vgg16") == "precision" and metric_name("fid", "vgg16") == "fid-vgg16"
    assert metric_name("recall", "scorer") == "recall-scorer" and metric_name("fid", NAME) == f"fid-{NAME}"


def test_absent_weights_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "search_folders", lambda weights_dir=None: [tmp_path])
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth .*is not here"):
        build_extractor("inception", PROTOCOLS["tf-compat"])
    with pytest.raises(FileNotFoundError, match="squeezenet1_1_features.pth .*is not here"):
        build_extractor("squeeze", PROTOCOLS["tf-compat"])
    with pytest.raises(ValueError, match="--extractor resnet: expected auto, inception, scorer, squeeze, vgg16"):
        build_extractor("resnet", PROTOCOLS["tf-compat"])


def test_auto_takes_the_first_at_hand(monkeypatch, random_extractor):
    """Inception, else a fallback, never under the plain name; with nothing at all, the sentence names the first."""

    def absent(protocol, weights_dir):
        raise FileNotFoundError("no such weights here")

    def present(protocol, weights_dir):
        return Extractor("x", random_network(), 48, 24, (128.0,) * 3, (128.0,) * 3, "0" * 64)

    protocol = PROTOCOLS["clean"]
    for at_hand, name in (("inception", "fid"), ("squeeze", "fid-squeeze"), ("scorer", "fid-scorer")):
        for candidate in extractors.AUTO:
            build = present if candidate == at_hand else absent
            monkeypatch.setitem(extractors.EXTRACTORS, candidate, build)
        assert metric_name("fid", build_extractor("auto", protocol).name) == name
    monkeypatch.setitem(extractors.EXTRACTORS, "vgg16", present)
    assert build_extractor("auto", protocol, preferred=("vgg16", "scorer")).name == "vgg16"
    monkeypatch.setitem(extractors.EXTRACTORS, "scorer", absent)
    with pytest.raises(FileNotFoundError, match="no such weights here; nor .* any of the fallbacks squeeze, scorer"):
        build_extractor("auto", protocol)


def test_squeeze_features():
    if weights.find("squeezenet1_1_features") is None:
        pytest.skip("no squeezenet1_1_features.pth: set WPP_WEIGHTS to a folder that holds it")
    extractor = build_extractor("squeeze", PROTOCOLS["tf-compat"])
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = extractor(images)
    assert features.shape == (5, 512) and features.dtype == torch.float32 and extractor.sha256.startswith("435cedb3")
    torch.testing.assert_close(torch.cat([extractor(part) for part in images.split(2)]), features, rtol=1e-4, atol=1e-4)
    assert (features[0] - features[1]).abs().max() > 0.1


def test_scorer_features(monkeypatch, tmp_path):
    """The bundled face scorer's last features, of images resized as the protocol says; on a small scorer of our own."""
    import scorer.network
    from scorer.labels import Attribute
    from scorer.network import Scorer, ScorerConfig, ScorerNetwork, save_scorer

    torch.manual_seed(0)
    config = ScorerConfig((Attribute("smile", "probability"),), width=0.25, input_size=32)
    scorer = Scorer(ScorerNetwork(config).eval())
    (tmp_path / "checkpoints").mkdir()
    save_scorer(tmp_path / "checkpoints" / "face-scorer.safetensors", scorer, half=False)
    monkeypatch.setattr("scorer.network.ROOT", tmp_path)
    extractor = build_extractor("scorer", PROTOCOLS["tf-compat"])
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = scorer.features(torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2) / 127.5 - 1)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    assert extractor.dim == expected.shape[1] and extractor.sha256 == scorer.fingerprint
    assert extractor(images[:, :, ::2, ::2]).shape == expected.shape
