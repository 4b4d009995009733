from __future__ import annotations

import math

import compiled_adam as ca
import mlx.core as mx
import numpy as np
import pytest
from compiled_adam.update import global_norm, rule
from compiled_adam.update.kernels import _heron, _root_guess
from mlx.utils import tree_flatten

from bench.measure import kernels


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10_000_000])
def test_bias_correction_is_exact_to_float32(beta: float, step: int) -> None:
    c = rule.coefficients(mx.array(step, mx.uint64), mx.array(1.0), (0.0, beta), 1.0, True)
    # Three roundings at 2^-24, and the exponent's own, which expm1 does not amplify for an exponent below 1.
    expected = math.sqrt(-math.expm1(step * math.log(beta))) if beta else 1.0
    assert c.eps.item() == pytest.approx(expected, rel=4e-7)
    assert c.step_size.item() == pytest.approx(expected, rel=4e-7)


def graph(count: int, dtype: mx.Dtype, **options) -> list[mx.array]:
    """The unevaluated result of one update of ``count`` parameters that has been traced before."""
    p = {f"p{i}": mx.ones((64, 64), dtype) for i in range(count)}
    g = dict(p)
    optimizer = ca.AdamW(ca.schedulers.constant(1e-3), **options)
    p = optimizer.apply_gradients(g, p)
    mx.eval(p, g, optimizer.state)
    p = optimizer.apply_gradients(g, p)
    return [*p.values(), *(array for _, array in tree_flatten(optimizer.state))]


def per_leaf(dtype: mx.Dtype, **options) -> dict[str, float]:
    """How many kernels of each kind one more parameter adds."""
    five, seven = (kernels(graph(count, dtype, **options)) for count in (5, 7))
    return {name: (seven[name] - five[name]) / 2 for name in seven if seven[name] != five[name]}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_the_kernels_of_a_fused_leaf(
    dtype: mx.Dtype,
    compensated: bool,
    bias_correction: bool,
    weight_decay: float,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
) -> None:
    found = per_leaf(
        dtype,
        compensated=compensated,
        bias_correction=bias_correction,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        skip_nonfinite=skip_nonfinite,
        lowering="fused",
    )
    norm = {"CompiledAbsSquare" if dtype == mx.float32 else "CompiledAbsAsTypeSquare", "Sum"}
    update = {name: n for name, n in found.items() if name not in norm}
    # With compensation the value, then the weight and the residual: bfloat16's are bits, which no kernel has both of.
    expected = {mx.bfloat16: 3, mx.float16: 2}.get(dtype, 1) if compensated else 1
    assert list(update.values()) == [1.0] * expected, found
    assert all(name.startswith("Compiled") or name == "AsType" for name in update), found
    needs_norm = max_grad_norm is not None or skip_nonfinite
    assert {name: n for name, n in found.items() if name in norm} == (dict.fromkeys(norm, 1.0) if needs_norm else {})


@pytest.mark.parametrize(("dtype", "count"), [(mx.float32, 1), (mx.bfloat16, 3)])
def test_groups_add_no_kernel_to_a_leaf(dtype: mx.Dtype, count: int) -> None:
    own = {"learning_rate": 0.5, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    groups = {"p[25]": own, "p[36]": {"betas": (0.7, 0.9), "weight_decay": 0.0}}  # five have all groups already
    options = {"bias_correction": True, "max_grad_norm": 1.0, "skip_nonfinite": True, "lowering": "fused"}
    found = per_leaf(dtype, groups=groups, **options)
    norm = ("CompiledAbs", "Sum")
    assert sum(n for name, n in found.items() if not name.startswith(norm)) == count, found
    assert all(name.startswith(("Compiled", "AsType", *norm)) for name in found), found


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_scalar_chain_stays_out_of_the_kernel_of_a_single_parameter(dtype: mx.Dtype) -> None:
    # MLX would fuse it with its only consumer: two expm1 for every element.
    found = kernels(
        graph(
            1, dtype, bias_correction=True, max_grad_norm=1.0, skip_nonfinite=True, weight_decay=0.1, compensated=False
        )
    )
    (elementwise,) = [name for name in found if "SqrtBroadcast" in name]
    for scalar in ("Expm1", "Maximum", "LogicalNot"):  # bias correction, clip factor, guard
        assert scalar not in elementwise
        assert any(scalar in name for name in found)


@pytest.mark.parametrize("size", [16_384, 16_385, 300_000, 10_000_000])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_norm_of_many_is_exact(size: int, compiled: bool) -> None:
    x = mx.random.normal((size,), key=mx.random.key(1))
    norm = (mx.compile(global_norm) if compiled else global_norm)([x.reshape(1, -1)])
    # Added up one after the other, ten million squares lose 1.5 %; here each sum has at most a thousand terms.
    assert norm.item() == pytest.approx(np.linalg.norm(np.array(x, np.float64)), rel=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_the_norm_on_a_cpu_writes_an_eighth_of_the_squares(dtype: mx.Dtype) -> None:
    with mx.stream(mx.cpu):
        x = mx.ones((1 << 21,), dtype)
        norm = mx.compile(global_norm)
        mx.eval(x, norm([x]))
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        found = kernels([norm([x])])
        mx.eval(norm([x]))
    # One kernel squares, so a bfloat16 gradient is not cast in another; three reductions: columns, their sum, leaves.
    assert [n for name, n in found.items() if "Square" in name] == [1] and found["Sum"] <= 3
    assert mx.get_peak_memory() - before <= x.size * 4 * 1.1 / 8


@pytest.mark.parametrize("size", [8 * 1024 - 1, 8 * 1024, 8 * 1024 + 1, 20 * 1024 + 5])
@pytest.mark.parametrize("place", [0, -1, 8 * 1024 - 2])
def test_the_norm_counts_every_element(size: int, place: int) -> None:
    x = mx.zeros((size,))
    x[place] = 3.0
    assert global_norm([x]).item() == 3.0
    x[place] = math.inf
    assert global_norm([x]).item() == math.inf
    x[place] = 1e20  # its square is beyond float32, as documented
    assert global_norm([x]).item() == math.inf
    x[place] = math.nan
    assert math.isnan(global_norm([x]).item())


def test_global_norm_does_not_overflow_in_float16() -> None:
    assert global_norm([mx.full((4,), 300.0, mx.float16)]).item() == 600.0
    assert global_norm([]).item() == 0.0


@pytest.mark.parametrize(("low", "high", "most"), [(-37.9, 38.5, 4.0), (-20.0, 2.0, 4.0)])
def test_herons_root_is_right_to_two_units_in_the_last_place(low: float, high: float, most: float) -> None:
    v = (10.0 ** np.random.default_rng(0).uniform(low, high, 1_000_000)).astype(np.float32)
    found = np.array(mx.compile(lambda v: _heron(v, _root_guess(v)))(mx.array(v))).astype(np.float64)
    # 1.1 of its own and half a unit (1 * 2^-24) each for two products, a sum and a quotient, which rarely add up: 3.0.
    assert np.abs(found / np.sqrt(v.astype(np.float64)) - 1).max() <= most * 2.0**-24


def test_herons_root_of_what_is_not_an_ordinary_number() -> None:
    v = mx.array([0.0, 1e-45, 1e-40, math.inf, math.nan])
    zero, least, denormal, infinite, undefined = _heron(v, _root_guess(v)).tolist()
    # Far below any eps that does something; from an overflown second moment no step, as with the square root.
    assert 0 <= zero <= 2e-20 and abs(least - 3.7e-23) <= 2e-20 and abs(denormal - 1e-20) <= 2e-20
    assert infinite == math.inf and math.isnan(undefined)
