"""Where the arrays of a state belong: by place, not by the text of a path; and arrays that the forward pass assigns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from compiled_adam.distributed import shard
from compiled_adam.optimizers import any_optimizer
from mlx.utils import tree_flatten, tree_map

from tests.nets import squared_error


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


class Named(nn.Module):
    """Two layers at places whose names are chosen, before a third."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        one, two = linear(), linear()
        if kind == "dot":
            self["blocks.0"], self["blocks.1"] = one, two
        elif kind == "dots of several levels":
            self["a.b"], self.a = one, {"c": two}
        elif kind == "list with a gap":
            self.blocks = [one, nn.Dropout(0.0), two]
        elif kind == "names of counters":
            self["m"], self["residual"] = one, two
        else:
            self.blocks = {
                "list": [one, two],
                "int keys": {0: one, 1: two},
                "int keys beyond": {7: one, -1: two},
                "digit keys": {"0": one, "1": two},
                "digit keys beyond": {"3": one, "11": two},
                "nested": {"0": [{2: one}], "x": {"1": {"y.z": two}}},
            }[kind]
        self.out = nn.Linear(4, 1)
        self._apply = lambda x: two(mx.tanh(one(x)))

    def __call__(self, x: mx.array) -> mx.array:
        return self.out(self._apply(x))


KINDS = [
    "dot",
    "dots of several levels",
    "list with a gap",
    "names of counters",
    "list",
    "int keys",
    "int keys beyond",
    "digit keys",
    "digit keys beyond",
    "nested",
]


def named(kind: str, optimizer: optim.Optimizer) -> ca.TrainStep:
    mx.random.seed(3)
    return ca.make_step(Named(kind), squared_error, optimizer)


def advance(step: ca.TrainStep, count: int = 3) -> list[float]:
    x = mx.random.normal((5, 4), key=mx.random.key(1))
    return [step(x, x.sum(axis=1, keepdims=True)).loss.item() for _ in range(count)]


def flat(step: ca.TrainStep) -> dict[str, mx.array]:
    return {f"{part}.{path}": array for part, arrays in step.state_dict().items() for path, array in arrays.items()}


def assert_identical(a: dict[str, mx.array], b: dict[str, mx.array]) -> None:
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and mx.array_equal(a[path], b[path], equal_nan=True).item(), path


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_every_kind_keep_their_moments(kind: str, tmp_path: Path) -> None:
    first = named(kind, ca.AdamW(1e-2))
    advance(first)
    ca.save_checkpoint(tmp_path / "1", first)
    moments = {path: array for path, array in flat(first).items() if path.endswith((".m", ".v"))}
    assert len(moments) == 12 and all(array.any().item() for array in moments.values())
    expected = advance(first)
    for change, allow in (
        ({}, ()),
        ({"skip_nonfinite": True}, ["skip_nonfinite"]),
        ({"max_grad_norm": 1e9}, ["max_grad_norm"]),
        ({"moments": "param"}, ["moments"]),
    ):
        other = named(kind, ca.AdamW(1e-2, **change))
        ca.load_checkpoint(tmp_path / "1", other, allow=allow)
        state = flat(other)
        assert_identical(moments, {path: state[path] for path in moments})
        assert advance(other) == pytest.approx(expected, rel=1e-6)  # what allowed changes round otherwise
        assert other.traces["update"] == 1
    narrow = named(kind, ca.AdamW(1e-2, moments="bfloat16"))
    ca.load_checkpoint(tmp_path / "1", narrow, allow=["moments"])
    state = flat(narrow)
    for path, array in moments.items():
        assert mx.allclose(state[path].astype(mx.float32), array, rtol=2**-8, atol=0).item()  # bfloat16's digits


@pytest.mark.parametrize("kind", KINDS)
def test_stock_states_and_ours_become_each_other(kind: str, tmp_path: Path) -> None:
    makes: list[Callable[[], optim.Optimizer]] = [lambda: ca.AdamW(1e-2), lambda: optim.AdamW(1e-2)]
    for make, other in (makes, makes[::-1]):
        first, second = named(kind, make()), named(kind, other())
        advance(first)
        second.load_state_dict(first.state_dict(), convert=True)
        assert advance(second) == pytest.approx(advance(first), rel=1e-5)  # float32 rounding


