"""Order of an epoch and choice of images: permutations, resumable, frozen."""

from itertools import chain

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m.data.sets import chosen_images, epoch_order
from m2m.training.batches import BatchPlan
from m2m.training.settings import TrainingSettings


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 500), per_shard=st.integers(1, 60), window=st.integers(1, 20), epoch=st.integers(0, 5))
def test_an_epoch_reads_every_set_once(n, per_shard, window, epoch):
    order = epoch_order(n, per_shard, seed=3, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(n))
    assert order.dtype == np.int64


@settings(max_examples=30, deadline=None)
@given(world=st.integers(1, 8), other=st.integers(1, 8), step=st.integers(0, 15))
def test_any_number_of_ranks_resumes_the_same_global_batches(world, other, step):
    order, batch = epoch_order(200, 10, seed=1, epoch=0, window=4), 8

    def batches(ranks, first):
        shares = [[order[s * batch : (s + 1) * batch][rank::ranks] for s in range(first, 25)] for rank in range(ranks)]
        return [sorted(np.concatenate(parts).tolist()) for parts in zip(*shares)]

    assert batches(world, 0)[step:] == batches(other, step)


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, key: tuple[int, int]) -> int:
        return key[1]


def read_by(ranks: int, workers: int, first: int = 0) -> list[list[int]]:
    """The global batches, in order, as `ranks` processes with `workers` data workers each read them."""
    settings = TrainingSettings.model_validate({"batch": 16, "micro_batch": 2, "epochs": 2, "seed": 5})
    shares = []
    for rank in range(ranks):
        plan = BatchPlan(settings, sets=100, per_shard=7, processes=ranks, process=rank)
        loader = torch.utils.data.DataLoader(
            Numbers(), batch_sampler=list(plan.reading_order(first)), num_workers=workers, collate_fn=list
        )
        passes = 16 // ranks // 2
        read = list(loader)
        shares.append([list(chain(*read[i : i + passes])) for i in range(0, len(read), passes)])
    return [[share[i % ranks][i // ranks] for i in range(16)] for share in zip(*shares)]


def test_ranks_and_workers_read_the_same_global_batches_and_resume_them():
    expected = read_by(1, 0)
    assert len(expected) == 12 and set(chain(*expected[:6])) != set(chain(*expected[6:]))
    assert all(read_by(ranks, 0) == expected for ranks in (2, 4, 8))
    assert all(
        read_by(ranks, workers) == expected for ranks, workers in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (8, 1))
    )
    assert read_by(8, 2, first=5) == expected[5:]  # begun on one rank


def test_few_shards_are_open_at_a_time():
    order = epoch_order(1000, 10, seed=0, epoch=0, window=4)
    for first in range(0, 1000, 40):
        assert len(set((order[first : first + 40] // 10).tolist())) == 4


def test_epochs_and_seeds_differ():
    first = epoch_order(100, 10, seed=0, epoch=0)
    assert not np.array_equal(first, epoch_order(100, 10, seed=0, epoch=1))
    assert not np.array_equal(first, epoch_order(100, 10, seed=1, epoch=0))
    assert np.array_equal(first, epoch_order(100, 10, seed=0, epoch=0))


@given(caption=st.integers(0, 2**40), seed=st.integers(0, 2**32), n=st.integers(1, 25))
def test_chosen_images_are_distinct_and_frozen(caption, seed, n):
    chosen = chosen_images(caption, seed, 25, n)
    assert len(set(chosen)) == n and set(chosen) <= set(range(25))
    assert chosen == chosen_images(caption, seed, 25, 25)[:n]


def test_choices_cover_the_set_evenly():
    counts = np.bincount([image for caption in range(2000) for image in chosen_images(caption, 0)], minlength=25)
    assert counts.min() > 300 and counts.max() < 500
