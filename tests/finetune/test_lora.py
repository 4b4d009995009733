from __future__ import annotations

import math
import re
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.commands.small_model import texts
from compiled_adam.finetune import batches, validation
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from tests import tiny_runs
from tests.tiny_runs import Reports, Tokens


def setting(tiny_model: Path, kind: str):
    """A model ready for fine-tuning and two data sets of real text, always the same."""
    model, tokenizer = load(str(tiny_model))[:2]
    mx.random.seed(1)
    model.freeze()
    if kind == "full":
        model.layers[-1].unfreeze()
    else:
        linear_to_lora_layers(model, 2, {"rank": 4, "dropout": 0.0, "scale": 10.0})
    text = texts()[1]
    # Pieces of two lengths, which pad to two shapes.
    pieces = [{"text": text[i : i + (60 if i % 400 else 120)]} for i in range(0, 4000, 200)]
    return model, CacheDataset(TextDataset(pieces, tokenizer)), CacheDataset(TextDataset(pieces[:4], tokenizer))


def arguments(folder: Path, **changes) -> trainer.TrainingArgs:
    defaults = {"iters": 8, "val_batches": -1, "steps_per_eval": 4, "steps_per_save": 5}
    return tiny_runs.arguments(folder, **{**defaults, **changes})


def run(train, tiny_model: Path, kind: str, optimizer, folder: Path, **changes):
    folder.mkdir(exist_ok=True)
    model, train_set, valid_set = setting(tiny_model, kind)
    np.random.seed(0)
    reports = Reports()
    train(
        model=model,
        optimizer=optimizer,
        train_dataset=train_set,
        val_dataset=valid_set,
        args=arguments(folder, **changes),
        loss=trainer.default_loss,  # with which the two are compared; ours does not train the padding
        training_callback=reports,
    )
    return model, reports


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_same_losses_files_and_reports_as_mlx_lm(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    rate = optim.cosine_decay(1e-3, 8)
    _, expected = run(trainer.train, tiny_model, kind, optim.Adam(rate), tmp_path / "stock")
    _, reported = run(ca.train, tiny_model, kind, ca.Adam(rate), tmp_path / "ours")

    # Float32 rounding over 8 steps, in differently fused graphs.
    for a, b in zip(reported.training, expected.training, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        for key in ("iteration", "learning_rate", "trained_tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-6), key
        assert a.keys() - b.keys() == {"grad_norm", "skipped_steps", "traces"}
        assert not b.keys() - a.keys()
        assert a["grad_norm"] > 0 and a["skipped_steps"] == 0
    assert reported.training[-1]["traces"] == 2
    for a, b in zip(reported.validation, expected.validation, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
        assert a["iteration"] == b["iteration"] and a.keys() == b.keys()
    files = {path.name for path in (tmp_path / "stock").iterdir()}
    assert files == {"adapters.safetensors", "0000005_adapters.safetensors"}
    assert files == {path.name for path in (tmp_path / "ours").iterdir()}
    for name in files:
        a, b = (mx.load(str(tmp_path / which / name)) for which in ("ours", "stock"))
        assert a.keys() == b.keys()
        for path in a:
            # Adam divides by sqrt(v): where that is tiny, rounding of the gradient moves the whole step.
            scale = mx.abs(b[path]).max().item()
            np.testing.assert_allclose(np.array(a[path]), np.array(b[path]), atol=1e-3 * scale, err_msg=path)


def test_accumulation_weights_tokens_and_applies_the_last_window(tiny_model: Path, tmp_path: Path) -> None:
    optimizer = ca.Adam(1e-3)
    _, reported = run(ca.train, tiny_model, "lora", optimizer, tmp_path, grad_accumulation_steps=3)
    assert optimizer.step.item() == 3  # of 3, 3 and the last 2 iterations
    assert [info["grad_norm"] is None for info in reported.training] == [True, True, *[False] * 6]


def test_adapters_load_into_mlx_lm(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 10.0}}'
    )
    trained, _ = run(ca.train, tiny_model, "lora", ca.AdamW(1e-3), tmp_path)
    loaded = load_adapters(load(str(tiny_model))[0], str(tmp_path))
    for (path, a), (_, b) in zip(tree_flatten(trained.parameters()), tree_flatten(loaded.parameters()), strict=True):
        assert mx.array_equal(a, b).item(), path


@pytest.mark.parametrize("policy", ["float32", "bfloat16", "8bit", "param"])
def test_stock_mlx_lm_trains_with_every_policy(policy: str, tiny_model: Path, tmp_path: Path) -> None:
    optimizer = ca.AdamW(1e-3, moments=policy, max_grad_norm=1.0, skip_nonfinite=True, decay_filter=ca.decay_matrices)
    _, reported = run(trainer.train, tiny_model, "full", optimizer, tmp_path)
    assert reported.validation[-1]["val_loss"] < reported.validation[0]["val_loss"]
    assert optimizer.step.item() == 8 and optimizer.skipped.item() == 0 and optimizer.grad_norm.item() > 0


def test_any_mlx_optimizer_and_gradient_checkpointing(tiny_model: Path, tmp_path: Path) -> None:
    from mlx_lm.models import llama

    _, expected = run(ca.train, tiny_model, "lora", optim.SGD(1e-2), tmp_path)
    call = llama.TransformerBlock.__call__
    try:  # mlx-lm patches the class
        _, reported = run(ca.train, tiny_model, "lora", optim.SGD(1e-2), tmp_path, grad_checkpoint=True)
    finally:
        llama.TransformerBlock.__call__ = call
    for a, b in zip(reported.training, expected.training, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)  # layers are computed twice


def test_progress_in_a_pipe_is_plain_lines(tiny_model: Path, tmp_path: Path, capsys) -> None:
    run(ca.train, tiny_model, "lora", ca.Adam(1e-3), tmp_path, steps_per_report=4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "tokens/s" in line] == ["4", "8"]
    for word in ("loss", "lr", "norm", "tokens/s", "peak", "epoch", "left"):
        assert word in lines[-2], word
    assert re.fullmatch(r"8 iterations in .*; best \d\.\d{4} at \d", lines[-1])
    assert "traces" not in "".join(lines)  # as nothing is wrong with them
    assert not any("\x1b" in line for line in lines)


def test_too_small_a_data_set(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least batch_size=64"):
        run(ca.train, tiny_model, "lora", ca.Adam(1e-3), tmp_path, batch_size=64)


def test_schedule_counts_updates(tiny_model: Path, tmp_path: Path) -> None:
    rate = ca.schedulers.linear(1e-3, 4)
    _, reported = run(ca.train, tiny_model, "lora", ca.Adam(rate), tmp_path, grad_accumulation_steps=2)
    rates = [info["learning_rate"] for info in reported.training]
    assert rates[1::2] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4], rel=1e-6)
    assert all(math.isfinite(info["train_loss"]) for info in reported.training)


def test_batches_without_tokens_do_not_count() -> None:
    """As a worker's part of a batch may be, where the others' is not."""
    losses = iter([(mx.array(2.0), mx.array(3)), (mx.array(math.nan), mx.array(0)), (mx.array(4.0), 1)])
    found = validation.mean_loss(
        nn.Linear(1, 1),
        CacheDataset(Tokens([([1, 2], 0)] * 3)),
        lambda *_: next(losses),
        batches.Batches,
        trainer.TrainingArgs(batch_size=1, max_seq_length=8),
        -1,
        lambda _: None,
    )
    assert found == 2.5