def test_a_conversion_that_fails_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = named("int keys", optim.AdamW(1e-2)), named("int keys", ca.AdamW(1e-2))
    advance(first)
    advance(second, 1)
    before = flat(second)
    state = first.state_dict()
    for strange in ("blocks.9.weight.residual", "blocks.residual", "nowhere.m_scale"):
        with pytest.raises(ValueError, match=f"the state has '{strange}', but the optimizer has no such parameter"):
            second.load_state_dict(
                {**state, "optimizer": state["optimizer"] | {strange: mx.zeros((4, 4))}}, convert=True
            )
        assert_identical(before, flat(second))
    wrong = state["optimizer"] | {"learning_rate": mx.zeros(3)}
    with pytest.raises(ValueError, match=r"learning_rate +\[integer, False\] +\[3\]"):
        second.load_state_dict({**state, "optimizer": wrong}, convert=True)
    assert_identical(before, flat(second))


def test_arranged_keeps_containers_and_drops_what_has_no_state() -> None:
    one, two = mx.array(1), mx.array(2)
    template = {"step": one, "a": [{"m": one}, {"m": one}], "b": ({"m": one}, {}), "c": {"m": one}, 5: {"m": one}}
    state = {"step": two, "a.1.m": two, "a.1.v": two, "b.1.m": two, "5.m": two, "x": two}
    tree, strange = any_optimizer.arranged(template, state)
    assert strange == set()
    assert tree == {"step": two, "a": [{}, {"m": two, "v": two}], "b": ({}, {"m": two}), 5: {"m": two}, "x": two}
    assert template["a"][0] == {"m": one}  # not changed


def test_two_places_with_one_path_are_refused() -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = {0: linear(), "0": linear()}

        def __call__(self, x: mx.array) -> mx.array:
            return self.blocks["0"](self.blocks[0](x))

    with pytest.raises(ValueError, match=r"two parameters have the path 'blocks\.0\.weight'; rename one"):
        ca.make_step(Double(), squared_error)
    frozen = Double()
    frozen.blocks[0].freeze()
    step = ca.make_step(frozen, squared_error)
    with pytest.raises(
        ValueError, match=r"two arrays whose path is 'blocks\.0\.weight', which no state can tell apart"
    ):
        step.state_dict()


def test_a_layer_that_is_also_held_privately_is_restored() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._first = linear()  # MLX has no parameters under such a name
            self.layers = [self._first, nn.Linear(4, 1)]

        def __call__(self, x: mx.array) -> mx.array:
            return self.layers[1](self._first(x))

    step = ca.make_step(Held(), squared_error, ca.AdamW(1e-2))
    advance(step)
    state = step.state_dict()
    expected = advance(step)
    step.load_state_dict(state)
    assert_identical(state["model"], step.state_dict()["model"])
    assert advance(step) == expected


# What the forward pass assigns.


class Statistics(nn.Module):
    """Batch normalisation, a count, and a queue that the forward pass replaces by another dtype."""

    def __init__(self, dtype: mx.Dtype) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 3), nn.BatchNorm(3), nn.Linear(3, 1)]
        self.set_dtype(dtype)
        self.calls, self.mean, self.table = mx.array(0), mx.zeros((2,), mx.float16), mx.ones((2,))
        self.freeze(recurse=False, keys=["calls", "mean", "table"])

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += 1
        self.mean = self.mean * 0.5 + x.astype(mx.float32).mean() * self.table
        for layer in self.layers:
            x = layer(x)
        return x


BUFFERS = {"layers.1.running_mean", "layers.1.running_var", "calls", "mean"}


def statistics(dtype: mx.Dtype = mx.bfloat16, accumulate: int = 1) -> ca.TrainStep:
    mx.random.seed(5)
    return ca.make_step(Statistics(dtype), squared_error, ca.AdamW(1e-2), accumulate=accumulate)


