"""What others do to packed parameters and their state between two steps is noticed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from packed_steps import Edit, Many, batch, compared, eagerly, loss_fn, optimizer, packed, values


def replace(model: nn.Module, adam: ca.Adam) -> None:
    model.scales[3] = mx.full((4,), 0.25)


def load(model: nn.Module, adam: ca.Adam) -> None:
    model.update({"scales": [2 * scale for scale in model.scales], "scalar": mx.array(0.75)})


def add_in_place(model: nn.Module, adam: ca.Adam) -> None:
    model.scales[3] += 1.0


def twice_in_place(model: nn.Module, adam: ca.Adam) -> None:
    scale = model.scales[3]
    for _ in range(2):  # evaluated in between, so that memory of the first result may be that of the second
        scale += 0.5
        mx.eval(scale)


def set_an_element(model: nn.Module, adam: ca.Adam) -> None:
    model.tables[5][1, 2] = 3.0


def square_in_place(model: nn.Module, adam: ca.Adam) -> None:
    model.scales[3] *= model.scales[3]  # no array but those that are there: only the operation tells


def copy_in_place(model: nn.Module, adam: ca.Adam) -> None:
    model.scales[3][:] = model.scales[4]  # no operation either: only which is which


def swap_in_place(model: nn.Module, adam: ca.Adam) -> None:
    kept = mx.zeros((4,))
    kept[...] = model.scales[3]
    model.scales[3][...] = model.scales[4]
    model.scales[4][...] = kept


def copy_moment_in_place(model: nn.Module, adam: ca.Adam) -> None:
    mx.eval(adam.state)
    adam.state["scales"][2]["m"][...] = adam.state["scales"][1]["m"]


def replace_moment(model: nn.Module, adam: ca.Adam) -> None:
    adam.state["scales"][2]["m"] = mx.full((4,), 0.5)


def scale_moment_in_place(model: nn.Module, adam: ca.Adam) -> None:
    adam.state["scales"][2]["v"] *= 4.0


def evaluate_state_and_edit(model: nn.Module, adam: ca.Adam) -> None:
    mx.eval(adam.state)
    adam.state["tables"][1]["m"][0, 0] = 2.0


def look(model: nn.Module, adam: ca.Adam) -> None:
    mx.eval(adam.state)


def assign_state(model: nn.Module, adam: ca.Adam) -> None:
    adam.state = copy.copy(adam.state)


def update_eagerly(model: nn.Module, adam: ca.Adam) -> None:
    adam.update(model, nn.value_and_grad(model, loss_fn)(model, batch(50))[1])


@pytest.mark.parametrize(
    "edit",
    [
        replace,
        load,
        add_in_place,
        twice_in_place,
        set_an_element,
        square_in_place,
        copy_in_place,
        swap_in_place,
        copy_moment_in_place,
        replace_moment,
        scale_moment_in_place,
        evaluate_state_and_edit,
        look,
        update_eagerly,
    ],
)
def test_what_others_do_to_parameters_and_state_is_noticed(edit: Edit) -> None:
    edits = {2: edit, 4: edit, 5: edit}
    found = packed(edits, mx.float32)
    compared(found, eagerly(edits, mx.float32))
    if edit is not look:
        untouched = packed({}, mx.float32)
        assert any(not np.allclose(found[path], untouched[path], rtol=1e-4) for path in found)


def test_an_assigned_state_is_used() -> None:
    def run(edit: Edit) -> dict[str, np.ndarray]:
        model, adam = Many(), optimizer()
        step = ca.make_step(model, loss_fn, adam)
        for i in range(4):
            if i == 2:
                edit(model, adam)
            step(batch(i))
        return values(model, adam.state)

    compared(run(assign_state), run(look))


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state["scales"][2].update(m=mx.full((4,), 0.5)),
        lambda state: operator.setitem(state["scales"], 2, {"m": mx.full((4,), 0.5), "v": mx.full((4,), 0.25)}),
        lambda state: state["scales"].pop(),  # of the last parameter, which begins anew
    ],
    ids=["moment", "container", "less"],
)
def test_an_edit_of_a_state_that_was_read_before_is_noticed(edit: Callable[[dict], None]) -> None:
    """Packed moments are not in the tree then, and the optimizer does not see who edits it."""

    def run(early: bool) -> dict[str, np.ndarray] | str:
        model, adam = Many(), optimizer()
        step = ca.make_step(model, loss_fn, adam)
        state = adam.state
        for i in range(4):
            if i == 2:
                edit(state if early else adam.state)
            step(batch(i))
        return values(model, adam.state)

    compared(run(True), run(False))
