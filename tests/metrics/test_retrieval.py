import json

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_diffusers.metrics import measure_retrieval, nearest_neighbours
from atlas_diffusers.metrics.retrieval import to_tensor, training_categories
from atlas_diffusers.pretrained import load_emoji

CATEGORIES = ["Activities"]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_nearest_neighbours_against_the_written_out_minimum(n, m, seed):
    q, r = torch.randn(n, 2, 3, generator=seeded(seed)), torch.randn(m, 2, 3, generator=seeded(seed + 1))
    distances, indices = nearest_neighbours(q, r)
    for i in range(n):
        all_distances = [float((q[i].double() - r[j].double()).square().mean().sqrt()) for j in range(m)]
        assert indices[i] == min(range(m), key=all_distances.__getitem__)
        assert float(distances[i]) == pytest.approx(min(all_distances), rel=1e-12)


def test_nearest_neighbours_of_itself_is_exactly_zero():
    x = torch.rand(20, 3, 32, 32, generator=seeded())
    distances, indices = nearest_neighbours(x, x)
    assert not distances.any() and indices.tolist() == list(range(20))


def test_nearest_neighbours_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(3, 4\) each, references \(5,\)"):
        nearest_neighbours(torch.zeros(2, 3, 4), torch.zeros(2, 5))


class Painter:
    """Stands in for a pipeline: paints the prompted emoji right for the first ``right`` prompts, then another one."""

    def __init__(self, right: int):
        data = load_emoji("train", CATEGORIES)
        self.pictures, self.right = dict(zip(data["text"], data["image"])), right
        self.texts = list(self.pictures)

    def __call__(self, texts, generator):
        self.seeds = [each.initial_seed() for each in generator]
        assert len(generator) == len(texts)
        shown = [t if i < self.right else self.texts[self.texts.index(t) - 1] for i, t in enumerate(texts)]
        return type("Output", (), {"images": [self.pictures[t] for t in shown]})


@pytest.mark.parametrize("right", [0, 7, 10])
def test_retrieval_counts_the_right_pictures(right):
    painter = Painter(right)
    result = measure_retrieval(painter, CATEGORIES, prompts=10)
    assert painter.seeds == list(range(10)), "each picture has noise of its own"
    assert (result.hits, result.prompts, result.accuracy) == (right, 10, right / 10)
    assert not result.generated_distances.any()


def test_held_out_distances_are_to_the_nearest_training_picture():
    result = measure_retrieval(Painter(1), CATEGORIES, prompts=1)
    train, test = (to_tensor(load_emoji(split, CATEGORIES)["image"]).double() for split in ("train", "test"))
    expected = torch.stack([(train - picture).square().mean((1, 2, 3)).sqrt().min() for picture in test])
    torch.testing.assert_close(result.held_out_distances, expected)


def test_too_many_prompts_are_named():
    with pytest.raises(ValueError, match="prompts=1000; expected 1 to 81"):
        measure_retrieval(Painter(1), CATEGORIES, prompts=1000)


def test_training_categories_come_from_the_recipe(tmp_path):
    with pytest.raises(OSError, match="no recipe.json"):
        training_categories(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({"dataset": {"categories": CATEGORIES}}))
    assert training_categories(tmp_path) == CATEGORIES
