"""The order of samples is arithmetic: a function of sizes, seed, rank and position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.data.order import BatchSampler, Order, split_evenly

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda one: sum(one) >= 40)


def epochs(order: Order, *which: int) -> list[np.ndarray]:
    return [order.epoch(epoch) for epoch in which]


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(0, 99), st.integers(1, 20))
def test_dropping_reads_no_sample_twice_and_leaves_less_than_a_batch_on_every_rank(sizes, b, world, seed, window):
    orders = [
        Order(sizes, b, seed=seed, rank=rank, world_size=world, window=window, remainder="drop")
        for rank in range(world)
    ]
    read = np.concatenate([order.epoch(3) for order in orders])
    assert len(set(read)) == len(read)
    assert {order.batches_per_epoch for order in orders} == {sum(sizes) // world // b}
    assert len(read) > sum(sizes) - world * b - world


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_padding_reads_every_sample_and_less_than_a_batch_again_on_every_rank(sizes, b, world, seed):
    orders = [Order(sizes, b, seed=seed, rank=rank, world_size=world, remainder="pad") for rank in range(world)]
    read = np.concatenate([order.epoch(0) for order in orders])
    assert set(read) == set(range(sum(sizes)))
    assert len({order.batches_per_epoch for order in orders}) == 1
    assert len(read) < sum(sizes) + world * (b + 1)


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 4), st.integers(0, 200))
def test_any_batch_can_be_asked_for_directly(sizes, b, number):
    walked = list(BatchSampler(Order(sizes, b, seed=7), total=number + 1))[-1]
    asked = Order(sizes, b, seed=7).batch(number)
    assert walked.epoch == asked.epoch
    assert walked.samples.tolist() == asked.samples.tolist()


def test_epochs_and_seeds_differ():
    one, two = epochs(Order([50, 50], 10), 0, 1)
    other = Order([50, 50], 10, seed=1).epoch(0)
    assert one.tolist() != two.tolist() != other.tolist()
    assert one.tolist() == Order([50, 50], 10).epoch(0).tolist()


def test_the_order_is_the_one_that_earlier_versions_gave():
    # Not from a publication: a change here would change resumed runs in the middle.
    assert Order([3, 4, 3], 2, seed=5, window=2).epoch(1).tolist() == [6, 9, 8, 5, 7, 2, 3, 1, 4, 0]


def test_a_rank_touches_little_more_than_its_share_of_the_shards():
    touched = set(Order([100] * 64, 10, world_size=8, rank=3).epoch(0) // 100)
    assert len(touched) <= 64 / 8 + 2


def test_a_moving_window_keeps_few_shards_open_and_mixes_them():
    window, shards = 4, Order([100] * 40, 10, window=4).epoch(0) // 100
    for start in range(0, 4000 - 100, 50):
        assert len(set(shards[start : start + 100])) <= window + 3  # 100 samples are one shard's time
    assert len(set(shards[:100])) >= window  # also at the beginning


def test_a_folder_of_single_files_is_shuffled_as_a_whole():
    order = Order(np.ones(1000), 10).epoch(0)
    assert np.abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_the_length_counts_from_the_beginning_of_the_run():
    sampler = BatchSampler(Order([10], 2), total=12, start=9)
    assert len(sampler) == 12
    assert len(list(sampler)) == 3


def test_a_batch_that_no_rank_can_fill_is_refused():
    with pytest.raises(ValueError, match="7 samples do not fill 2 batches of 4"):
        Order([7], 4, world_size=2)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
def test_evaluation_reads_every_sample_once_in_equally_many_batches(count, b, world):
    if count < world:
        with pytest.raises(ValueError, match="fewer than"):
            split_evenly(count, b, 0, world)
        return
    ranks = [split_evenly(count, b, rank, world) for rank in range(world)]
    read = [n for batches in ranks for batch in batches for n in batch.samples.tolist()]
    assert sorted(read) == list(range(count))
    assert len({len(batches) for batches in ranks}) == 1
    assert max(len(batch.samples) for batches in ranks for batch in batches) <= b + 1
