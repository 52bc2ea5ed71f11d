"""LPIPS equals the lpips package to the bit; every distance is frozen, per image, named, and found by name."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common.weights
from common.checkpoint import CheckpointError, load_checkpoint
from perceptual.lpips import LPIPS_WEIGHTS, SMALLEST, FeatureDistance, Lpips, build_perceptual

torch.manual_seed(0)


def features_of(net):
    """torchvision's layers of a backbone with random weights, without the classifiers, which LPIPS has no use for."""
    from torchvision import models

    if net == "vgg":
        return models.vgg.make_layers(models.vgg.cfgs["D"])
    with torch.device("meta"):
        network = (models.alexnet if net == "alex" else models.squeezenet1_1)(weights=None)
    features = network.features.to_empty(device="cpu")
    for parameter in features.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else nn.init.normal_(parameter, std=0.1)
    return features


@pytest.fixture(scope="module", params=list(LPIPS_WEIGHTS))
def both_routes(request):
    """(name, the lpips package's own LPIPS, ours, random backbone), the first two with the same random backbone."""
    import lpips

    net, features = request.param, features_of(request.param)
    attribute = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[net]
    with pytest.MonkeyPatch.context() as patch:
        torchvision = types.SimpleNamespace(**{attribute: lambda pretrained: types.SimpleNamespace(features=features)})
        patch.setattr(lpips.pretrained_networks, "tv", torchvision)
        package = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    backbone = {f"features.{name}": value.clone() for name, value in features.state_dict().items()}
    backbone["classifier.6.weight"] = torch.zeros(2, 2)  # a whole torchvision file has one
    return net, package, Lpips(net, backbone), backbone


@pytest.fixture(scope="module")
def squeeze_file():
    files = [path for path in map(common.weights.find, LPIPS_WEIGHTS["squeeze"]) if path is not None]
    if not files:
        pytest.skip("no SqueezeNet weights: python -m common.weights get squeezenet1_1")
    return files[0]


@pytest.fixture(scope="module")
def squeeze(squeeze_file):
    """LPIPS on the real SqueezeNet."""
    return build_perceptual("squeeze")


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """No weights anywhere but in tmp_path."""
    monkeypatch.setattr(common.weights, "search_folders", lambda weights_dir=None: [tmp_path])
    return tmp_path


def random_images(n, size, width=None):
    return torch.rand(n, 3, size, width or size) * 2 - 1


# -- LPIPS ---------------------------------------------------------------------------------------------------------


def test_equals_the_package(both_routes):
    net, package, ours, _ = both_routes
    for height, width in ((SMALLEST[net], SMALLEST[net]), (48, 33)):
        a, b = random_images(2, height, width), random_images(2, height, width)
        with torch.no_grad():
            expected, found = package(a, b).flatten(), ours(a, b)
        assert torch.equal(expected, found)
        assert found.shape == (2,) and found.dtype == torch.float32 and (found > 0).all()


def test_gradient_equals_the_packages(both_routes):
    _, package, ours, _ = both_routes
    a, b = random_images(1, 40).requires_grad_(), random_images(1, 40)
    (expected,) = torch.autograd.grad(package(a, b).sum(), a)
    (found,) = torch.autograd.grad(ours(a, b).sum(), a)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_smallest_image_is_the_smallest(both_routes):
    net, _, ours, _ = both_routes
    small = torch.zeros(1, 3, SMALLEST[net] - 1, 64)
    with pytest.raises(ValueError, match=f"at least {SMALLEST[net]} pixels, got 64x{SMALLEST[net] - 1}.*{net}-up64"):
        ours(small, small)
    with pytest.raises(RuntimeError):  # it is the network that cannot
        ours.lpips.net(small)


