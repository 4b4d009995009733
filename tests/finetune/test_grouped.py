"""Batches of similar length: every example once an epoch, the longest first, little padding, few shapes."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam.base.errors import InputError
from compiled_adam.finetune.batches import Batches
from compiled_adam.finetune.order import Grouped
from compiled_adam.finetune.padding import chosen, geometric, multiple_of_32, on_cuda, spaced
from mlx.optimizers import SGD
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs

from tests.tiny_runs import Group, Tokens, same

# The medians, spreads and largest lengths of issue L, which are those of chats, articles and instructions.
DISTRIBUTIONS = {"chats": (120, 0.75, 1000), "articles": (450, 0.75, 2048), "instructions": (200, 1.0, 2048)}


def lengths_of(name: str, count: int) -> list[int]:
    median, sigma, longest = DISTRIBUTIONS[name]
    drawn = np.random.default_rng(0).lognormal(math.log(median), sigma, count)
    return np.clip(drawn, 2, longest).astype(int).tolist()


def marked(lengths: list[int]) -> Tokens:
    """Examples of these lengths whose tokens say which one it is."""
    return Tokens(([index + 1] * length, 0) for index, length in enumerate(lengths))


def grouped(lengths: list[int], batch_size: int = 4, longest: int = 2048, **options) -> Batches:
    options = {"padding": spaced(), "group_by_length": True, **options}
    return Batches(marked(lengths), batch_size, longest, loop=True, **options)


def epoch_of(batches: Batches) -> list[tuple[mx.array, mx.array]]:
    return [next(batches) for _ in range(batches.per_epoch)]


def members(batch: tuple[mx.array, mx.array]) -> list[int]:
    """The examples in a batch, without the rows that have none."""
    return [row[0] - 1 for row in batch[0].tolist() if row[0]]


KINDS = [{}, {"batch_tokens": 2048}]


@pytest.mark.parametrize("options", KINDS, ids=["examples", "tokens"])
@pytest.mark.parametrize("count", [1, 3, 4, 61, 128])
def test_every_example_once_in_each_epoch(count: int, options: dict) -> None:
    lengths = lengths_of("chats", count)
    batches = grouped(lengths, **options)
    np.random.seed(0)
    for _ in range(3):
        epoch = epoch_of(batches)
        assert sorted(i for batch in epoch for i in members(batch)) == list(range(count))
        for tokens, ends in epoch:
            for row, (offset, end) in zip(tokens.tolist(), ends.tolist(), strict=True):
                assert offset == 0 and end == lengths[row[0] - 1] and row == [row[0]] * end + [0] * (len(row) - end)
        assert sum(len(batch[0]) for batch in epoch) == count  # no row without an example
    if "batch_tokens" not in options:
        assert Counter(len(batch[0]) for batch in epoch)[4] >= count // 4


@pytest.mark.parametrize("options", KINDS, ids=["examples", "tokens"])
def test_the_longest_are_first_and_epochs_differ_by_the_seed(options: dict) -> None:
    lengths = lengths_of("chats", 200)

    def epochs(seed: int) -> list[list[list[int]]]:
        np.random.seed(seed)
        batches = grouped(lengths, **options)
        return [[sorted(members(batch)) for batch in epoch_of(batches)] for _ in range(3)]

    first, second, third = epochs(1)
    padded = [max(map(spaced(), (lengths[i] for i in batch))) for batch in first]
    assert padded[0] == max(padded)
    assert min(lengths[i] for i in first[0]) >= sorted(lengths)[-2 * len(first[0])]
    later = [max(spaced()(lengths[i]) for i in epoch[0]) for seed in range(8) for epoch in epochs(seed)[1:]]
    assert len(set(later)) > 3  # in later epochs any batch may be first
    assert first != second != third
    assert {tuple(batch) for batch in first} != {tuple(batch) for batch in second}  # other members, too
    assert epochs(1) == [first, second, third] and epochs(2) != [first, second, third]


def test_examples_of_one_length_meet_all_others() -> None:
    np.random.seed(0)
    batches = grouped([50] * 40)
    met = {i for _ in range(60) for batch in epoch_of(batches) if 0 in members(batch) for i in members(batch)}
    assert len(met) == 40


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("options", [*KINDS, {"batch_size": 16}], ids=["examples", "tokens", "large"])
def test_little_padding_and_few_traces(name: str, options: dict) -> None:
    lengths = lengths_of(name, 2000)
    batches = grouped(lengths, **options)
    np.random.seed(0)
    shapes: list[Counter[tuple[int, ...]]] = [Counter(tuple(b[0].shape) for b in epoch_of(batches)) for _ in range(2)]
    assert shapes[0] == shapes[1]  # so that later epochs trace nothing
    positions = sum(rows * (padded - 1) * count for (rows, padded), count in shapes[0].items())
    # Measured: 1.044 to 1.057, and 1.054 to 1.074 with 16 examples; mlx-lm has 1.8 to 2.2, and 2.8 to 3.8.
    assert positions / sum(lengths) <= (1.06 if "batch_size" not in options else 1.08)
    assert len(shapes[0]) <= 50 and batches.forecast().traces == len(shapes[0])
    assert batches.forecast().overhead == pytest.approx(
        sum(rows * padded * count for (rows, padded), count in shapes[0].items()) / sum(lengths) - 1
    )


@pytest.mark.parametrize(
    ("name", "batch_size", "stock", "ours", "by_tokens"),
    [
        ("chats", 4, 1.95, 1.05, 1.06),
        ("articles", 4, 1.84, 1.04, 1.04),
        ("instructions", 4, 2.17, 1.05, 1.05),
        ("chats", 16, 3.07, 1.07, 1.06),
    ],
)
def test_the_table_of_the_manual(name: str, batch_size: int, stock: float, ours: float, by_tokens: float) -> None:
    """Positions for each token; mlx-lm's batches are of examples in their own order."""

    lengths = lengths_of(name, 2000)
    found = []
    for batches in (
        Batches(CacheDataset(marked(lengths)), batch_size, 2049),
        grouped(lengths, batch_size),
        grouped(lengths, batch_tokens=2048),
    ):
        epoch = epoch_of(batches)
        tokens = sum(int(ends[:, 1].sum().item()) for _, ends in epoch)
        found.append(round(sum(rows * (padded - 1) for rows, padded in (b[0].shape for b in epoch)) / tokens, 2))
    assert found == [stock, ours, by_tokens]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("budget", [2048, 8192])
