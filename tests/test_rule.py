from __future__ import annotations

import math

import mlx.core as mx
import pytest

import compiled_adam as ca
from bench.measure import kernels
from compiled_adam import rule


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10_000_000])
def test_bias_correction_is_exact_to_float32(beta: float, step: int) -> None:
    c = rule.coefficients(mx.array(step, mx.uint64), mx.array(1.0), (0.0, beta), 1.0, 0.0, True)
    # Three roundings at 2^-24, and the exponent's own, which expm1 does not amplify for an exponent below 1.
    expected = math.sqrt(-math.expm1(step * math.log(beta))) if beta else 1.0
    assert c.eps.item() == pytest.approx(expected, rel=4e-7)
    assert c.step_size.item() == pytest.approx(expected, rel=4e-7)


def graph(count: int, shape: tuple[int, ...], dtype: mx.Dtype) -> list[mx.array]:
    """The unevaluated result of one update of ``count`` parameters that has been traced before."""
    p = {f"p{i}": mx.ones(shape, dtype) for i in range(count)}
    g = {f"p{i}": mx.ones(shape, dtype) for i in range(count)}
    optimizer = ca.AdamW(ca.schedulers.constant(1e-3), bias_correction=True)
    p = optimizer.apply_gradients(g, p)
    mx.eval(p, g, optimizer.state)
    p = optimizer.apply_gradients(g, p)
    moments = [optimizer.state[path][moment] for path in p for moment in "mv"]
    return [*p.values(), *moments, optimizer.step]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("count", "shape"), [(1, (1000,)), (1, (64, 64)), (5, (64, 64))])
def test_the_update_of_a_leaf_is_one_kernel_without_the_scalar_chain(
    count: int, shape: tuple[int, ...], dtype: mx.Dtype
) -> None:
    found = kernels(graph(count, shape, dtype))
    elementwise = {name: n for name, n in found.items() if "SquareBroadcast" in name}
    assert list(elementwise.values()) == [count], found
    # With one parameter MLX would fuse its only consumer with what is scalar: two expm1 for every element.
    assert "Expm1" not in next(iter(elementwise))
    assert sum(found.values()) - count <= 8, found  # the scalar chain, whatever the number of parameters


def test_global_norm_does_not_overflow_in_float16() -> None:
    assert rule.global_norm([mx.full((4,), 300.0, mx.float16)]).item() == 600.0
    assert rule.global_norm([]).item() == 0.0
