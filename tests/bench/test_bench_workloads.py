"""The trees of `bench`: counted by hand, and against what is published about the models."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from bench import apart, memory, models, update
from bench.workloads import QUICK, WORKLOADS, needed, parameter_count


def test_workloads_are_what_they_are_called() -> None:
    shapes = {name: make() for name, make in WORKLOADS.items()}
    sizes = {name: (len(tree), parameter_count(tree)) for name, tree in shapes.items()}
    assert sizes == {
        "1000 x 64": (1000, 64_000),
        "448 x (8x1024)": (448, 448 * 8192),
        "95 M GPT-2": (97, 94_617_600),
    }
    assert set(QUICK) <= set(WORKLOADS)


def test_a_users_model(tiny_model: Path) -> None:
    mx.synchronize()
    mx.reset_peak_memory()
    before, key = mx.get_active_memory(), mx.random.state[0].tolist()
    trees = models.of_model("mine", models.config_of(str(tiny_model)))
    sizes = {name: parameter_count(make()) for name, make in trees.items()}
    assert mx.get_peak_memory() - before < 1 << 20 and mx.random.state[0].tolist() == key  # only shapes are read
    weights = mx.load(str(tiny_model / "model.safetensors"))
    assert sizes["mine"] == sum(array.size for array in weights.values())
    # Rank 8 on q, k, v, o, gate, up and down of 4 layers, of widths 64, 32 (two heads of 16) and 256.
    assert sizes["mine LoRA r=8"] == 4 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 256))


def test_a_model_without_a_usable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        models.config_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        models.config_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match="has no model_type"):
        models.config_of(str(tmp_path))


def test_what_does_not_fit_into_memory_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    references = ["mlx eager", "mlx compiled"]
    for enough in (True, False):
        most = needed(4, mx.float32, 2) / 0.6 + (1 if enough else -1)
        monkeypatch.setattr(update, "memory_bytes", lambda most=most: most)
        monkeypatch.setattr(apart, "Apart", apart.here)
        rows = update._rows("w", {"a": (4,)}, "float32", references, 0.0, 1, {"best": 1e9})
        assert [update.NOT_MEASURED in row for row in rows] == [not enough] * 2
    assert rows[0][update.NOT_MEASURED] == "2 contenders need 0.0 GB here; choose fewer with --contender"
    monkeypatch.setattr(memory, "memory_bytes", lambda: 1)
    (row,) = memory._rows("w", {"a": (4,)}, "float32", "mlx eager")
    assert row[memory.NOT_MEASURED] == "4 parameters are too many here"
