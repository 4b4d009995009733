"""The trees of `bench`: counted by hand, and against what is published about the models."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from bench import models, update
from bench.workloads import QUICK, WORKLOADS, of_model, over_parameters, over_tensors, parameter_count


def test_workloads_are_what_they_are_called() -> None:
    shapes = {name: make() for name, make in WORKLOADS.items()}
    sizes = {name: (len(tree), parameter_count(tree)) for name, tree in shapes.items()}
    assert sizes == {
        "1000 x 64": (1000, 64_000),
        "224 x (8x1024)": (224, 224 * 8192),
        "448 x (8x1024)": (448, 448 * 8192),
        "95 M GPT-2": (97, 94_617_600),
        # Published: 134,515,008 parameters; 30 layers of 9 tensors, the embedding and the last norm.
        "SmolLM2-135M": (30 * 9 + 2, 134_515_008),
        "SmolLM2-135M LoRA r=8": (30 * 14, 2_442_240),
        "Qwen3-0.6B LoRA r=8": (28 * 14, 10_092_544 // 2),
        "Qwen3-0.6B LoRA r=16": (28 * 14, 10_092_544),  # what PEFT prints for all linear layers
        "Llama-3.2-1B LoRA r=8": (16 * 14, 11_272_192 // 2),  # likewise, for r=16
    }
    assert set(QUICK) <= set(WORKLOADS)


@pytest.mark.parametrize(
    "name, published", [("SmolLM2-135M", 134_515_008), ("Qwen3-0.6B", 596_049_920), ("Llama-3.2-1B", 1_235_814_400)]
)
def test_full_trees_have_the_published_number_of_parameters_and_allocate_none(name: str, published: int) -> None:
    mx.synchronize()
    mx.reset_peak_memory()
    before, key = mx.get_active_memory(), mx.random.state[0].tolist()
    assert parameter_count(models.full(models.CONFIGS[name])) == published
    assert mx.get_peak_memory() - before < 1 << 20
    assert mx.random.state[0].tolist() == key


def test_sweeps_change_one_thing() -> None:
    sizes = over_parameters()
    assert list(sizes) == [10**4, 10**5, 10**6, 10**7, 10**8]
    assert {len(tree) for tree in sizes.values()} == {100}
    assert all(parameter_count(tree) == size for size, tree in sizes.items())
    assert {count: len(tree) for count, tree in over_tensors().items()} == {n: n for n in (10, 100, 1000, 10_000)}


def test_a_users_model(tiny_model: Path) -> None:
    trees = of_model("mine", models.config_of(str(tiny_model)))
    sizes = {name: parameter_count(make()) for name, make in trees.items()}
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


def test_what_does_not_fit_into_memory_is_measured_in_parts_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = dict.fromkeys(("mlx eager", "mlx compiled", "a", "b", "c"))
    for memory, expected in (
        (1e12, [list(chosen)]),
        (
            update.needed(1000, mx.float32, 4) / 0.6 + 1,
            [["mlx eager", "mlx compiled", "a", "b"], ["mlx eager", "mlx compiled", "c"]],
        ),
        (1, [[]]),
    ):
        monkeypatch.setattr(update, "memory_bytes", lambda memory=memory: memory)
        assert [list(group) for group in update._groups(chosen, 1000, mx.float32)] == expected
    rows = update._rows({"a": (4,)}, "float32", ["mlx eager", "mlx compiled"], 0.0, 1e9)
    assert {row[update.NOT_MEASURED] for row in rows} == {"4 parameters in float32 need 0 GB, too much here"}
