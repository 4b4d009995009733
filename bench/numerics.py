"""What half precision does to the weights: how far they move in 2000 updates, against a float32 master copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.optimizers as optim
from compiled_adam.update import residual
from rich.table import Table

from . import tables
from .measure import Row, Stage

RATES = (1e-3, 1e-4, 1e-5, 1e-6)
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}
STEPS, SIZE = 2000, 4096
Make = Callable[[float, float], optim.Optimizer]  # of the learning rate and the weight decay


def _ours(options: dict[str, Any]) -> Make:
    return lambda rate, decay: ca.AdamW(rate, weight_decay=decay, bias_correction=True, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "compiled_adam": {},
    "compensated=False": {"compensated": False},
    'moments="bfloat16"': {"moments": "bfloat16"},
    'moments="8bit"': {"moments": "8bit"},
    'moments="param"': {"moments": "param"},
}
CONTENDERS: dict[str, Make] = {
    "mlx": lambda rate, decay: optim.AdamW(rate, weight_decay=decay, bias_correction=True),
    **{name: _ours(options) for name, options in OPTIONS.items()},
}


def trajectory(make: Make, rate: float, weights: mx.array, dtype: mx.Dtype, decay: float = 0.0) -> mx.array:
    """The float32 value of ``weights`` (with its residual) after `STEPS` updates with the same random gradients.

    Gradients are normal with mean 0.02 and standard deviation 0.1, rounded to ``dtype``; with ``decay`` they are 0.
    They come in the dtype of the weights: MLX rounds the learning rate to the dtype of the gradient.
    """
    optimizer = make(rate, decay)
    p = {"w": weights}
    optimizer.init(p)
    key = mx.random.key(5)
    for _ in range(STEPS):
        key, subkey = mx.random.split(key)
        g = mx.random.normal(weights.shape, key=subkey) * 0.1 + 0.02 if decay == 0 else mx.zeros(weights.shape)
        p = optimizer.apply_gradients({"w": g.astype(dtype).astype(weights.dtype)}, p)
        mx.async_eval(p, optimizer.state)
    state = optimizer.state["w"]
    return residual.join(p["w"], state["residual"]) if "residual" in state else p["w"].astype(mx.float32)


MASTER = "float32 weights"
# Other optimizers of MLX, compared with themselves on float32 weights. Without decay: those that have none.
OTHERS: dict[str, Make] = {
    "Muon": lambda rate, decay: optim.Muon(rate, weight_decay=decay),
    "SGD, momentum 0.9": lambda rate, decay: optim.SGD(rate, momentum=0.9, weight_decay=decay),
    "Lion": lambda rate, decay: optim.Lion(rate, weight_decay=decay),
    "Adafactor": lambda rate, decay: optim.Adafactor(rate, relative_step=False, weight_decay=decay),
    "RMSprop": lambda rate, decay: optim.RMSprop(rate),
}
WITHOUT_DECAY = ("RMSprop",)


def stages(rates: Sequence[float] = RATES) -> list[Stage]:
    """A stage for each dtype and learning rate, with `CONTENDERS`, and one with `OTHERS`."""
    return [
        Stage(f"{dtype}, {what}learning rate {rate:g}", partial(rows, dtype, rate))
        for what, rows in (("", _rows), ("other optimizers, ", _other_rows))
        for dtype in DTYPES
        for rate in rates
    ]


def _rows(name: str, rate: float) -> list[Row]:
    """For each contender: the mean movement relative to the master's, the worst weight's relative error (of those
    above 1e-3), and what weight decay 0.1 alone took off, relative to ``1 - (1 - 0.1 rate)^STEPS``.
    None is what is not a number."""
    dtype = DTYPES[name]
    start, exact = _weights(dtype)
    master = trajectory(CONTENDERS["compiled_adam"], rate, exact, dtype)
    rows = []
    for contender, make in {MASTER: CONTENDERS["compiled_adam"], **CONTENDERS}.items():
        weights = exact if contender == MASTER else start
        ours = trajectory(make, rate, weights, dtype)
        decayed = trajectory(make, rate, weights, dtype, decay=0.1)
        error = mx.where(mx.abs(master) > 1e-3, mx.abs(ours - master) / mx.abs(master), 0.0).max()
        movement = mx.abs(ours - exact).mean() / mx.abs(master - exact).mean()
        taken = mx.abs(exact - decayed).mean() / mx.abs(exact).mean()
        rows.append(
            {
                "dtype": name,
                "learning_rate": rate,
                "contender": contender,
                "movement": _number(movement),
                "worst_error": _number(error),
                "decay": _number(taken / (1 - (1 - 0.1 * rate) ** STEPS)),
            }
        )
    return rows


def _other_rows(name: str, rate: float) -> list[Row]:
    """For each of `OTHERS`, alone and in `Compensated`: movement, worst error and decay relative to float32 weights."""
    dtype = DTYPES[name]
    start, exact = _weights(dtype)
    rows = []
    for optimizer, make in OTHERS.items():
        master = trajectory(make, rate, exact, dtype)
        decays = optimizer not in WITHOUT_DECAY
        right = trajectory(make, rate, exact, dtype, decay=0.1) if decays else exact
        for contender, made in (("mlx", make), ("compiled_adam", _compensated(make))):
            found = trajectory(made, rate, start, dtype)
            error = mx.where(mx.abs(master) > 1e-3, mx.abs(found - master) / mx.abs(master), 0.0).max()
            row: Row = {"dtype": name, "learning_rate": rate, "optimizer": optimizer, "contender": contender}
            row |= {"movement": _moved(found, master, exact), "worst_error": _number(error)}
            if decays:
                row["decay"] = _moved(trajectory(made, rate, start, dtype, decay=0.1), right, exact)
            rows.append(row)
    return rows


def _compensated(make: Make) -> Make:
    return lambda rate, decay: ca.Compensated(make(rate, decay))


def _weights(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The first weights, and the same in float32: a matrix, because Muon treats vectors like SGD."""
    start = mx.random.normal((SIZE // 64, 64), key=mx.random.key(0)).astype(dtype)
    return start, start.astype(mx.float32)


def _moved(weights: mx.array, master: mx.array, start: mx.array) -> float | None:
    return _number(mx.abs(weights - start).mean() / mx.abs(master - start).mean())


def _number(x: mx.array) -> float | None:
    return float(x) if math.isfinite(float(x)) else None


def _named(row: Row) -> str:
    return f"{row['optimizer']}: {row['contender']}" if "optimizer" in row else row["contender"]


def percent(part: float | None) -> str:
    return "nan" if part is None else f"{100 * part:.2f} %"


def table(rows: list[Row], environment: Row) -> Table:
    made = tables.table(
        f"{STEPS} updates of {SIZE} half-precision weights, MLX {environment['mlx']}",
        "movement and decay: of float32's and of the exact; worst: relative error of a weight",
        (),
        ("dtype", "learning rate", "contender", "movement", "decay", "worst"),
    )
    for row in rows:
        cells = [percent(row["movement"]), percent(row["decay"]) if "decay" in row else "-"]
        worst = "nan" if row["worst_error"] is None else f"{row['worst_error']:.1e}"
        made.add_row(row["dtype"], f"{row['learning_rate']:g}", _named(row), *cells, worst)
    return made