def test_upsampling_is_in_the_name(both_routes):
    net, _, plain, backbone = both_routes
    if net == "vgg":
        pytest.skip("the same code as for the two smaller backbones")
    enlarging = Lpips(net, backbone, upsample_small=True)
    assert (plain.name, enlarging.name) == (f"lpips-{net}", f"lpips-{net}-up64")
    a, b = random_images(1, 32), random_images(1, 32)
    large = [F.interpolate(images, (64, 64), mode="bilinear", align_corners=False) for images in (a, b)]
    assert torch.equal(enlarging(a, b), plain(*large))
    a, b = random_images(1, 70), random_images(1, 70)
    assert torch.equal(enlarging(a, b), plain(a, b)), "large enough: left alone"


def test_wrong_backbones_are_refused(both_routes):
    net, _, _, backbone = both_routes
    first = next(iter(backbone))
    lacking = {name: value for name, value in backbone.items() if name != first}
    with pytest.raises(CheckpointError, match=f"x.pth is not the backbone.*{first.removeprefix('features.')} is abs"):
        Lpips(net, lacking, source="x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth .*is \[1\], not"):
        Lpips(net, {**backbone, first: torch.zeros(1)}, source="x.pth")
    with pytest.raises(CheckpointError, match="also holds 99.weight"):
        Lpips(net, {**backbone, "features.99.weight": torch.zeros(1)}, source="x.pth")


def test_real_squeezenet_equals_the_package(squeeze, squeeze_file):
    import lpips

    weights = {name.removeprefix("features."): value for name, value in load_checkpoint(squeeze_file).items()}
    package = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    for name, value in package.net.state_dict().items():
        value.copy_(weights[name.partition(".")[2]])
    a, b = random_images(2, 64), random_images(2, 64)
    with torch.no_grad():
        assert torch.equal(package(a, b).flatten(), squeeze(a, b))
    assert squeeze.name == "lpips-squeeze"


