"""Sharded optimizer state gives the same bits as state that every worker has: 2 and 4 processes are really started."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.distributed import shard
from compiled_adam.distributed.reduce import LIMIT
from compiled_adam.optimizers import ForSteps, any_optimizer
from compiled_adam.update import global_norm
from compiled_adam.update.leaves import Part

from tests import launch
from tests.nets import linear_net, squared_error

WIDE = {"width": 72, "depth": 8}  # leaves of 5184 elements, which 8-bit moments are for
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": WIDE,
    "poisoned": {"accumulate": 2, "poisoned": 2, "depth": 3},
    "unfinished": {"accumulate": 3, "batches": 8, "depth": 3},
    "no norm": {"depth": 3, "limit": 300, "optimizer": {"max_grad_norm": None, "skip_nonfinite": False}},
    "bfloat16": {"depth": 3, "dtype": "bfloat16", "reduce_dtype": "param"},
    # An update that is called joins these leaves, and joined they are large enough for other kernels.
    "wide bfloat16": {**WIDE, "dtype": "bfloat16"},
    "mixed": {"depth": 3, "dtype": "mixed", "limit": 10},
    "8bit": {**WIDE, "optimizer": {"moments": "8bit"}},
    "bfloat16 moments": {**WIDE, "optimizer": {"moments": "bfloat16"}},
    "groups": {
        "depth": 3,
        "optimizer": {
            "learning_rate_multipliers": {"layers.0": 0.1, "layers.[24]": 3.0},
            "groups": {"bias": {"betas": [0.5, 0.9], "weight_decay": 0.3}},
        },
    },
    "stock": {"depth": 3, "stock": "AdamW"},
    "several": {"depth": 3, "dtype": "mixed", "several": "compensated", "accumulate": 2, "poisoned": 2},
    "nested": {**WIDE, "dtype": "mixed", "several": "nested", "optimizer": {"moments": "bfloat16"}},
}
UNFINISHED = JOBS["unfinished"]
TWO = {"depth": 3, "several": "compensated", "batches": 4, "shard_state": True}


def both(jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{name}{end}": {**job, "shard_state": bool(end)} for name, job in jobs.items() for end in ("", " sharded")}


def bits(file: Path) -> dict[str, np.ndarray]:
    """What is in a file, each number as a word, so that nan is nan."""
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    return {path: np.array(array.view(words[array.dtype.size])) for path, array in arrays.items()}


def assert_same(one: Path, other: Path) -> None:
    a, b = bits(one), bits(other)
    assert a.keys() == b.keys() and a
    for path in a:
        assert np.array_equal(a[path], b[path]), path


def start(count: int, folder: Path, jobs: dict[str, dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    printed = launch.run(count, folder, "-m", "tests.step_worker", json.dumps(jobs))
    return [dict(zip(jobs, map(json.loads, text.splitlines()), strict=True)) for text in printed]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, dict[str, Any]]]]]:
    folder = tmp_path_factory.mktemp("sharded")
    launch.warm("shard", folder / "warm", "tests.step_worker", json.dumps(both(JOBS) | {"two": TWO}))
    return {
        count: (
            folder / str(count),
            start(count, folder / str(count), both(JOBS) if count > 1 else {"unfinished": UNFINISHED}),
        )
        for count in (1, 2, 4)
    }


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("count", [2, 4])
def test_the_same_bits(job: str, count: int, ran) -> None:
    folder, printed = ran[count]
    for rank in range(count):
        assert_same(folder / f"{job} sharded-{rank}.safetensors", folder / f"{job}-{rank}.safetensors")
        whole, sharded = printed[rank][job], printed[rank][f"{job} sharded"]
        assert whole["state"] > sharded["state"] and not whole["gathered"] and sharded["gathered"]
        for what in ("votes", "traces", "skipped", "updates", "calls"):
            assert sharded[what] == whole[what], what
    for file in ("optimizer", "weights") + (("window",) if job == "unfinished" else ()):
        name = f"{file}.safetensors"
        assert_same(folder / f"{job} sharded-checkpoint" / name, folder / f"{job}-checkpoint" / name)


@pytest.mark.parametrize("count", [2, 4])
def test_each_has_its_part_of_the_state(count: int, ran) -> None:
    for job in ("wide", "8bit", "bfloat16 moments"):
        everything = ran[count][1][0][job]["state"]
        parts = [printed[f"{job} sharded"]["state"] for printed in ran[count][1]]
        # Eight leaves of 5184 elements go evenly; the others and a few scalars are less than 3 % of them together.
        assert max(parts) == pytest.approx(everything / count, rel=0.03), parts
        assert everything <= sum(parts) <= everything + count * 64


@pytest.mark.parametrize("count", [2, 4])
def test_what_is_gathered(count: int, ran) -> None:
    sizes = {"plain": [32, 8, 8, 1], "mixed": [32, 8, *[64, 8] * 3, 8, 1]}
    for job, dtypes in (("plain", [mx.float32] * 4), ("mixed", [mx.bfloat16] * 8 + [mx.float32] * 2)):
        calls = shard.rounds(sizes[job], dtypes, count, JOBS[job].get("limit", LIMIT))
        for printed in ran[count][1]:
            assert printed[f"{job} sharded"]["gathered"] == [call.nbytes for call in calls]
    assert ran[4][1][0]["plain sharded"]["gathered"] == [4 * 32 * 4]  # the largest leaf, and the others padded to it
    assert len(ran[2][1][0]["mixed sharded"]["gathered"]) > 2


@pytest.mark.parametrize("source", [1, 2])
def test_resuming_with_another_number_of_workers_is_exact(source: int, ran, tmp_path: Path) -> None:
    """A checkpoint in the middle of a window, loaded and saved at once, is the same; so is what comes of it."""
    name = "unfinished sharded" if source > 1 else "unfinished"
    checkpoint = ran[source][0] / f"{name}-checkpoint"
    for count, sharded in ((1, False), (2, True), (2, False), (4, True)):
        end = f"{count}{' sharded' * sharded}"
        more = {**UNFINISHED, "shard_state": sharded, "resume": str(checkpoint), "first": 8}
        start(count, tmp_path, {end: more, f"{end} on": {**more, "batches": 12}})
        for file in ("optimizer", "weights", "window"):
            assert_same(tmp_path / f"{end}-checkpoint" / f"{file}.safetensors", checkpoint / f"{file}.safetensors")
    assert_same(tmp_path / "2 sharded on-0.safetensors", tmp_path / "2 on-1.safetensors")
    alone, *others = (mx.load(str(tmp_path / f"{end} on-0.safetensors")) for end in ("1", "2 sharded", "4 sharded"))
    for other in others:
        for path, array in other.items():
            # As between any numbers of workers: sums of gradients in another order, after four micro-batches.
            np.testing.assert_allclose(array, alone[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_two_optimizers_on_one_two_and_three_workers_and_resumed(ran, tmp_path: Path) -> None:
    """Muon and AdamW: the same weights, and a checkpoint that other workers load is the same bits."""
    start(3, tmp_path / "3", {"first": TWO})
    checkpoint = tmp_path / "3" / "first-checkpoint"
    more = {**TWO, "resume": str(checkpoint), "first": 4}
    for count in ("1", "2"):
        start(int(count), tmp_path / count, {"first": TWO, "loaded": more, "second": {**more, "batches": 6}})
        for file in ("optimizer", "weights"):
            loaded = tmp_path / count / "loaded-checkpoint"
            assert_same(loaded / f"{file}.safetensors", checkpoint / f"{file}.safetensors")
    for one, other in (("1/first", "2/first"), ("1/first", "3/first"), ("1/second", "2/second")):
        a, b = (mx.load(str(tmp_path / f"{name}-0.safetensors")) for name in (one, other))
        for path, array in a.items():
            # Gradients are summed in another order. Muon's polynomial multiplies the rounding by up to 3.4^5 = 480.
            np.testing.assert_allclose(b[path], array, rtol=1e-4, atol=1e-4, err_msg=path)


def test_every_optimizer_in_compensated_gives_the_same_bits(tmp_path: Path) -> None:
    program = """