def arrays(step: ca.TrainStep) -> dict[str, mx.array]:
    return dict(tree_flatten(step.model.parameters()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_run_whose_first_step_changes_dtypes_goes_on_bit_for_bit(dtype: mx.Dtype, tmp_path: Path) -> None:
    step = statistics(dtype)
    before = arrays(step)
    advance(step, 2)
    changed = {path for path, array in arrays(step).items() if array.dtype != before[path].dtype}
    assert "mean" in changed and (dtype == mx.float32 or "layers.1.running_mean" in changed)
    ca.save_checkpoint(tmp_path / "1", step)
    expected = advance(step, 3), flat(step)
    fresh, used = statistics(dtype), statistics(dtype)
    advance(used, 1)
    for other in (fresh, used):
        ca.load_checkpoint(tmp_path / "1", other)
        assert other.state_dict()["model"].keys() > BUFFERS
        assert advance(other, 3) == expected[0]
        assert_identical(flat(other), expected[1])
    assert fresh.traces["grad"] == 1  # the dtypes were there from its first step on
    assert used.traces["grad"] == step.traces["grad"] == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_state_from_before_the_first_step_can_be_put_back(accumulate: int, tmp_path: Path) -> None:
    step = statistics(accumulate=accumulate)
    before, start = arrays(step), step.state_dict()
    ca.save_checkpoint(tmp_path / "0", step)
    expected = advance(step, 3), arrays(step)
    for _ in range(3):
        step.load_state_dict(start)
        assert_identical(before, arrays(step))
        again = step.state_dict()["model"]
        assert again.keys() == start["model"].keys() | BUFFERS  # nothing is lost now that they are known
        assert (advance(step, 3), step.traces["grad"]) == (expected[0], 2)
        assert_identical(expected[1], arrays(step))
    other = statistics(accumulate=accumulate)
    advance(other, 5)
    ca.load_checkpoint(tmp_path / "0", other)
    assert_identical(before, arrays(other))
    assert advance(other, 3) == expected[0]


def test_a_state_from_before_goes_back_after_a_later_one_was_loaded() -> None:
    first, second = statistics(), statistics()
    before, start = arrays(second), second.state_dict()
    advance(first, 3)
    second.load_state_dict(first.state_dict())
    assert second.model.calls.item() == 3
    second.load_state_dict(start)
    assert_identical(before, arrays(second))


@pytest.mark.parametrize("used", [False, True])
def test_another_shape_is_an_error_that_names_it(used: bool) -> None:
    step, state = statistics(), statistics()
    advance(state, 1)
    if used:
        advance(step, 1)
    good = state.state_dict()
    before = flat(step)
    for name, array in (
        ("mean", mx.zeros((3,))),
        ("calls", mx.zeros((1,))),
        ("layers.1.running_var", mx.zeros((3, 1))),
    ):
        with pytest.raises(ValueError, match=rf"the state does not fit:\n.*\n +{name} .*\(.*\) +float32 \(") as error:
            step.load_state_dict({**good, "model": good["model"] | {name: array}})
        assert len(str(error.value).splitlines()) == 3
        assert_identical(before, flat(step))
    for parameter in ("layers.0.weight", "layers.1.weight"):
        wrong: dict[str, Any] = {parameter: good["model"][parameter].astype(mx.float32)}
        with pytest.raises(ValueError, match=rf"{parameter} +bfloat16 .* float32"):
            step.load_state_dict({**good, "model": good["model"] | wrong})
        missing = {path: array for path, array in good["model"].items() if path != parameter}
        with pytest.raises(ValueError, match=rf"{parameter} +bfloat16 .* -"):
            step.load_state_dict({**good, "model": missing})
    with pytest.raises(ValueError, match=r"nothing\.mean +- +float32"):
        step.load_state_dict({**good, "model": good["model"] | {"nothing.mean": mx.zeros(1)}})
    assert_identical(before, flat(step))


@pytest.mark.parametrize("kind", KINDS)
def test_state_that_was_spread_over_workers_comes_together_by_place(kind: str, monkeypatch) -> None:
    whole = named(kind, ca.AdamW(1e-2))
    advance(whole)
    full = any_optimizer.flat_state(whole.optimizer)
    mine = {path for i, path in enumerate(sorted({path.rpartition(".")[0] for path in full})) if i % 2}

    optimizer = ca.AdamW(1e-2)
    template = optimizer.state | tree_map(lambda _: {}, whole.model.parameters())
    own = {path: array for path, array in full.items() if path.rpartition(".")[0] in mine or "." not in path}
    optimizer.state = any_optimizer.arranged(template, own)[0]
    assert any_optimizer.flat_state(optimizer).keys() == own.keys() < full.keys()

    group = mx.distributed.init()
    monkeypatch.setattr(shard.workers, "gather", lambda group, value: [value, "another worker's"])
    monkeypatch.setattr(shard.workers, "share", lambda group, state: {"optimizer": full | {"gone.m": mx.array(0)}})
    shard.complete(optimizer, group, whole.model.parameters())
    assert_identical(full, any_optimizer.flat_state(optimizer))
    step = ca.make_step(whole.model, squared_error, optimizer)
    assert_identical(full, step.state_dict()["optimizer"])
