from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam.base.mlx_graph import kernels, operations
from compiled_adam.optimizers import ForSteps
from compiled_adam.step import apply_packed
from compiled_adam.update import packing
from compiled_adam.update.groups import Group
from compiled_adam.update.leaves import Form
from mlx.utils import tree_flatten
from packed_steps import Many, batch, compared, eagerly, loss_fn, optimizer, packed, values

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


# Not moments rounded at random for bfloat16 weights: a gradient's last bit can round one the other way.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, mx.float32) for name in OPTIONS), *((name, mx.bfloat16) for name in OPTIONS if "moments" not in name)],
)
def test_a_step_is_the_update_that_the_optimizer_makes_alone(name: str, dtype: mx.Dtype) -> None:
    compared(packed({}, dtype, **OPTIONS[name]), eagerly({}, dtype, **OPTIONS[name]))


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
    assert counts == {12: 3, 24: 3}  # the small leaves of each of two shapes together, and the large one


@pytest.mark.parametrize(
    ("shapes", "flat"),
    [
        ([(2, 3), (4, 3)], (6, 3)),
        ([(2,), (3,)], (5,)),
        ([(), ()], (2,)),
        ([(4, 3)], (4, 3)),
        ([(1 + i % 3, 2) for i in range(137)], (273, 2)),
        ([(0, 2), (3, 2), (0, 2), (1, 2)], (4, 2)),
    ],
)
def test_leaves_are_cut_apart_again(shapes: list[tuple[int, ...]], flat: tuple[int, ...]) -> None:
    arrays = [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]
    found = packing.flat(arrays)
    assert found.shape == flat
    again = packing.apart(found, shapes)
    assert [a.tolist() for a in again] == [a.tolist() for a in arrays]
    assert [a.shape for a in again] == shapes


@pytest.mark.parametrize(("count", "most"), [(10, 1), (11, 3), (100, 11), (256, 30), (1000, 111)])
def test_few_operations_cut_many_leaves_apart(count: int, most: int) -> None:
    array = mx.zeros((count,))
    mx.eval(array)
    assert operations(packing.apart(array, [(1,)] * count)) <= most


def test_a_leaf_of_the_greatest_small_size_is_packed() -> None:
    leaf = packing.Leaf(4, mx.float32, (), Group(), Form("float32", False, False))
    assert packing.packs([leaf] * 2, small=4) == [(0, 1)]
    assert packing.packs([leaf] * 2, small=3) == []


def test_leaves_that_differ_in_what_an_update_depends_on_are_not_packed_together() -> None:
    def leaves_of(adam: ca.Adam) -> list[packing.Leaf]:
        kind = ForSteps(adam).leaves.group_and_form
        return [packing.Leaf.of(array := mx.zeros((4,)), *kind(path, array)) for path in ("a1", "a2", "b1", "b2")]

    multipliers = {"a": 2.0}
    stochastic = optimizer(learning_rate_multipliers=multipliers, moments="8bit")
    assert packing.packs(leaves_of(stochastic)) == []
    leaves = leaves_of(optimizer(learning_rate_multipliers=multipliers))
    assert packing.packs(leaves) == [(0, 1), (2, 3)]
    assert packing.packs(leaves[:3]) == [(0, 1)]
    assert packing.packs(leaves, small=3) == []
    kind = leaves[0].group, leaves[0].form
    shapes = [(), (4,), (2, 2), (4, 1), (2,), (1, 2), ()]
    assert packing.packs([packing.Leaf.of(mx.zeros(shape), *kind) for shape in shapes]) == [(0, 6), (1, 4), (2, 5)]
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