def test_a_batch_has_as_many_examples_as_fit(name: str, budget: int) -> None:
    lengths = lengths_of(name, 500)
    batches = grouped(lengths, batch_tokens=budget)
    np.random.seed(0)
    epoch = epoch_of(batches)
    shapes = [tuple(tokens.shape) for tokens, _ in epoch]
    assert all(rows * (padded - 1) <= budget for rows, padded in shapes)
    full = [rows for rows, padded in shapes if (rows + 1) * (padded - 1) > budget]
    assert len(full) >= len(shapes) - 1 and sum(full) >= 500 - budget // 8  # only the shortest may be a rest
    assert len(set(shapes)) <= len({padded for _, padded in shapes}) + 1  # one number of rows for each length
    assert sorted(batches.rows_in_epoch()) == sorted(rows for rows, _ in shapes)


@pytest.mark.filterwarnings("ignore:an example has")
def test_a_budget_into_which_the_longest_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"batch_tokens \(--batch-tokens\) is 512, but .* takes 1024 positions; give"):
        next(grouped([1000, 20], batch_tokens=512))
    next(grouped([1000, 20], batch_tokens=512, longest=512))  # cut
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="batch_tokens"):
            grouped([20], batch_tokens=wrong)


@pytest.mark.parametrize("options", KINDS, ids=["examples", "tokens"])
def test_resuming_anywhere_gives_the_same_batches(options: dict) -> None:
    lengths = lengths_of("chats", 90)
    np.random.seed(4)
    batches = grouped(lengths, **options)
    total = 2 * batches.per_epoch + 5
    positions, expected = [], []
    for i in range(total):
        positions.append(batches.position())
        expected.append(next(batches))
        if i % 3 == 0:
            np.random.permutation(5)  # as a validation draws between the batches
    for start in (0, 1, 7, batches.per_epoch, batches.per_epoch + 1, total - 1):
        np.random.seed(99)
        resumed = grouped(lengths, **options)
        resumed.restore(positions[start])
        for i in range(start, total):
            assert resumed.position() == positions[i]
            assert same(next(resumed), expected[i]), (start, i)
            if i % 3 == 0:
                np.random.permutation(5)


