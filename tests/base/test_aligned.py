"""Gradients, parameters and states side by side: containers of arrays only are walked in C, with the same results."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from compiled_adam.base import Aligned, InputError, filled


def w(value: float = 1.0) -> mx.array:
    return mx.array([value])


def state() -> dict[str, mx.array]:
    return {"m": w(), "v": w()}


def test_nested_and_flat_trees() -> None:
    flat = {"x": w(1), "y": w(2)}, {"x": w(3), "y": w(4), "z": w(5)}, {name: state() for name in "xyz"}
    nested: Any = [{"a": [tree], "b": other} for tree, other in zip(flat, (w(6), w(7), state()), strict=True)]
    for (gradients, parameters, states), paths in ((flat, ("x", "y")), (nested, ("a.0.x", "a.0.y", "b"))):
        found = Aligned(gradients, parameters, states)
        assert found.paths == paths and not found.without_state
        assert [g.item() for g in found.gradients] == [1, 2, 6][: len(paths)]
        assert [p.item() for p in found.parameters] == [3, 4, 7][: len(paths)]
        for container, key, parameter in zip(found.containers, found.keys, found.parameters, strict=True):
            assert container[key] is parameter
        assert found.states[1] is (states["y"] if paths[0] == "x" else states["a"][0]["y"])


@pytest.mark.parametrize("missing", ["m", "v"])
def test_an_incomplete_state_is_none(missing: str) -> None:
    states = {"x": state(), "y": {name: array for name, array in state().items() if name != missing}}
    assert Aligned({"x": w(), "y": w()}, {"x": w(), "y": w()}, states).without_state == ["y"]


@pytest.mark.parametrize("parameters", [{"x": w()}, [w()]])
def test_a_gradient_without_a_parameter(parameters: Any) -> None:
    with pytest.raises(InputError, match=r"there is a gradient for '[xy]', but the parameters have no such path"):
        Aligned({"x": w(), "y": w()}, parameters, {"x": state(), "y": state()})


def test_other_kinds_are_named() -> None:
    with pytest.raises(InputError, match=r"the gradient of 'x' is an array, but the parameter is dict"):
        Aligned({"x": w()}, {"x": {"y": w()}}, {"x": state()})
    with pytest.raises(TypeError, match=r"the gradient of 'x' is float, not an array"):
        Aligned({"x": 1.0}, {"x": w()}, {"x": state()})


def test_filled_keeps_containers() -> None:
    assert filled({"a": (w(), {"b": w()}), "c": [w(), {}]}, iter("xyz")) == {"a": ("x", {"b": "y"}), "c": ["z", {}]}
