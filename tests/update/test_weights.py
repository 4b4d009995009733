"""A batch of weight 0 counts for nothing, with any optimizer, with and without a guard, in one step and in windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.base.mlx_graph import kernels
from compiled_adam.update.groups import ALL_ALIKE
from compiled_adam.update.leaves import Constants, Form, update
from nets import linear_net, masked_error, ragged_batch, values

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: ca.AdamW(1e-2),
    "clip": lambda: ca.AdamW(1e-2, max_grad_norm=0.1),
    "guard": lambda: ca.AdamW(1e-2, skip_nonfinite=True, bias_correction=True),
    "8bit": lambda: ca.Adam(1e-2, moments="8bit"),
    "sgd": lambda: optim.SGD(1e-2, momentum=0.9),
    "stock": lambda: optim.AdamW(1e-2),
    "multi": lambda: optim.MultiOptimizer([ca.Adam(1e-2), optim.Lion(1e-3)], [lambda path, p: p.ndim > 1]),
}


class Wide(nn.Module):
    """A leaf that is packed with another one, and one that is too large for that."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(0)
        self.small, self.other, self.large = mx.ones((4,)), mx.ones((4,)), mx.random.normal((40000, 4))

    def __call__(self, x: mx.array) -> mx.array:
        return (x * self.small + self.other) @ self.large[:3].T


def zero_gradient(model: Wide, x: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    return 0.0 * model(x).sum(), mx.array(1.0)


def mean_over_tokens(model: Wide, x: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    return mx.square(model(x)).sum() * tokens / tokens, tokens


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_batch_without_tokens_has_the_gradient_zero(name: str) -> None:
    x, none, some = mx.ones((2, 4)), mx.array(0.0), mx.array(3.0)
    found, expected = Wide(), Wide()
    step = ca.make_step(found, mean_over_tokens, OPTIMIZERS[name](), weighted=True)
    twin = ca.make_step(expected, mean_over_tokens, OPTIMIZERS[name](), weighted=True)
    step(x, some)
    twin(x, some)
    result = step(x, none)
    assert np.isnan(result.loss.item())
    assert result.grad_norm.item() == 0.0
    assert result.skipped.item() == 0
    # The same update of the same state with a gradient that is zero without any selection.
    step_of_zero = ca.make_step(expected, zero_gradient, twin.optimizer, weighted=True)
    step_of_zero(x, none)
    for path, array in values(expected).items():
        # Where a moment is rounded at random, both draw the same numbers. Heron's root of 0 is 2e-20.
        np.testing.assert_allclose(values(found)[path], array, rtol=1e-6, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "guard", "sgd"])
def test_one_step_and_a_window_treat_it_alike(name: str) -> None:
    found, expected = linear_net(), linear_net()
    step = ca.make_step(found, masked_error, OPTIMIZERS[name](), weighted=True)
    window = ca.make_step(expected, masked_error, OPTIMIZERS[name](), weighted=True, accumulate=2)
    for i in range(4):
        x, y, mask = ragged_batch(i)
        mask = mask & (i % 2 == 0)
        step(x, y, mask)
        window(x, y, mask)
        window(x, y, mask)
    for path, array in values(expected).items():
        # The window adds two equal gradients and halves the sum, in another kernel: float32 rounding.
        np.testing.assert_allclose(values(found)[path], array, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("lowering", ["fused", "inplace"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_weight_takes_no_kernel_per_leaf(lowering: str, dtype: mx.Dtype, clip: float | None) -> None:
    def count(leaves: int, weight: mx.array | None) -> int:
        form = Form("float32", False, dtype == mx.bfloat16)

        def make(step: mx.array, rate: mx.array, weight: mx.array | None, gradients: list, parameters: list) -> Any:
            scalars = {"step": step, "learning_rate": rate, "grad_norm": mx.array(0.0), "skipped": mx.array(0)}
            constants = Constants((0.9, 0.999), 1e-8, True, 0.1, clip, True, lowering)
            states = [form.zeros(p) for p in parameters]
            groups, forms = [ALL_ALIKE] * leaves, [form] * leaves
            return update(gradients, parameters, states, scalars, groups, forms, constants, None, weight)

        arrays = [mx.ones((40000,), dtype) for _ in range(leaves)]
        made = mx.compile(make)(mx.array(1), mx.array(1e-3), weight, arrays, [a + 0 for a in arrays])
        return sum(kernels([*made[0], *(a for state in made[1] for a in state.values()), *made[2].values()]).values())

    with_weight, without = (count(3, weight) - count(2, weight) for weight in (mx.array(1.0), None))
    # Compensated and clipped, the update fills the levels that MLX fuses: there it is one kernel that selects.
    assert with_weight <= without + (clip is not None and dtype == mx.bfloat16)