def test_worse_is_farther(squeeze):
    skimage_data = pytest.importorskip("skimage.data", reason="scikit-image (requirements.txt) brings the test photo")
    photo = torch.from_numpy(skimage_data.astronaut()[:256, 64:320].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    photo = F.interpolate(photo, (64, 64), mode="area")
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    blurred = [F.interpolate(F.avg_pool2d(photo, k), (64, 64), mode="bilinear") for k in (2, 4)]
    ladder = [photo, photo + 0.05 * noise, photo + 0.3 * noise]
    values = [squeeze(photo, other).item() for other in (*ladder, *blurred)]
    assert values[0] == 0 and values[0] < values[1] < values[2] and values[0] < values[3] < values[4]


# -- what holds for all --------------------------------------------------------------------------------------------


def assert_frozen_and_per_image(perceptual, size):
    a, b = random_images(3, size), random_images(3, size)
    whole = perceptual(a, b)
    single = torch.cat([perceptual(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole, perceptual(b, a))
    assert perceptual(a, a).abs().max() == 0

    target = perceptual.features(b)  # the half that is computed once
    assert torch.equal(perceptual.distance(perceptual.features(a), target), whole)
    one = perceptual.distance(perceptual.features(a), perceptual.features(b[:1]))
    torch.testing.assert_close(one[0], whole[0], rtol=1e-4, atol=1e-6)

    images = a.clone().requires_grad_()
    perceptual(images, b).sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    nn.ModuleList([perceptual]).train()  # inside a model that trains
    assert not any(module.training for module in perceptual.modules())
    for bad in (torch.zeros(1, 1, size, size), torch.zeros(3, size, size)):
        with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
            perceptual(bad, bad)
    with pytest.raises(ValueError, match="one size"):
        perceptual(a, random_images(3, size + 8))


def test_lpips_is_frozen_and_per_image(both_routes):
    net, _, ours, _ = both_routes
    if net == "vgg":
        pytest.skip("the same code as for the two smaller backbones")
    assert_frozen_and_per_image(ours, 32)


def test_gradient_is_finite_where_nothing_is_active(both_routes):
    """The package's own is NaN as soon as all channels of one place are zero."""
    net, _, ours, backbone = both_routes
    dead = {name: value.clamp(max=0) if name.endswith("weight") else value * 0 for name, value in backbone.items()}
    perceptual = Lpips(net, dead)
    images = (torch.ones(1, 3, 32, 32)).requires_grad_()
    perceptual(images, -images.detach()).sum().backward()
    assert images.grad.isfinite().all()


def test_bfloat16_is_near_and_named(squeeze):
    half = build_perceptual("squeeze", dtype=torch.bfloat16)
    assert half.name == "lpips-squeeze-bf16"
    a = random_images(2, 64)
    b = (a + 0.2 * torch.randn_like(a)).clamp(-1, 1)
    assert half(a, b).dtype == torch.float32
    torch.testing.assert_close(half(a, b), squeeze(a, b), rtol=0.1, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(squeeze(a, b), squeeze(a, b).float(), rtol=0, atol=0)
        assert squeeze(a, b).dtype == torch.float32


# -- fallback ------------------------------------------------------------------------------------------------------


class Scorer(nn.Module):
    """The part of a scorer's interface that is used: it resizes by itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)

    def feature_maps(self, images):
        x = self.conv(images)
        return [x, x.relu()]


def test_scorer_features(monkeypatch):
    names = []
    monkeypatch.setattr(
        "perceptual.lpips.load_scorer", lambda name, device, weights_dir: names.append(name) or Scorer()
    )
    perceptual = build_perceptual("scorer:runs/ü/smile.safetensors", weights_dir="w")
    assert names == ["runs/ü/smile.safetensors"] and perceptual.name == "scorer-features(smile.safetensors)"
    assert_frozen_and_per_image(perceptual, 16)


def test_feature_distance_in_closed_form():
    """Unit vectors at right angles have squared distance 2, opposite ones 4; the mean over layers is taken."""

    class Fixed(nn.Module):
        def feature_maps(self, images):
            first = torch.stack([images[:, 0], torch.zeros_like(images[:, 0])], 1)
            return [first, 3 * images[:, 1:3]]

    distance = FeatureDistance(Fixed(), "fixed")
    a, b = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    a[:, 0], b[:, 0] = 1, -1  # opposite: 4
    a[:, 1], b[:, 2] = 1, 1  # right angle: 2
    assert distance(a, b).item() == pytest.approx(3.0)


# -- by name -------------------------------------------------------------------------------------------------------


def test_auto_takes_the_first_at_hand(squeeze_file, no_weights):
    (no_weights / squeeze_file.name).symlink_to(squeeze_file)
    assert build_perceptual("auto").name == "lpips-squeeze"
    assert build_perceptual("auto-up64").name == "lpips-squeeze-up64"
    (no_weights / "alexnet-owt-7be5be79.pth").write_bytes(b"x")  # later in the order: not looked at
    assert build_perceptual("auto").name == "lpips-squeeze"
    (no_weights / "vgg16-397923af.pth").write_bytes(b"x")  # first in the order, and damaged: said, not passed over
    with pytest.raises(ValueError, match="vgg16-397923af.pth is not the vgg16 known here"):
        build_perceptual("auto")


@pytest.mark.parametrize(
    "name, file",
    [
        ("vgg", "vgg16-397923af.pth"),
        ("alex", "alexnet-owt-7be5be79.pth"),
        ("squeeze-up64", "squeezenet1_1-b8a52dc0.pth"),
    ],
)
def test_absent_weights_are_named(no_weights, name, file):
    with pytest.raises(FileNotFoundError, match=f"{file} .*common.weights get "):
        build_perceptual(name)


def test_auto_without_weights_is_the_bundled_scorer(no_weights):
    distance = build_perceptual("auto")
    assert distance.name == "scorer-features(face-scorer)"
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert distance(images, images).abs().max() < 1e-6 and (distance(images, -images) > 0).all()


@pytest.mark.parametrize("name", ["lpips", "vgg19", "", "discriminator:a.pt", "scorer:"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="perceptual distance"):
        build_perceptual(name)
