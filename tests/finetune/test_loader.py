from __future__ import annotations

import warnings

import numpy as np
import pytest
from compiled_adam.base.errors import InputError
from compiled_adam.finetune.batches import Batches, Forecast
from compiled_adam.finetune.padding import geometric, multiple_of_32
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import iterate_batches

from tests.tiny_runs import Group, Tokens, same


def examples(count: int = 23, longest: int = 150) -> Tokens:
    chance = np.random.default_rng(0)
    lengths = chance.integers(3, longest, count)
    return Tokens((chance.integers(1, 99, length).tolist(), int(length) // 3) for length in lengths)


@pytest.mark.filterwarnings("ignore:an example has")
@pytest.mark.parametrize("cached", [True, False])
def test_the_batches_of_mlx_lm_also_after_going_back_to_a_position(cached: bool) -> None:
    dataset = CacheDataset(examples()) if cached else examples()
    np.random.seed(3)
    stock = iterate_batches(dataset, 4, 100, loop=True)
    expected = []
    for i in range(17):  # more than three epochs
        expected.append(next(stock))
        if i % 3 == 0:
            np.random.permutation(5)  # as a validation draws between the batches
    np.random.seed(3)
    batches = Batches(dataset, 4, 100, loop=True)
    for i in range(17):
        if i % 2:  # goes on in another process, whose random state is another one
            position = batches.position()
            np.random.seed(99)
            batches = Batches(dataset, 4, 100, loop=True)
            batches.restore(position)
        assert same(next(batches), expected[i]), i
        if i % 3 == 0:
            np.random.permutation(5)


def test_one_epoch_without_loop_and_a_seed() -> None:
    stock = list(iterate_batches(examples(), 4, 200, seed=5))
    ours = list(Batches(examples(), 4, 200, seed=5))
    assert len(stock) == len(ours) == 5
    assert all(map(same, stock, ours))


def test_each_process_takes_its_part() -> None:
    for group in (Group(0, 2), Group(1, 2)):
        stock = list(iterate_batches(examples(), 4, 200, seed=5, comm_group=group))
        assert all(map(same, stock, Batches(examples(), 4, 200, seed=5, comm_group=group)))
    with pytest.raises(ValueError, match="batch_size is 3; it must be divisible by the 2 processes"):
        Batches(examples(), 3, 200, comm_group=group)


def test_no_batch_is_made_to_go_to_a_position() -> None:
    batches = Batches(CacheDataset(examples()), 4, 200, loop=True)
    for _ in range(13):
        next(batches)
    dataset = examples()
    again = Batches(CacheDataset(dataset), 4, 200, loop=True)
    again.restore(batches.position())
    assert dataset.asked == 0
    assert same(next(again), next(batches)) and dataset.asked == 4


@pytest.mark.parametrize("ratio", [1.01, 1.1, 1.25, 1.5, 2.0, 7.0])
def test_buckets_are_few_and_waste_at_most_their_ratio(ratio: float) -> None:
    padded = geometric(ratio)
    lengths = range(1, 2049)
    for length in lengths:
        assert multiple_of_32(length) <= padded(length) <= max(multiple_of_32(length), ratio * length + 33)
    buckets = {padded(length) for length in lengths}
    assert buckets <= {multiple_of_32(length) for length in range(1, 20_000)}
    assert len(buckets) <= np.log(64) / np.log(ratio) + 2


def test_forecast_is_what_happens() -> None:
    for padding in (multiple_of_32, geometric(1.5)):
        batches = Batches(examples(), 4, 120, padding=padding)
        with pytest.warns(UserWarning, match="cut to max_seq_length=120"):
            epoch = list(Batches(examples(), 4, 120, padding=padding))
        tokens = sum(int((lengths[:, 1]).sum().item()) for _, lengths in epoch)
        padded = sum(batch.size for batch, _ in epoch)
        assert batches.forecast() == Forecast(len({batch.shape for batch, _ in epoch}), padded / tokens - 1)


def test_what_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="at least batch_size=64"):
        Batches(examples(), 64, 100)
    for ratio in (1.0, 0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"the ratio of the lengths must be from 1\.01 to 1000"):
            geometric(ratio)


# Positions that are none, or of another number of batches.


def begun(count: int, taken: int, batch_size: int = 4) -> Batches:
    np.random.seed(5)
    batches = Batches(examples(count), batch_size, 200, loop=True)
    for _ in range(taken):
        next(batches)
    return batches


@pytest.mark.parametrize("old", [False, True])
def test_a_position_past_the_end_is_the_beginning_of_an_epoch(old: bool) -> None:
    position = begun(40, taken=8).position()
    if old:
        del position["batches"]  # as version 0.1 wrote it
    begun(40, taken=8)  # NumPy is where it was there
    expected = Batches(examples(23), 4, 200, loop=True)
    following = [next(expected) for _ in range(12)]
    batches = begun(23, taken=2)
    message = f"batch 8 of an epoch of {'more' if old else 10} batches, and an epoch has 5 now"
    with pytest.warns(UserWarning, match=message):
        batches.restore(position)
    assert all(same(next(batches), each) for each in following)


def test_another_number_of_batches_begins_an_epoch_and_the_end_of_one_is_a_place() -> None:
    position = begun(23, taken=2).position()
    batches = begun(40, taken=0)
    with pytest.warns(
        UserWarning, match="batch 2 of an epoch of 5 batches, and an epoch has 10 now: a new epoch begins"
    ):
        batches.restore(position)
    assert batches.position()["next"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(40, taken=0).restore(begun(23, taken=0).position())  # of an epoch that has not begun
        for taken in (0, 4, 5):
            batches = begun(23, taken)
            position, expected = batches.position(), next(batches)
            other = begun(23, 1)
            other.restore(position)
            assert same(next(other), expected)


GOOD = begun(23, taken=2).position()


@pytest.mark.parametrize(
    "position",
    [
        *(None, [], "here", 3, {}),
        *({**GOOD, "next": wrong} for wrong in (-1, 1.5, "2", None, True)),
        *({**GOOD, "batches": wrong} for wrong in (-1, 1.5, "2", True)),
        {**GOOD, "epoch_start": None},
        *({**GOOD, name: wrong} for name in ("random", "epoch_start") for wrong in ("x", [], {}, 3, ["MT19937"])),
        *(
            {**GOOD, name: [*GOOD[name][:place], wrong, *GOOD[name][place + 1 :]]}
            for name in ("random", "epoch_start")
            for place, wrong in (
                *(
                    (0, "PCG64"),
                    (0, 3),
                    (1, 3),
                    (1, []),
                    (1, [0] * 623),
                    (1, [-1] * 624),
                    (1, [2**32] * 624),
                    (1, ["a"] * 624),
                ),
                *((2, 625), (2, -1), (2, 10**30), (2, "1"), (3, 2), (3, None), (4, "x"), (4, float("nan"))),
            )
        ),
    ],
    ids=lambda position: str(position)[-60:],
)
def test_a_position_that_is_none(position) -> None:
    batches = begun(23, taken=3)
    before = batches.position()
    with pytest.raises(InputError, match="the position in the data"):
        batches.restore(position)
    assert batches.position() == before
