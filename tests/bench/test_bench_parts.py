"""The record of each part of `python -m bench`, measured small: who reads a record may rely on its fields.

If a field goes or changes its meaning, SCHEMA goes up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from bench import memory, numerics, quality, step
from bench.contenders import CONTENDERS, DEFAULT, selected
from bench.measure import Row, Stage, kernels
from bench.workloads import arrays

ENVIRONMENT = {"mlx": "0", "device": "Device(cpu, 0)", "cores": 2, "blas": "?"}
MEMORY = {
    "workload": str, "dtype": str, "contender": str, "tensors": int, "parameters": int, "peak_extra_bytes": int,
    "state_bytes": int, "state_bytes_per_parameter": float, "weight_bytes": int,
}  # fmt: skip
STEP = {
    "contender": str,
    "tokens_per_second": float, "ratio": float, "ratio_low": float, "ratio_high": float, "ratio_noisy": bool,
    "rounds": int, "first_step_ms": float, "new_shape_ms": float, "traces": int, "peak_bytes": int, "loss": float,
}  # fmt: skip
NUMERICS = {
    "dtype": str, "learning_rate": float, "contender": str, "movement": float, "worst_error": float, "decay": float,
}  # fmt: skip
QUALITY = {
    "policy": str, "dtype": str, "seed": int, "steps": int, "parameters": int, "state_bytes_per_parameter": float,
    "losses": list, "eval_loss": float,
}  # fmt: skip


def kinds(row: dict[str, Any]) -> dict[str, type]:
    """The types of the fields as JSON keeps them."""
    return {name: type(value) for name, value in json.loads(json.dumps(row)).items()}


def rows_of(stages: list[Stage]) -> list[Row]:
    return [row for stage in stages for row in stage.rows()]


def test_memory() -> None:
    rows = rows_of(memory.stages({"small": lambda: {"a": (8, 8)}}, ["bfloat16"], list(DEFAULT)))
    assert [kinds(row) for row in rows] == [MEMORY] * len(DEFAULT)
    assert [row["weight_bytes"] for row in rows] == [128] * len(DEFAULT)


def test_step(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LENGTHS": (17, 33, 49), "WARM_UP": 2, "WINDOW": 2}.items():
        monkeypatch.setattr(step, name, value)
    stages = step.stages(tiny_model, rounds=2, windows=1)
    runs = rows_of(stages[:4])
    assert step.summary(runs[:3]) == []
    rows = step.summary([*runs, *runs[:2]])  # the second round has not ended
    assert [kinds(row) for row in rows] == [STEP] * len(step.CONTENDERS) and rows[0]["rounds"] == 1
    # One trace for each shape, and for the first one another before there is a state, which ours does not need.
    assert [row["traces"] for row in rows] == [4, 4, 3, 3]
    figures = {row["contender"]: row for row in rows}
    stock, off = figures[step.REFERENCE], figures["compiled_adam, extras off"]
    assert off["loss"] == pytest.approx(stock["loss"], rel=1e-4)
    assert off["ratio"] == pytest.approx(off["tokens_per_second"] / stock["tokens_per_second"])
    assert step.table(rows, ENVIRONMENT).row_count == 4


def test_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "STEPS", 20)
    monkeypatch.setattr(numerics, "DTYPES", {"bfloat16": mx.bfloat16})
    rows = rows_of(numerics.stages([1e-3]))
    assert [kinds(row) for row in rows] == [NUMERICS] * (1 + len(numerics.CONTENDERS))
    assert {row["learning_rate"] for row in rows} == {1e-3}
    found = {row["contender"]: row["movement"] for row in rows}
    assert found[numerics.MASTER] == 1 and found["mlx"] < 0.5 < 0.98 < found["compiled_adam"] < 1.02


def test_quality() -> None:
    row = quality.train("8bit", 0, "bfloat16", 2, quality.Size(32, 1, 16, 2))
    assert kinds(row) == QUALITY and len(row["losses"]) == row["steps"] == 2


def test_an_update_ends_when_everything_is_computed() -> None:
    def tree(seed: int) -> dict[str, mx.array]:
        return arrays({"a": (64, 128), "b": (5,)}, mx.bfloat16, 1.0, seed)

    for name, make in selected([n for n, entry in CONTENDERS.items() if not entry.needs], mx.bfloat16)[0].items():
        contender = make(tree(0), tree(1))
        if contender.lazy:
            contender.build()
            assert kernels(contender.changed()), name
        contender.update()
        assert not kernels([*contender.changed(), *contender.named_parameters().values()]), name
        state = [array for part in contender.optimizer.state.values() for array in parts(part)]
        assert not kernels(state), name


def parts(state: Any) -> list[mx.array]:
    return [*state.values()] if isinstance(state, dict) else [state]
