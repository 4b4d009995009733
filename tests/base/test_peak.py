"""Graphs whose peak memory can be counted by hand, or is measured by MLX."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from compiled_adam.base.mlx_graph import kernels
from compiled_adam.base.peak import AHEAD, VIEWS, fused, peak, traced

SIDE = 64
ONE = SIDE * SIDE * 4  # bytes of a matrix


def in_matrices(function: Callable[[mx.array], list[mx.array]]) -> float:
    return peak(traced(function, mx.zeros((SIDE, SIDE)))) / ONE


def chain(x: mx.array, products: int, keep: bool = False) -> list[mx.array]:
    made = [x]
    for _ in range(products):
        made.append(made[-1] @ made[-1])
    return made[1:] if keep else made[-1:]


def test_memory_of_graphs_counted_by_hand() -> None:
    assert in_matrices(lambda x: [x]) == 0  # an input
    assert in_matrices(lambda x: [x.reshape(-1)]) == 0  # a view of one
    assert in_matrices(lambda x: [x.T.reshape(-1)]) == 1  # a copy, because the rows are no longer in order
    assert in_matrices(lambda x: [mx.exp(mx.sin(x) + mx.cos(x)) * x]) == 1  # one kernel
    assert in_matrices(lambda x: [mx.exp(x @ x)]) == 1  # in place
    assert in_matrices(lambda x: [mx.exp(y := x @ x), y]) == 2
    assert in_matrices(lambda x: chain(x, 3, keep=True)) == 3


def test_inputs_that_only_the_graph_has() -> None:
    def owned(function: Callable[[mx.array], list[mx.array]], strided: bool = False) -> float:
        graph = traced(function, mx.zeros((SIDE, SIDE)))
        return peak(graph, dict.fromkeys(graph.inputs, strided)) / ONE

    assert owned(lambda x: [mx.exp(x)]) == 1  # in place
    assert owned(lambda x: [mx.exp(x.reshape(-1))]) == 1  # a view does not read
    assert owned(lambda x: [x @ x]) == 2
    assert owned(lambda x: [mx.exp(y := mx.sin(x)), y]) == 3  # a kernel of two outputs takes no memory of an input
    assert owned(lambda x: [mx.contiguous(x)]) == 1
    assert owned(lambda x: [mx.contiguous(x)], strided=True) == 2
    assert owned(lambda x: [mx.contiguous(x, allow_col_major=True)], strided=True) == 1
    assert mx.contiguous.__module__ == "mlx.core"  # and not what stood for it in the traces


@pytest.mark.usefixtures("on_cpu")
def test_allocation_is_ahead_of_computation() -> None:
    """A chain of products needs two at once. But MLX's first thread allocates them before the second one is done."""
    assert in_matrices(lambda x: chain(x, 8)) == 8
    assert in_matrices(lambda x: chain(x, 1000)) == AHEAD / 2 + 2


def test_the_kernels_are_those_of_mlx() -> None:
    def function(x: mx.array) -> list[mx.array]:
        def loss(x: mx.array) -> mx.array:
            y = x * mx.sigmoid(x @ x) + mx.softmax(x, axis=-1)
            return mx.square(y * mx.rsqrt(mx.square(y).mean(axis=-1, keepdims=True) + 1e-5)).sum()

        return list(mx.value_and_grad(loss)(x))

    x = mx.zeros((SIDE, SIDE))
    ours = [each for each in fused(traced(function, x)).operations if each.name not in VIEWS]
    assert len(ours) == pytest.approx(kernels(mx.compile(function)(x)).total(), abs=1)


@pytest.mark.usefixtures("on_cpu")
def test_the_peak_is_the_measured_one() -> None:
    """Longer than what is ahead, with all that a layer has: it is within the jitter of two threads."""

    def function(x: mx.array) -> list[mx.array]:
        def loss(x: mx.array) -> mx.array:
            for _ in range(12):
                x = x + mx.softmax((x @ x.T) * 0.1, axis=-1) @ mx.sin(x @ x)
            return x.sum()

        return list(mx.value_and_grad(loss)(x))

    x = mx.random.normal((256, 256)) / 16
    compiled = mx.compile(function)
    found = []
    for _ in range(4):
        mx.eval(x)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(compiled(x))
        found.append(mx.get_peak_memory() - before)
    assert peak(traced(function, x)) == pytest.approx(max(found[1:]), rel=0.15)
