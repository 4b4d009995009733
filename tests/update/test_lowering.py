from __future__ import annotations

import threading
from collections.abc import Sequence

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam.base.mlx_graph import kernels as kernels_of
from compiled_adam.base.mlx_graph import reached
from compiled_adam.step import apply_packed
from compiled_adam.update import SMALL, global_norm, kernels, residual
from mlx.utils import tree_flatten

SIZES = {"small": 100, "large": kernels.LARGE, "larger": kernels.LARGE + 1, "largest": 3 * kernels.LARGE}


def arrays(dtype: mx.Dtype, scale: float, seed: int) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(seed), len(SIZES))
    return {
        n: (mx.random.normal((s,), key=k) * scale).astype(dtype) for (n, s), k in zip(SIZES.items(), keys, strict=True)
    }


def trained(choice: str, dtype: mx.Dtype, steps: int = 5, **options) -> dict[str, np.ndarray]:
    optimizer = ca.AdamW(1e-3, bias_correction=True, weight_decay=0.1, lowering=choice, **options)
    parameters = arrays(dtype, 1.0, 0)
    for step in range(steps):
        gradients = arrays(dtype, 0.1, step + 1)
        if step == 2:
            gradients["large"][7] = float("nan")
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    # The value that a compensated weight stands for: a residual alone may be one step apart.
    joined = {
        name: residual.join(p, optimizer.state[name]["residual"]) if "residual" in optimizer.state[name] else p
        for name, p in parameters.items()
    }
    moments = {f"{name}.{m}": optimizer.state[name][m] for name in SIZES for m in "mv"}
    return {name: np.array(a.astype(mx.float32)) for name, a in {**joined, **moments}.items()}


@pytest.mark.parametrize("choice", ["auto", "inplace"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}])
def test_all_lowerings_compute_the_same(choice: str, dtype: mx.Dtype, compensated: bool, options: dict) -> None:
    found = trained(choice, dtype, compensated=compensated, **options)
    expected = trained("fused", dtype, compensated=compensated, **options)
    # A compiler may contract a product and a sum in one kernel that it cannot see together in two: a last bit of
    # float32 here and there, which can flip a rounding to a half-precision weight without a residual.
    rounding = {mx.bfloat16: 2.0**-7, mx.float16: 2.0**-10}.get(dtype, 1e-6) if not compensated else 1e-6
    for name, values in expected.items():
        tolerance = 1e-6 if "." in name else rounding
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=1e-9, err_msg=name)
        assert np.isnan(values).any() == (not options and name.split(".")[0] == "large")


def graph(
    choice: str, dtype: mx.Dtype, count: int, shapes: Sequence[tuple[int, ...]] = (), **options
) -> list[mx.array]:
    """The unevaluated result of one update of ``count`` large parameters that has been traced before."""
    shapes = shapes or [(kernels.LARGE,)]
    p = {f"p{i}": mx.ones(shapes[i % len(shapes)], dtype) for i in range(count)}
    g = dict(p)
    optimizer = ca.AdamW(1e-3, lowering=choice, **options)
    p = optimizer.apply_gradients(g, p)
    mx.eval(p, g, optimizer.state)
    p = optimizer.apply_gradients(g, p)
    return [*p.values(), *(array for _, array in tree_flatten(optimizer.state))]


@pytest.mark.parametrize(
    ("dtype", "compensated", "expected"),
    [(mx.float32, False, 3), (mx.bfloat16, False, 3), (mx.bfloat16, True, 6), (mx.float16, True, 5)],
)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}])
def test_in_place_each_array_has_one_kernel(dtype: mx.Dtype, compensated: bool, expected: int, options: dict) -> None:
    # m, v and the weight; with compensation the joined value, its update, and the two that it is split into.
    five, seven = (kernels_of(graph("inplace", dtype, n, compensated=compensated, **options)) for n in (5, 7))
    added = {name: (seven[name] - five[name]) / 2 for name in seven if seven[name] != five[name]}
    norm = set(kernels_of([mx.compile(global_norm)([mx.ones((kernels.LARGE,), dtype)])])) if options else set()
    assert sum(n for name, n in added.items() if name not in norm) == expected, added