import mlx.core as mx, compiled_adam as ca
from tests.nets import linear_net, squared_error, batch
from tests.optimizers.test_compensated import OPTIMIZERS
group = mx.distributed.init()
for name, make in OPTIMIZERS.items():
    found = []
    for sharded in (False, True):
        net, optimizer = linear_net(), ca.Compensated(make(), max_grad_norm=0.5, skip_nonfinite=True)
        net.set_dtype(mx.bfloat16)
        step = ca.make_step(net, squared_error, optimizer, group=group, shard_state=sharded)
        for i in range(3):
            step(*(part.astype(mx.bfloat16) for part in batch(i)))
        found.append(step.state_dict())
    whole, shards = found
    assert all(whole[part].keys() == shards[part].keys() for part in whole), name
    assert all(mx.array_equal(a, shards[part][path]) for part in whole for path, a in whole[part].items()), name
"""
    launch.run(2, tmp_path, "-c", program)


def test_an_optimizer_that_was_sharded_can_be_used_again(tmp_path: Path) -> None:
    program = """
import mlx.core as mx, mlx.optimizers as optim, compiled_adam as ca
from mlx.utils import tree_unflatten
from compiled_adam.optimizers import any_optimizer
from tests.nets import linear_net, squared_error, batch
group = mx.distributed.init()
two = optim.MultiOptimizer([optim.Muon(0.1), optim.AdamW(0.1)], [lambda path, p: p.ndim == 2])
for optimizer in (ca.Adam(0.1), ca.Compensated(two)):
    net = linear_net()
    net.layers[0].set_dtype(mx.bfloat16)
    def made(sharded):
        return ca.make_step(net, squared_error, optimizer, group=group, shard_state=sharded)
    step = made(True)
    step(*batch())
    before = step.state_dict()["optimizer"]
    for sharded in (True, False, True):
        step = made(sharded)
        now = step.state_dict()["optimizer"]
        assert now.keys() == before.keys() and all(mx.array_equal(now[path], before[path]) for path in now), sharded
        assert (len(any_optimizer.flat_state(optimizer)) < len(before)) == sharded
    optimizer.state = tree_unflatten(list(before.items()))
    now = step.state_dict()["optimizer"]
    assert len(any_optimizer.flat_state(optimizer)) < len(before) == len(now)
    step(*batch())
    net.layers[-1].freeze()  # the state of the last layer is at the end of lists
    step = made(True)
    assert step(*batch()).updated
