from __future__ import annotations

import copy
import gc
import operator
import threading
from collections.abc import Callable

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam.base.mlx_graph import kernels
from compiled_adam.optimizers import ForSteps
from compiled_adam.step import apply_packed
from compiled_adam.update import packing, residual
from compiled_adam.update.groups import Group
from compiled_adam.update.leaves import Form
from mlx.utils import tree_flatten


class Many(nn.Module):
    """Many small parameters of two shapes beside one that is too large to be packed."""

    def __init__(self, dtype: mx.Dtype = mx.float32, count: int = 12) -> None:
        super().__init__()
        mx.random.seed(3)
        self.scales = [mx.random.normal((4,)).astype(dtype) for _ in range(count)]
        self.tables = [mx.random.normal((3, 4)).astype(dtype) for _ in range(count)]
        self.large = mx.random.normal((packing.SMALL // 4 + 1, 4)).astype(dtype)
        self.scalar = mx.array(0.5, dtype)

    def __call__(self, x: mx.array) -> mx.array:
        for scale, table in zip(self.scales, self.tables, strict=True):
            x = mx.tanh(x * scale + (x[:, :3] @ table)) * self.scalar
        return x @ self.large[:7].T + self.large.mean()


def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
    return mx.square(model(x).astype(mx.float32) - 1).mean()


def batch(i: int) -> mx.array:
    return mx.random.normal((5, 4), key=mx.random.key(100 + i))


OPTIONS: dict[str, dict] = {
    "plain": {},
    "groups": {
        "decay_filter": ca.decay_matrices,
        "learning_rate_multipliers": {"scales": 2.0},
        "groups": {r"tables\.[0-4]": {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3}},
    },
    "clip and guard": {"max_grad_norm": 0.1, "skip_nonfinite": True},
    "schedule": {"learning_rate": ca.schedulers.cosine(1e-2, 10, warmup=2)},
    "bfloat16 moments": {"moments": "bfloat16"},
}


def optimizer(**options) -> ca.AdamW:
    return ca.AdamW(**{"learning_rate": 1e-2, "weight_decay": 0.1, "bias_correction": True} | options)


def values(model: nn.Module, state: dict) -> dict[str, np.ndarray]:
    """Everything, as float32; weights that have a residual as what both stand for."""
    arrays = dict(tree_flatten({"model": model.parameters(), "state": state}))
    for path in [path for path in arrays if path.endswith(".residual")]:
        weight = path.replace("state", "model", 1).removesuffix(".residual")
        arrays[weight] = residual.join(arrays[weight], arrays.pop(path))
    return {path: np.array(array.astype(mx.float32)) for path, array in arrays.items()}


def compared(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        # The norm is summed in another order, and products and sums are contracted in other kernels: a last bit each
        # time, which Adam divides by the gradient's own size.
        np.testing.assert_allclose(found[path], array, rtol=2e-5, atol=1e-6, err_msg=path)


Edit = Callable[[nn.Module, ca.Adam], None]


def eagerly(edits: dict[int, Edit], dtype: mx.Dtype, steps: int = 6, **options) -> dict[str, np.ndarray]:
    model, adam = Many(dtype), optimizer(**options)
    value_and_grad = nn.value_and_grad(model, loss_fn)
    for i in range(steps):
        if i in edits:
            edits[i](model, adam)
        _, gradients = value_and_grad(model, batch(i))
        adam.update(model, gradients)
        mx.eval(model.parameters(), adam.state)
    return values(model, adam.state)


def packed(edits: dict[int, Edit], dtype: mx.Dtype, steps: int = 6, **options) -> dict[str, np.ndarray]:
    model, adam = Many(dtype), optimizer(**options)
    step = ca.make_step(model, loss_fn, adam)
    for i in range(steps):
        if i in edits:
            edits[i](model, adam)
        step(batch(i))
    assert step.traces["update"] == 1
    return values(model, adam.state)


# Not moments rounded at random for bfloat16 weights: a gradient's last bit can round one the other way.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, mx.float32) for name in OPTIONS), *((name, mx.bfloat16) for name in OPTIONS if "moments" not in name)],
)
def test_a_step_is_the_update_that_the_optimizer_makes_alone(name: str, dtype: mx.Dtype) -> None:
    compared(packed({}, dtype, **OPTIONS[name]), eagerly({}, dtype, **OPTIONS[name]))


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


def test_a_batch_of_weight_zero_has_the_norm_zero() -> None:
    step = ca.make_step(Many(), lambda model, x: (loss_fn(model, x), 0), optimizer(), weighted=True)
    assert step(batch(0)).grad_norm.item() == 0


def test_one_kernel_for_many_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    evaluate = mx.async_eval

    def counting(*trees) -> None:
        graphs.append(kernels([a for _, a in tree_flatten(trees) if isinstance(a, mx.array)]))
        evaluate(*trees)

    monkeypatch.setattr(mx, "async_eval", counting)
    counts = {}
    for count in (12, 24):
        step = ca.make_step(Many(count=count), loss_fn, optimizer(lowering="fused"))
        step(batch(0))
        step(batch(1))
        counts[count] = sum(n for name, n in graphs[-1].items() if "Sqrt" in name and "Broadcast" in name)
    assert counts == {12: 2, 24: 2}  # all small leaves together, and the large one


@pytest.mark.parametrize(
    ("shapes", "flat"),
    [([(2, 3), (4, 3)], (6, 3)), ([(2,), (3,)], (5,)), ([(2, 3), (3, 2)], (12,)), ([(), (2,)], (3,)), ([(), ()], (2,))],
)
def test_rows_of_one_shape_are_not_made_flat_first(shapes: list[tuple[int, ...]], flat: tuple[int, ...]) -> None:
    arrays = [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]
    found = packing.flat(arrays)
    assert found.shape == flat
    assert found.reshape(-1).tolist() == [x for array in arrays for x in array.reshape(-1).tolist()]


def test_a_leaf_of_the_greatest_small_size_is_packed() -> None:
    leaf = packing.Leaf(4, mx.float32, Group(), Form("float32", False, False))
    assert packing.packs([leaf] * 2, small=4) == [(0, 1)]
    assert packing.packs([leaf] * 2, small=3) == []


def test_leaves_that_differ_in_what_an_update_depends_on_are_not_packed_together() -> None:
    def leaves_of(adam: ca.Adam) -> list[packing.Leaf]:
        kind = ForSteps(adam).leaves.group_and_form
        return [packing.Leaf(4, mx.float32, *kind(path, mx.zeros((4,)))) for path in ("a1", "a2", "b1", "b2")]

    multipliers = {"a": 2.0}
    stochastic = optimizer(learning_rate_multipliers=multipliers, moments="8bit")
    assert packing.packs(leaves_of(stochastic)) == []
    leaves = leaves_of(optimizer(learning_rate_multipliers=multipliers))
    assert packing.packs(leaves) == [(0, 1), (2, 3)]
    assert packing.packs(leaves[:3]) == [(0, 1)]
    assert packing.packs(leaves, small=3) == []
    many = [leaves[0]] * (packing.MANY + 2)
    assert [len(pack) for pack in packing.packs(many)] == [packing.MANY, 2]
    assert [len(pack) for pack in packing.packs(many[:9], full=16)] == [4, 4]


def test_the_state_is_complete_whenever_it_is_asked_for() -> None:
    model, adam = Many(), optimizer()
    step = ca.make_step(model, loss_fn, adam)
    paths = {path for path, _ in tree_flatten(adam.state)}
    for i in range(3):
        step(batch(i))
        assert {path for path, _ in tree_flatten(adam.state)} == paths
        assert {path for path, _ in tree_flatten(copy.deepcopy(adam).state)} == paths
    step(batch(3))
    twin = copy.deepcopy(adam)  # before anybody has asked
    compared(values(model, twin.state), values(model, adam.state))
    held = adam.state["scales"][0]
    step(batch(4))
    with pytest.raises(KeyError):
        held["m"]  # rather than an old one
    assert adam.state["scales"][0] is held
    assert mx.any(held["m"] != 0).item()


def test_views_can_be_saved_by_another_thread(tmp_path) -> None:
    model, adam = Many(), optimizer()
    step = ca.make_step(model, loss_fn, adam)
    step(batch(0))
    arrays = step.state_dict()["optimizer"]
    errors = []

    def save() -> None:
        try:
            mx.save_safetensors(str(tmp_path / "state.safetensors"), arrays)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert not errors
    found = mx.load(str(tmp_path / "state.safetensors"))
    assert all(mx.array_equal(found[path], array).item() for path, array in arrays.items())


def test_two_steps_with_one_optimizer_take_turns() -> None:
    model, adam = Many(), optimizer()
    steps = [ca.make_step(model, loss_fn, adam) for _ in range(2)]
    for i in range(6):
        steps[i % 2](batch(i))
    compared(values(model, adam.state), eagerly({}, mx.float32))


def test_two_steps_with_one_optimizer_keep_their_traces() -> None:
    class Flat(nn.Module):  # MLX's init makes lists of layers anew
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mx.array([1.0, 2.0]), mx.array([3.0, 4.0])

    model, adam = Flat(), optimizer()
    steps = [ca.make_step(model, lambda model, x: mx.square(model.a * x - model.b).mean(), adam) for _ in range(2)]
    for i in range(6):
        steps[i % 2](mx.array([0.5, 1.0]))
    assert [step.traces["update"] for step in steps] == [1, 1]


@pytest.mark.parametrize("held", [lambda state: state, dict, copy.copy])
def test_a_state_that_was_held_can_be_assigned(held: Callable[[dict], dict]) -> None:
    def run(look_and_assign: bool) -> dict[str, np.ndarray]:
        model, adam = Many(), optimizer()
        step = ca.make_step(model, loss_fn, adam)
        step(batch(0))
        kept = held(adam.state)
        step(batch(1))
        if look_and_assign:
            # The dictionaries of the leaves are the optimizer's own, and so have what it has; the step may be older.
            adam.state = kept | {"step": adam.step}
        step(batch(2))
        return values(model, adam.state)

    compared(run(True), run(False))


def test_a_look_from_another_thread_does_no_harm() -> None:
    model, adam = Many(), optimizer()
    step = ca.make_step(model, loss_fn, adam)
    for i in range(6):
        step(batch(i))
        if i in (2, 4):
            thread = threading.Thread(target=lambda: adam.state["step"])
            thread.start()
            thread.join()
    compared(values(model, adam.state), eagerly({}, mx.float32))


def test_nobody_asks_and_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, show = [], apply_packed.PackedTrees.show
    monkeypatch.setattr(apply_packed.PackedTrees, "show", lambda self: (shown.append(1), show(self)))
    adam = optimizer()
    step = ca.make_step(Many(), loss_fn, adam)
    for i in range(3):
        step(batch(i))
    assert shown == []
    assert adam.state["step"].item() == 3
    assert shown == [1]


def test_an_array_more_in_a_leafs_state_stays_there() -> None:
    model, adam = Many(), optimizer()
    step = ca.make_step(model, loss_fn, adam)
    step(batch(0))
    for i in (0, 3):
        adam.state["scales"][i]["note"] = mx.array(float(i))
    step(batch(1))
    step(batch(2))
    assert [adam.state["scales"][i]["note"].item() for i in (0, 3)] == [0, 3]


def test_another_dtype_or_shape_is_an_error_that_says_what_to_do() -> None:
    model, adam = Many(), optimizer()
    step = ca.make_step(model, loss_fn, adam)
    step(batch(0))
    kept = model.scales[1]
    model.scales[1] = kept.astype(mx.bfloat16)
    with pytest.raises(ValueError, match=r"'scales.1' has become .*bfloat16.*call make_step again"):
        step(batch(1))
    model.scales[1] = kept
    step(batch(1))
    model.set_dtype(mx.bfloat16)
    step = ca.make_step(model, loss_fn, adam)
    step(batch(2))
    assert model.scales[1].dtype == mx.bfloat16
    assert adam.step.item() == 3
    assert "residual" in adam.state["scales"][1]


@pytest.mark.slow
def test_memory_stays_the_same() -> None:
    model, adam = Many(count=100), optimizer()
    step = ca.make_step(model, loss_fn, adam)
    used = []
    for i in range(30):
        result = step(batch(0))
        if i % 7 == 6:
            mx.eval(adam.state)
        mx.eval(result.loss, model.parameters())
        del result
        mx.synchronize()
        gc.collect()
        used.append(mx.get_active_memory())
    # Where the state was looked at there are no more arrays either: the views are of the same memory.
    # The first steps are several, because every other one may hold the results of the one before.
    assert max(used[6:]) <= max(used[2:6]) + 4096, used
