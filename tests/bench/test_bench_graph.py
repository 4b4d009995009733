"""Kernels and bytes of graphs made by hand, and of the contenders' updates."""

from __future__ import annotations

import gc
from collections.abc import Callable

import mlx.core as mx
import pytest

from bench import graph, measure, workloads
from bench.contenders import CONTENDERS, DEFAULT

SIZE = 64 * 128


@pytest.fixture
def x() -> mx.array:
    x = mx.ones((64, 128))
    mx.eval(x)
    return x


def moved(inputs: list[mx.array], build: Callable[[], list[mx.array]]) -> list[tuple[int, int]]:
    """Bytes read and written per element of ``x`` by each kernel; no array may be guessed."""
    kernels = graph.traffic(inputs, build)
    assert not any(kernel.estimated for kernel in kernels)
    return sorted((round(kernel.read / SIZE), round(kernel.written / SIZE)) for kernel in kernels)


def test_kernels_of_graphs_made_by_hand(x: mx.array) -> None:
    assert measure.kernels([mx.exp(x) + mx.exp(x)]) == {"Exp": 2, "Add": 1}
    assert measure.kernels([x.reshape(-1)]) == {}
    assert measure.kernels([x[3:7], *mx.split(x, 2)]) == {}
    fused = mx.compile(lambda x: mx.exp(x) * mx.sin(x))(x)
    assert list(measure.kernels([fused]).values()) == [1]


def test_bytes_of_single_kernels(x: mx.array) -> None:
    assert moved([x], lambda: [mx.exp(x)]) == [(4, 4)]
    assert moved([x], lambda: [x * x]) == [(4, 4)]  # read once
    assert moved([x], lambda: [x.astype(mx.bfloat16)]) == [(4, 2)]
    assert moved([x], lambda: [x + mx.exp(x)]) == [(4, 4), (8, 4)]
    assert moved([x], lambda: [x + 1]) == [(4, 4)]  # a broadcast number is 4 bytes
    assert graph.traffic([x], lambda: [x + 1])[0].read == 4 * SIZE + 4
    assert moved([x], lambda: [x.reshape(-1).view(mx.uint32)]) == []


def test_bytes_of_reductions_parts_and_products(x: mx.array) -> None:
    (row_maxima,) = graph.traffic([x], lambda: [x.max(axis=1)])
    assert (row_maxima.read, row_maxima.written) == (4 * SIZE, 4 * 64)
    (half,) = graph.traffic([x], lambda: [mx.exp(x[:32])])
    assert (half.read, half.written) == (2 * SIZE, 2 * SIZE)
    (product,) = graph.traffic([x], lambda: [x @ mx.ones((128, 1))])[-1:]
    assert (product.read, product.written) == (4 * (SIZE + 128), 4 * 64)


def test_bytes_of_fused_kernels(x: mx.array) -> None:
    one = mx.compile(lambda x: mx.exp(x) * mx.sin(x) + 2)
    assert moved([x], lambda: [one(x)]) == [(4, 4)]


def test_bytes_of_a_fused_kernel_with_several_outputs(x: mx.array) -> None:
    @mx.compile
    def momentum(p: mx.array, m: mx.array, g: mx.array) -> list[mx.array]:
        m = 0.9 * m + 0.1 * g
        return [m, (p - 0.1 * m).astype(mx.bfloat16)]

    m, g = x + 1, x.astype(mx.bfloat16)
    mx.eval(m, g)
    assert moved([x, m, g], lambda: momentum(x, m, g)) == [(10, 6)]


def test_bytes_of_broadcasts_and_of_arrays_with_several_readers(x: mx.array) -> None:
    row, half = mx.ones((128,)), x.astype(mx.bfloat16)
    mx.eval(row, half)
    both = mx.compile(lambda x, row: [a := mx.sin(x) * row, (a * 2).astype(mx.bfloat16)])
    (kernel,) = graph.traffic([x, row], lambda: both(x, row))
    assert (kernel.read, kernel.written) == (4 * (SIZE + 128 + 1), 6 * SIZE)
    assert moved([x, half], lambda: [mx.sin(x) + half, mx.cos(x)]) == [(2, 4), (4, 4), (4, 4), (8, 4)]
    assert moved([x, half], lambda: [mx.sin(a) for a in mx.depends([x, half], [row])]) == [(2, 2), (4, 4)]