def test_a_position_of_batches_that_were_put_together_otherwise() -> None:
    lengths = lengths_of("chats", 40)
    old = Batches(marked(lengths), 4, 2048, loop=True)
    next(old)
    position = {name: old.position()[name] for name in ("epoch_start", "next", "random", "batches")}  # of version 0.1
    again = Batches(marked(lengths), 4, 2048, loop=True)
    again.restore(position)
    assert same(next(again), next(old))
    batches = grouped(lengths)
    with pytest.warns(UserWarning, match="batch 1 of an epoch of 10 batches, and examples are grouped by length now"):
        batches.restore(position)
    assert max(lengths[i] for i in members(next(batches))) == max(lengths)  # the longest first, again
    with pytest.warns(UserWarning, match="examples are not grouped by length now: a new epoch begins"):
        again.restore(batches.position())
    for wrong in ({"epoch": -1}, {"epoch": "1"}, {"group_by_length": 1}, {"group_by_length": "yes"}):
        with pytest.raises(InputError, match="the position in the data"):
            batches.restore({**batches.position(), **wrong})


@pytest.mark.parametrize("options", KINDS, ids=["examples", "tokens"])
@pytest.mark.parametrize("count", [1, 37, 64])
def test_workers_share_every_batch(count: int, options: dict) -> None:
    lengths = lengths_of("chats", count)
    alone, *shared = (
        grouped(lengths, **options, comm_group=group) for group in (None, *(Group(rank, 2) for rank in range(2)))
    )
    epochs = []
    for batches in shared:
        np.random.seed(3)
        epochs.append(epoch_of(batches) + epoch_of(batches))
    assert len(epochs[0]) == len(epochs[1])
    seen: Counter[int] = Counter()
    for one, other in zip(*epochs, strict=True):
        assert one[0].shape == other[0].shape  # dropout masks are those of one process
        assert not set(members(one)) & set(members(other))
        seen.update([*members(one), *members(other)])
        for tokens, ends in (one, other):
            for row, (_, end) in zip(tokens.tolist(), ends.tolist(), strict=True):
                assert end == (lengths[row[0] - 1] if row[0] else 0)
            if "batch_tokens" in options:
                assert 2 * tokens.shape[0] * (tokens.shape[1] - 1) <= 2048
    assert seen == Counter(dict.fromkeys(range(count), 2))
    if "batch_tokens" not in options:
        np.random.seed(3)
        whole = epoch_of(alone)
        assert [sorted(members(a) + members(b)) for a, b in zip(*epochs, strict=True)][: len(whole)] == [
            sorted(members(batch)) for batch in whole
        ]


def test_a_validation_keeps_the_batches_of_mlx_lm() -> None:
    lengths = lengths_of("chats", 30)
    np.random.seed(1)
    expected = list(Batches(marked(lengths), 4, 2048))
    np.random.seed(1)
    found = list(Batches(marked(lengths), 4, 2048, group_by_length=True, batch_tokens=4096))
    assert len(found) == len(expected) == 7 and all(map(same, found, expected))


@pytest.mark.filterwarnings("ignore:an example has")
def test_cut_examples_have_a_length_of_the_series() -> None:
    tokens, ends = next(grouped([300, 200], longest=256, batch_size=1))
    # The model sees 256 positions; mlx-lm would give it 255.
    assert tokens.shape == (1, 257) and ends.tolist() == [[0, 256]]


def test_lengths_need_each_example_tokenized_once() -> None:
    dataset = marked([5, 9, 7, 30])
    batches = Batches(CacheDataset(dataset), 2, 64, loop=True, group_by_length=True)
    assert dataset.asked == 0
    assert batches.per_epoch == 2
    for _ in range(6):
        next(batches)
    assert dataset.asked == 4


def test_settings_name_what_changes_the_batches() -> None:
    assert grouped([5]).settings() == {"group_by_length": True}
    assert grouped([5], batch_tokens=64).settings() == {"group_by_length": True, "batch_tokens": 64}
    assert Batches(marked([5]), 1, 64, loop=True).settings() == {}  # as in checkpoints of version 0.1


# Padded lengths.