"""
    launch.run(2, tmp_path, "-c", program)


@pytest.mark.slow
def test_memory_is_what_the_other_does_not_have(tmp_path: Path) -> None:
    program = """
import json, sys
import mlx.core as mx, mlx.nn as nn, compiled_adam as ca
from tests.nets import Leaves
net = Leaves(16, 2**18)
step = ca.make_step(net, lambda net: sum(mx.square(a).sum() for a in net.leaves), ca.AdamW(1e-3, max_grad_norm=1.0),
                    group=mx.distributed.init(), shard_state=sys.argv[1] == "sharded")
for _ in range(3):
    mx.eval(step().loss, net.parameters(), step.optimizer.state)
mx.clear_cache()
active = mx.get_active_memory()
mx.reset_peak_memory()
for _ in range(3):
    mx.eval(step().loss, net.parameters(), step.optimizer.state)
print(json.dumps([active, mx.get_peak_memory()]))
"""
    whole, sharded = (
        json.loads(launch.run(2, tmp_path, "-c", program, kind)[0].splitlines()[0]) for kind in ("whole", "sharded")
    )
    weights = 16 * 4 * 2**18
    assert whole[0] == pytest.approx(3 * weights, rel=0.01)  # with two moments
    assert sharded[0] == pytest.approx(2 * weights, rel=0.01)
    # The exchange of new parameters is the peak with shards. Without, it was 7 weights when squares were written out.
    assert sharded[1] <= 6.6 * weights and whole[1] <= 6.2 * weights


def test_a_part_of_an_update_is_that_part_of_the_whole() -> None:
    """What the optimizer must be told of all gradients is `Part`; called eagerly here."""
    options: dict[str, Any] = {"moments": "8bit", "max_grad_norm": 0.5, "skip_nonfinite": True}
    parameters = {name: mx.random.normal((80, 64), key=mx.random.key(i)) for i, name in enumerate("abc")}
    whole, part = ca.Adam(0.1, **options), ca.Adam(0.1, **options)
    ForSteps(part).kept.init_part({"b": parameters["b"]}, parameters)
    mine = {"b": parameters["b"]}
    for i in range(3):
        gradients = {name: mx.random.normal(p.shape, key=mx.random.key(9 + i)) for name, p in parameters.items()}
        parameters = whole.apply_gradients(gradients, parameters)
        common = Part(global_norm(list(gradients.values())), (1,), 3)
        mine = ForSteps(part).apply_part({"b": gradients["b"]}, mine, common)
        assert mx.array_equal(mine["b"], parameters["b"])
        for name, array in any_optimizer.flat_state(part).items():
            assert mx.array_equal(array, any_optimizer.flat_state(whole)[name]), name
    assert "a" not in part.state and part.options == whole.options


def test_leaves_are_dealt_out_evenly() -> None:
    sizes = [7] * 100 + [300] * 21 + [1000]
    for count in (1, 2, 3, 4, 16):
        owned = shard.owners(sizes, count)
        loads = [sum(size for size, owner in zip(sizes, owned, strict=True) if owner == w) for w in range(count)]
        assert max(loads) <= max(1000, sum(sizes) / count + 7)
        calls = shard.rounds(sizes, [mx.bfloat16] * len(sizes), count, limit=1)
        assert sorted(i for call in calls for leaves in call.leaves for i in leaves) == list(range(len(sizes)))
        for call in calls:
            for worker, leaves in enumerate(call.leaves):
                assert all(owned[i] == worker for i in leaves)
                assert sum(sizes[i] for i in leaves) <= call.length <= 1000


def test_without_other_workers_it_changes_nothing() -> None:
    optimizer = ca.Adam(0.1)
    step = ca.make_step(linear_net(), squared_error, optimizer, shard_state=True, group=mx.distributed.init())
    assert step.group is None and "layers" in optimizer.state


class OwnTree(optim.SGD):
    def apply_gradients(self, gradients, parameters):
        return super().apply_gradients(gradients, parameters)


class OwnUpdate(optim.SGD):
    def update(self, model, gradients):
        super().update(model, gradients)


def test_what_cannot_be_sharded() -> None:
    group: Any = types.SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    for own, method in ((OwnTree, "apply_gradients"), (OwnUpdate, "update")):
        several = optim.MultiOptimizer([ca.Adam(0.1), own(0.2)], [lambda path, _: "bias" in path])
        with pytest.raises(ValueError, match=f"{own.__name__} has a method {method} of its own; override apply_single"):
            ca.make_step(linear_net(), squared_error, several, group=group, shard_state=True)
    with pytest.raises(ValueError, match="shard_state is 1; it must be True or False"):
        ca.make_step(linear_net(), squared_error, shard_state=1)
