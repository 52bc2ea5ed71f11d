"""dataset.py: the order of images is exact, and a stream of batches resumes at the place."""

import itertools

import numpy as np
import pytest
import torch

from dataset import InfiniteSampler, data_loader, open_dataset


def take(sampler, n):
    return list(itertools.islice(sampler, n))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_ranks_together_see_every_image_once_per_epoch(n, world_size):
    ranks = [take(InfiniteSampler(n, rank=r, world_size=world_size, seed=5), 3 * n) for r in range(world_size)]
    dealt = [index for step in zip(*ranks, strict=True) for index in step]  # in global order
    alone = take(InfiniteSampler(n, seed=5), len(dealt))
    assert dealt == alone
    for epoch in range(len(dealt) // n):
        assert sorted(dealt[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ():
    order = take(InfiniteSampler(50, seed=0), 100)
    assert order[:50] != order[50:]
    assert order[:50] != take(InfiniteSampler(50, seed=1), 50)
    assert order == take(InfiniteSampler(50, seed=0), 100)


def test_order_is_frozen():
    # a checkpoint of today resumes alike tomorrow
    assert take(InfiniteSampler(8, seed=7), 10) == [1, 7, 5, 6, 4, 3, 2, 0, 6, 7]


def test_sources_are_drawn_by_their_weights():
    names = [f"sharp/{i}.png" for i in range(10)] + [f"blurred/{i}.png" for i in range(30)]
    weights = {"sharp": 2.5, "blurred": 0.5}  # 25 + 15 draws of 40: the scale is 1
    order = take(InfiniteSampler(40, seed=3, source_weights=weights, names=names), 400)
    counts = np.bincount(order, minlength=40).reshape(4, 10)
    assert abs(counts[0].sum() - 250) <= 10 and order != sorted(order)  # one draw per epoch by rounding
    assert set(np.bincount(order[:40], minlength=40)[:10]) == {2, 3}, "an image's draws differ from 2.5 by less than 1"
    assert counts[1:].min() >= 2, "rounding falls on other images in each epoch"

    sampler = InfiniteSampler(40, seed=3, source_weights=weights, names=names)
    state = sampler.state_dict()
    assert state["source_weights"] == weights
    with pytest.warns(UserWarning, match="source weights"):
        InfiniteSampler(40).load_state_dict(state)


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"dull": 2.0}, "'dull' .present: sharp"),
        ({"sharp": -1.0}, "not negative"),
        ({"sharp": float("nan")}, "finite"),
        ({"sharp": 0.0}, "not all zero"),
    ],
)
def test_source_weights_that_cannot_be(weights, message):
    with pytest.raises(ValueError, match=message):
        InfiniteSampler(2, source_weights=weights, names=["sharp/a.png", "sharp/b.png"])


@pytest.mark.parametrize("position", [0, 4, 7, 8, 23])
def test_resumes_at_the_place(position):
    for rank in range(2):
        whole = take(InfiniteSampler(7, rank=rank, world_size=2, seed=1), 40)
        sampler = InfiniteSampler(7, rank=rank, world_size=2, seed=9)
        sampler.load_state_dict({"position": 2 * position, "seed": 1, "n": 7})
        assert take(sampler, 10) == whole[position : position + 10]


def test_iterating_does_not_move_the_state():
    sampler = InfiniteSampler(7, world_size=2, seed=1)
    take(sampler, 9)
    assert sampler.state_dict() == {"position": 0, "seed": 1, "n": 7}
    sampler.advance(6)
    assert sampler.state_dict()["position"] == 6


def test_changed_data_set_warns():
    with pytest.warns(UserWarning, match="had 9 images and has 7 now"):
        InfiniteSampler(7).load_state_dict({"position": 3, "seed": 0, "n": 9})


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_resumes_exactly_in_spite_of_prefetching(store, workers):
    data = open_dataset(store, 8)

    def stream(state=None):
        sampler = InfiniteSampler(len(data), rank=1, world_size=2, seed=4)
        if state:
            sampler.load_state_dict(state)
        return data_loader(data, 3, sampler, workers=workers)

    batches = stream()
    whole = [next(batches) for _ in range(6)]
    assert batches.sampler.position == 6 * 3 * 2
    batches.close()
    batches = stream()
    for _ in range(2):
        next(batches)
    state = batches.sampler.state_dict()
    batches.close()
    batches = stream(state)
    assert all(torch.equal(next(batches), expected) for expected in whole[2:])
    batches.close()


def test_restart_goes_back_to_the_samplers_position(store):
    data = open_dataset(store, 8)
    sampler = InfiniteSampler(len(data), seed=4)
    batches = data_loader(data, 3, sampler, workers=1)
    whole = [next(batches) for _ in range(4)]
    sampler.load_state_dict({"position": 3, "seed": 4, "n": 7})
    batches.restart()
    assert all(torch.equal(next(batches), expected) for expected in whole[1:])
    assert sampler.position == 12
    batches.close()


@pytest.mark.parametrize("batch", [1, 8, 20])
def test_batch_larger_than_the_data_set_wraps(store, batch):
    data = open_dataset(store, 8)
    images = next(data_loader(data, batch, InfiniteSampler(7, seed=2), workers=0))
    assert images.shape == (batch, 3, 8, 8) and images.dtype == torch.uint8
    assert len(images[:, 0, 0, 0].unique()) == min(batch, 7)


def test_folder_streams_too(face_folder):
    data = open_dataset(face_folder, 16)
    batches = data_loader(data, 4, InfiniteSampler(len(data)), workers=1)
    assert next(batches).shape == (4, 3, 16, 16)
    batches.close()


def test_global_random_state_is_left_alone(store):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    batches = data_loader(open_dataset(store, 8), 2, InfiniteSampler(7), workers=1)
    next(batches)
    batches.close()
    assert torch.equal(torch.rand(3), expected)


def test_cuda_batches_are_copied_from_pinned_memory(store):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    data = open_dataset(store, 8)
    images = next(batches := data_loader(data, 4, InfiniteSampler(7, seed=2), workers=1, device="cuda"))
    assert images.is_cuda
    assert torch.equal(images.cpu(), next(data_loader(data, 4, InfiniteSampler(7, seed=2), workers=0)))
    batches.close()