def test_an_array_between_fused_kernels_is_found_behind_what_separates_them(x: mx.array) -> None:
    # The first kernel writes bfloat16, which shows in no input and no output.
    two = mx.compile(lambda x: mx.sin(mx.contiguous((x * x + 1).astype(mx.bfloat16))) * 2)
    assert moved([x], lambda: [two(x)]) == [(2, 2), (4, 2)]
    rows = mx.compile(lambda x: (mx.exp(x) + 1).max(axis=1) * 2 + 1)
    kernels = graph.traffic([x], lambda: [rows(x)])
    assert [(k.read, k.written) for k in kernels] == [
        (4 * SIZE + 4, 4 * SIZE),
        (4 * SIZE, 4 * 64),
        (4 * 64 + 8, 4 * 64),
    ]


def test_an_array_between_fused_kernels_alone_is_taken_for_float32_and_marked(x: mx.array) -> None:
    def chain(x: mx.array) -> mx.array:
        for _ in range(15):  # MLX fuses eleven levels at most
            x = mx.sin(x)
        return x

    compiled = mx.compile(chain)
    kernels = graph.traffic([x], lambda: [compiled(x)])
    assert [(k.read, k.written, k.estimated) for k in kernels] == [(4 * SIZE, 4 * SIZE, True)] * 2


def test_what_computes_the_inputs_does_not_count(x: mx.array) -> None:
    y = mx.exp(x)
    assert moved([y], lambda: [mx.sin(y)]) == [(4, 4)]


def test_more_arrays_than_mlx_takes_names() -> None:
    arrays = [mx.ones((4,)) for _ in range(1500)]
    kernels = graph.traffic(arrays, lambda: [mx.exp(a) for a in arrays])
    assert {(k.read, k.written) for k in kernels} == {(16, 16)} and len(kernels) == 1500


@pytest.mark.parametrize(
    "name, dtype, kernels, bytes_per_parameter",
    [
        # g, p, m, v read; p, m, v written, all float32
        ("mlx compiled", mx.float32, 1, 28),
        ("compiled_adam", mx.float32, 1, 28),
        ("mlx compiled", mx.bfloat16, 1, 14),
        # moments in float32
        ("compiled_adam uncompensated", mx.bfloat16, 1, 22),
        # and a residual: g, p, r, m, v read, m, v and the float32 weight written; that read twice, p and r written
        ("compiled_adam", mx.bfloat16, 3, 38),
    ],
)
def test_bytes_of_updates(name: str, dtype: mx.Dtype, kernels: int, bytes_per_parameter: int) -> None:
    def tree() -> dict[str, mx.array]:
        return {leaf: mx.zeros((64, 128), dtype) for leaf in "abc"}

    found = measure.graph_of(CONTENDERS[name].make, tree(), tree())
    large = [row for row in found["by_kernel"] if row["read"] > 1000]
    assert sum(row["count"] for row in large) == 3 * kernels
    assert found["kernel_bytes"] / (3 * SIZE) == pytest.approx(bytes_per_parameter, abs=0.05)
    assert found["estimated_kernels"] == 0
    assert sum(row["read"] + row["written"] for row in found["by_kernel"]) == found["kernel_bytes"]


def test_looking_at_a_graph_allocates_nothing_and_leaves_mlx_as_it_was() -> None:
    big = workloads.hollow({"a": mx.broadcast_to(mx.zeros(()), (1 << 15, 1 << 15))})  # 4 GB, were it real
    mx.synchronize()
    gc.collect()
    mx.reset_peak_memory()
    before = mx.get_active_memory()  # what other tests have left
    contiguous = mx.contiguous
    for name in DEFAULT:
        assert measure.graph_of(CONTENDERS[name].make, big, big)["kernel_bytes"] >= 28 << 30
    assert mx.get_peak_memory() - before < 1 << 20
    assert mx.contiguous is contiguous
    assert list(measure.kernels([mx.compile(lambda x: mx.exp(x) * mx.sin(x))(mx.ones((4,)))]).values()).count(1)