@pytest.mark.parametrize("slow_sqrt", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_where_a_square_root_is_slow_auto_computes_it_by_herons_method(
    dtype: mx.Dtype, slow_sqrt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SLOW_SQRT", slow_sqrt)
    with mx.stream(mx.cpu):
        found = kernels_of(graph("auto", dtype, 6, [(SMALL + 1,)]))  # not joined
    roots = [n for name, n in found.items() if "Sqrt" in name]
    steps = [n for name, n in found.items() if "MinimumDivideAdd" in name]
    assert (roots, steps) == (([], [6]) if slow_sqrt else ([6], []))


@pytest.mark.parametrize(("choice", "slow_sqrt", "bytes_each"), [("inplace", 1, 0), ("auto", 0, 0), ("auto", 1, 2)])
def test_in_place_needs_no_memory_of_its_own(
    choice: str, slow_sqrt: int, bytes_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mx.default_device() != mx.Device(mx.cpu) and choice == "auto":
        pytest.skip("on a GPU auto is fused, which has three new arrays for each parameter")
    monkeypatch.setattr(kernels, "SLOW_SQRT", bool(slow_sqrt))
    shape, count = (512, 512), 20
    optimizer = ca.AdamW(1e-3, lowering=choice)
    parameters = {f"p{i}": mx.random.normal(shape, key=mx.random.key(i)) for i in range(count)}
    gradients = {name: p * 0.1 for name, p in parameters.items()}
    for _ in range(3):
        mx.eval(parameters, gradients, optimizer.state)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    size = count * shape[0] * shape[1]
    # A guess of each square root, and 2 % of the parameters and moments.
    assert mx.get_peak_memory() - before <= (bytes_each + 0.02 * 3 * 4) * size


@pytest.mark.usefixtures("on_cpu")
def test_on_the_cpu_large_leaves_are_shared_out_to_two_streams() -> None:
    sizes = [10, kernels.LARGE, 2 * kernels.LARGE, kernels.LARGE, kernels.LARGE - 1, kernels.LARGE]
    found = kernels.of_leaves("auto", sizes)
    default = mx.default_stream(mx.cpu)
    assert [how.inplace for how in found] == [False, True, True, True, False, True]
    assert [how.stream == default for how in found] == [True, True, False, True, True, True]
    assert all(how == kernels.Lowering(False, default) for how in kernels.of_leaves("fused", sizes))
    inplace = kernels.of_leaves("inplace", sizes)
    assert [how.stream for how in inplace] == [how.stream for how in found]
    assert all(how.inplace and not how.heron for how in inplace)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (mx.float32, {}),
        (mx.float32, {"max_grad_norm": 1.0, "skip_nonfinite": True}),
        (mx.bfloat16, {}),
        (mx.float32, {"moments": "bfloat16"}),
        (mx.float32, {"moments": "8bit"}),
        (mx.float32, {"moments": "8bit", "shapes": [(8, kernels.LARGE // 8)]}),
        (mx.float32, {"shapes": [(1, kernels.LARGE), (kernels.LARGE,)]}),
        (mx.float32, {"moments": "8bit", "shapes": [(1, kernels.LARGE), (kernels.LARGE,)]}),
    ],
)
def test_kernels_are_the_same_on_two_streams_as_on_one(
    dtype: mx.Dtype, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MLX merges equal constants of equal shapes across streams; kernels of the second then read them as strided
    # arrays, "CompiledMultiplyMultiplyAdd" without a Broadcast inside, and take twice as long.
    with mx.stream(mx.cpu):
        two = kernels_of(graph("auto", dtype, 6, **options))
        monkeypatch.setattr(kernels, "_second_stream", lambda: mx.default_stream(mx.cpu))
        one = kernels_of(graph("auto", dtype, 6, **options))
    assert two == one


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_random_roundings_are_the_same_in_all_lowerings(moments: str) -> None:
    found, expected = (trained(choice, mx.float32, moments=moments) for choice in ("auto", "fused"))
    for name, values in expected.items():
        # As above a last bit may differ, and with it one rounding in a hundred thousand or so.
        differ = np.nonzero(~np.isclose(found[name], values, rtol=1e-6, atol=1e-9, equal_nan=True))[0]
        assert len(differ) <= 1e-3 * len(values), name


def test_an_optimizer_goes_on_in_another_thread() -> None:
    # MLX's streams belong to threads: one that was kept for all would raise "There is no Stream in current thread".
    optimizer = ca.AdamW(1e-3)
    parameters, gradients = arrays(mx.float32, 1.0, 0), arrays(mx.float32, 0.1, 1)
    parameters = optimizer.apply_gradients(gradients, parameters)
    mx.eval(parameters, optimizer.state)
    result: list[dict[str, mx.array] | Exception] = []

    def work() -> None:
        try:
            updated = optimizer.apply_gradients(gradients, parameters)
            mx.eval(updated, optimizer.state)
            result.append(updated)
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(result[0], dict), result
    assert optimizer.step.item() == 2


@pytest.mark.usefixtures("on_cpu")
def test_a_transposed_gradient_is_put_in_order_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nn.Linear's are: each kernel of the update would read it element by element."""
    stream = mx.default_stream(mx.cpu)
    large, small = mx.random.normal((200, 300)).T, mx.random.normal((20, 30)).T
    mx.eval(large, small)
    assert memoryview(large).strides == (4, 1200)
    assert memoryview(kernels.row_major(large, stream)).strides == (800, 4)
    assert mx.array_equal(kernels.row_major(large, stream), large).item()
    assert kernels.row_major(small, stream) is small
    seen = []

    def spy(gradient: mx.array, stream: mx.Stream) -> mx.array:
        seen.append(gradient.shape)
        return kernels.row_major(gradient, stream)

    monkeypatch.setattr(apply_packed, "row_major", spy)
    for options in ({}, {"max_grad_norm": 1.0}):  # the norm is that of the step, or of the optimizer
        step = ca.make_step(nn.Linear(300, 200, bias=False), lambda model, x: model(x).sum(), ca.AdamW(1e-3, **options))
        step(mx.ones((2, 300)))
    assert seen == [(200, 300)] * 2


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True}])
@pytest.mark.parametrize(
    ("dtype", "shapes", "joined"),
    [
        (mx.bfloat16, [(i + 1, 16) for i in range(20)], True),
        (mx.bfloat16, [()] * 20, True),
        (mx.bfloat16, [(600 + i,) for i in range(20)], True),
        (mx.float32, [(i + 1, 2, 3) for i in range(20)], True),
        (mx.float32, [()] * 20, True),
        (mx.float32, [(512,)] * 20, True),
        (mx.float32, [(513,)] * 8, False),  # it takes more time to copy than to start a kernel
        (mx.float32, [(2, i + 1) for i in range(8)], False),  # no rows of one shape
    ],
)
def test_small_leaves_are_joined_in_a_called_update(
    dtype: mx.Dtype, shapes: list[tuple[int, ...]], joined: bool, options: dict
) -> None:
    def drawn(seed: int) -> dict[str, mx.array]:
        keys = mx.random.split(mx.random.key(seed), len(shapes))
        return {str(i): mx.random.normal(s, dtype, key=keys[i]) for i, s in enumerate(shapes)}

    found, used = [], []
    for choice in ("auto", "fused"):
        optimizer = ca.AdamW(1e-3, bias_correction=True, lowering=choice, **options)
        parameters = drawn(0)
        for step in range(3):
            parameters = optimizer.apply_gradients(drawn(step + 1), parameters)
            count = kernels_of([*parameters.values(), *(a for _, a in tree_flatten(optimizer.state))])
            mx.eval(parameters, optimizer.state)
        used.append(sum(count.values()))
        found.append(tree_flatten([parameters, optimizer.state]))
    # The kernels are the same and see more elements, so the results are the same to the last bit.
    for (path, one), (_, other) in zip(*found, strict=True):
        assert one.shape == other.shape and mx.array_equal(one, other), path
    assert used[0] < used[1] if joined else used[0] == used[1]  # although the copies into a flat array count


@pytest.mark.usefixtures("on_cpu")
def test_large_leaves_of_a_stream_are_updated_one_after_the_other() -> None:
    parameters = {str(i): mx.ones((kernels.LARGE,)) for i in range(4)} | {"small": mx.ones((3,))}
    new = ca.AdamW(1e-3).apply_gradients(parameters, parameters)
    # The next leaf of the stream waits for a weight. Two streams have two leaves each; the small leaf waits for none.
    assert reached([*new.values()], [*new.values()]) == [True, True, False, False, False]


@pytest.mark.usefixtures("on_cpu")
def test_no_stream_gets_far_ahead_of_the_other() -> None:
    sizes = [kernels.LARGE] * 6 + [3 * kernels.LARGE] + [kernels.LARGE] * 2
    parameters = [mx.zeros((size,)) for size in sizes]
    runner = kernels.Runner(None, lambda shared: shared, parameters)
    new, before = [], []
    for how, parameter in zip(kernels.of_leaves("inplace", sizes), parameters, strict=True):
        before.append([[each is weight for each in new].index(True) for weight in runner._before(how.second)])
        new.append(runner.run(how, lambda _, g, p, state: (p + g, state), parameter, parameter, {})[0])
    # Of the own stream the last leaf, of the other stream the last one that has ended before, if both go equally fast.
    assert before == [[], [], [0], [1], [2, 1], [3, 0], [4, 3], [5, 2], [7, 4]]