@pytest.mark.parametrize("step", [8, 32, 128])
def test_spaced_lengths(step: int) -> None:
    padded = spaced(step)
    for length in range(1, 5000):
        positions = padded(length) - 1
        assert length <= positions <= max(length + step - 1, length * 1.125) and positions % step == 0
    assert len({padded(length) for length in range(1, 2049)}) <= 48  # of the 64 traces that stay


def test_lengths_on_cuda_are_multiples_of_128() -> None:
    lengths = range(1, 3000)
    for bucket in (None, 1.25):
        for group in (False, True):
            padded = chosen(bucket, group, cuda=True)
            assert all((padded(length) - 1) % 128 == 0 and padded(length) > length for length in lengths)
    assert chosen(None, False, cuda=False) is multiple_of_32
    for one, other in ((chosen(None, True, cuda=False), spaced(8)), (chosen(2.0, True, cuda=False), geometric(2.0))):
        assert [one(length) for length in lengths] == [other(length) for length in lengths]


@pytest.mark.parametrize(
    ("gpu", "metal", "expected"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_which_device_is_cuda(gpu: bool, metal: bool, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu if gpu else mx.cpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    assert on_cuda() is expected
    assert (chosen(None, True, cuda=on_cuda())(1) == 129) is expected


def test_shapes_follow_from_the_sizes_alone() -> None:
    order = Grouped([9, 33, 17, 9, 33, 9, 9], lambda padded: {33: 1, 17: 2, 9: 3}[padded])
    assert order.batches == [[1], [4], [2, 0], [3, 5, 6]]
    np.random.seed(0)
    for epoch in range(5):
        drawn = order.draw(epoch)
        assert sorted(map(len, drawn)) == [1, 1, 2, 3] and sorted(i for batch in drawn for i in batch) == list(range(7))
        assert epoch or drawn[0] in ([1], [4])


# Every token counts alike.


@pytest.mark.parametrize("options", KINDS, ids=["examples", "tokens"])
def test_the_shares_of_an_epoch(options: dict) -> None:
    lengths = lengths_of("chats", 61)
    examples = [(tokens, len(tokens) // 3) for tokens, _ in marked(lengths)]
    pair = [
        Batches(examples, 4, 2048, loop=True, padding=spaced(), group_by_length=True, comm_group=group, **options)
        for group in (Group(0, 2), Group(1, 2))
    ]
    shares = []
    for batches in pair:
        np.random.seed(0)
        shares.append([])
        for _ in range(batches.per_epoch):
            next(batches)
            shares[-1].append(batches.share.item())
    assert shares[0] == shares[1]  # both know the whole batch
    assert np.mean(shares[0]) == pytest.approx(1, rel=1e-6) and len({*shares[0]}) > 3
    ungrouped = Batches(examples, 4, 2048, loop=True)
    next(ungrouped)
    assert ungrouped.share.item() == 1


def test_gradients_are_multiplied_by_the_share_and_losses_are_not(tmp_path: Path) -> None:
    """With SGD, an epoch from the same weights moves them by the sum over all tokens, however they are batched."""
    lengths = lengths_of("chats", 21)

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = mx.zeros(())

    def loss(model: Slope, tokens: mx.array, ends: mx.array):
        count = (ends[:, 1] - 1).sum()  # without the first token
        return model.w * mx.where(tokens[:, 0] > 0, tokens[:, 0] * (ends[:, 1] - 1), 0).sum() / count, count

    moved = {}
    for name, options in {"examples": {}, "tokens": {"batch_tokens": 2048}}.items():
        model = Slope()
        make = partial(Batches, padding=spaced(), group_by_length=True, **options)
        count = make(marked(lengths), 4, 2048, loop=True).per_epoch
        args = TrainingArgs(batch_size=4, iters=count, adapter_file=str(tmp_path / "a.safetensors"))
        ca.train(model, SGD(1e-3), marked(lengths), args=args, loss=loss, iterate_batches=make)
        # The mean of the gradients of all updates.
        moved[name] = model.w.item() / count
    total = sum((i + 1) * (length - 1) for i, length in enumerate(lengths)) / sum(length - 1 for length in lengths)
    assert moved["examples"] == pytest.approx(-1e-3 * total, rel=1e-5)
    assert moved["tokens"] == pytest.approx(moved["examples"], rel=1e-5)
