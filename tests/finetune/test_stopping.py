"""How a run ends: early, for want of memory, for losses that are not finite; and what is saved then."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.optimizers as optim
import pytest
from compiled_adam.base.errors import InputError, TrainingStopped
from compiled_adam.finetune import saving, validation
from compiled_adam.finetune.batches import Batches
from compiled_adam.finetune.log import read
from compiled_adam.finetune.stopping import is_out_of_memory
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from trees import assert_identical

from tests.tiny_runs import (
    WithBadBatch,
    always_nan,
    arguments,
    dataset,
    lora,
    loss_that_fails_on_bad,
    losses_of,
    train,
    weights,
)


class WithoutBadBatch(WithBadBatch):
    skip = True


def test_one_bad_batch_costs_one_step_and_not_the_run(tiny_model: Path, tmp_path: Path) -> None:
    def run(train, optimizer, batches, iters, name):
        (tmp_path / name).mkdir()
        train(
            lora(tiny_model),
            optimizer,
            dataset(40),
            args=arguments(tmp_path / name, iters=iters),
            loss=loss_that_fails_on_bad,
            iterate_batches=batches,
        )
        return weights(tmp_path / name / "adapters.safetensors")

    stock = run(trainer.train, optim.Adam(1e-3), WithBadBatch, 12, "stock")
    assert all(mx.isnan(array).any().item() for array in stock.values())
    ours = run(ca.train, ca.Adam(1e-3, skip_nonfinite=True), WithBadBatch, 12, "ours")
    without = run(ca.train, ca.Adam(1e-3, skip_nonfinite=True), WithoutBadBatch, 11, "without")
    assert_identical(ours, without)


def test_not_finite_for_too_long(tiny_model: Path, tmp_path: Path) -> None:
    options = {"loss": always_nan, "keep_checkpoints": 0}
    start = weights_of(lora(tiny_model))
    with pytest.raises(TrainingStopped, match=r"not finite in 3 steps in a row.*; .*has the weights after iteration"):
        train(tiny_model, tmp_path, nonfinite_limit=3, log=True, **options)
    assert len(read(tmp_path / "log.jsonl")) in (3, 4)  # a result is read while the next step is on its way
    assert_identical(weights(tmp_path / "adapters.safetensors"), start)

    (tmp_path / "adapters.safetensors").write_bytes(b"older")
    with pytest.raises(TrainingStopped, match=r"not finite in 3 steps in a row.*; nothing was saved"):
        train(tiny_model, tmp_path, optimizer=ca.Adam(1e-3), nonfinite_limit=3, **options)
    assert (tmp_path / "adapters.safetensors").read_bytes() == b"older"  # weights that are NaN replace nothing
    with pytest.raises(TrainingStopped, match=r"training is over, but not saved: .* not a number.*; nothing was saved"):
        train(tiny_model, tmp_path, optimizer=ca.Adam(1e-3), **options)
    assert (tmp_path / "adapters.safetensors").read_bytes() == b"older"


def weights_of(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"),
        RuntimeError("[malloc] Unable to allocate 9 bytes."),
        RuntimeError("cudaMallocAsync failed: out of memory"),
        MemoryError(),
    ],
)
def test_out_of_memory(error: Exception, tiny_model: Path, tmp_path: Path) -> None:
    calls = []

    def loss(model, batch, lengths):
        calls.append(batch.shape)
        if len(set(calls)) == 2:
            raise error
        return trainer.default_loss(model, batch, lengths)

    examples = [*dataset(), *[(list(range(1, 100)), 0)] * 2]
    expected = r"out of memory in iteration \d+: .*; .*adapters.safetensors has the weights after iteration \d+\. Use"
    with pytest.raises(TrainingStopped, match=expected):
        # The long batch is in the permutation's middle; everything before it was saved.
        train(tiny_model, tmp_path, rows=examples, steps_per_save=1, iters=40, loss=loss, keep_checkpoints=0)
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("[matmul] shapes"))

    def broken(*_):
        raise RuntimeError("[matmul] shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        train(tiny_model, tmp_path, loss=broken)


def test_early_stop_and_best(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # None: a validation without targets, which says nothing about the model.
    losses = iter([3.0, 2.0, None, float("nan"), 2.0, 1.0])
    seen = {}

    def mean_loss(model, *_, **__):
        loss = next(losses)
        seen.setdefault(loss, weights_of(model))
        return loss

    monkeypatch.setattr(validation, "mean_loss", mean_loss)
    (tmp_path / "adapter_config.json").write_text("{}")
    train(tiny_model, tmp_path, val=True, iters=15, save_best=True, early_stop_patience=2, log=True)
    log = read(tmp_path / "log.jsonl")
    assert [entry["val_loss"] for entry in log if "val_loss" in entry] == [3.0, 2.0, None, None, 2.0]
    assert log[-1]["iteration"] == 12 and "val_loss" in log[-1]  # stopped before the step of iteration 12
    assert sorted(os.listdir(tmp_path / "best")) == ["adapter_config.json", "adapters.safetensors", "best.json"]
    # The validation was made before the step of this iteration, as the log says it.
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {"iteration": 3, "val_loss": 2.0}
    best = weights(tmp_path / "best" / "adapters.safetensors")
    last = weights(tmp_path / "adapters.safetensors")
    assert_identical(best, seen[2.0])  # the later 2.0 is no improvement
    assert any(not mx.array_equal(best[path], last[path]).item() for path in best)


def test_checkpoints_and_adapters_that_stay(tiny_model: Path, tmp_path: Path) -> None:
    def run(**options) -> list[str]:
        train(tiny_model, tmp_path, iters=14, **{"keep_checkpoints": 0, **options})
        return sorted(
            str(path.relative_to(tmp_path)) for path in tmp_path.rglob("[0-9]*") if "previous-1" not in path.parts
        )

    adapters = [f"00000{i:02d}_adapters.safetensors" for i in (4, 8, 12)]
    assert run() == adapters
    assert run(keep_checkpoints=2) == [*adapters, "checkpoints/0000012", "checkpoints/0000014"]
    (tmp_path / "0000900_adapters.safetensors").write_bytes(b"of an earlier run")
    assert run(keep_checkpoints=3, keep_adapters=1) == [
        "0000012_adapters.safetensors",
        "0000900_adapters.safetensors",
        *(f"checkpoints/00000{i:02d}" for i in (8, 12, 14)),
    ]
    assert sorted(os.listdir(tmp_path / "previous-1" / "checkpoints")) == ["0000012", "0000014"]


def test_a_save_that_fails_is_reported_and_the_run_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    real = saving.write_checkpoint

    def full(folder, *rest, **more):
        if folder.name == "0000008":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, *rest, **more)

    monkeypatch.setattr(saving, "write_checkpoint", full)
    train(tiny_model, tmp_path, keep_checkpoints=3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["0000004", "0000012"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "not saved" in line)
    assert re.search(r"iter +8  not saved: .*No space left on device; training goes on", line)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError, InputError, OSError])
@pytest.mark.parametrize("at", ["0000008", "0000012"])
def test_only_what_a_user_can_mend_is_a_failed_save(
    kind, at: str, tiny_model: Path, tmp_path: Path, monkeypatch, capsys
):
    """A fault of the program in a save is raised as it is, after the other saves were tried."""
    real, mended = saving.write_checkpoint, kind in (InputError, OSError)

    def write(folder, *rest, **more):
        if folder.name == at:
            raise kind("of the save")
        real(folder, *rest, **more)

    monkeypatch.setattr(saving, "write_checkpoint", write)
    raised = pytest.raises(TrainingStopped if mended else kind, match="of the save")
    with nullcontext() if mended and at == "0000008" else raised:
        train(tiny_model, tmp_path, steps_per_save=8, keep_checkpoints=2)
    assert "not saved: " in capsys.readouterr().out or mended
    assert (tmp_path / "adapters.safetensors").exists()
    before = {"0000008": [] if not mended else ["0000012"], "0000012": ["0000008"]}[at]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*")) == before


def test_a_checkpoint_is_saved_although_old_ones_cannot_be_removed(
    tiny_model: Path, tmp_path: Path, monkeypatch, capsys
):
    def prune(folder, keep):
        raise InputError(f"{folder}/9999999/meta.json is damaged")

    monkeypatch.setattr(saving, "prune", prune)
    train(tiny_model, tmp_path, keep_checkpoints=1)
    said = capsys.readouterr().out
    assert "not saved" not in said and "0000012 is saved, but older checkpoints were not removed: " in said
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["0000004", "0000008", "0000012"]


def test_a_damaged_checkpoint_that_is_put_aside_is_not_recommended(tiny_model: Path, tmp_path: Path, capsys) -> None:
    train(tiny_model, tmp_path, steps_per_save=4)
    meta = tmp_path / "checkpoints" / "0000012" / "meta.json"
    meta.write_text("{")
    train(tiny_model, tmp_path, steps_per_save=4, resume="auto")
    line = next(line for line in capsys.readouterr().out.splitlines() if "an earlier run left" in line)
    assert line.endswith("previous-1")
    (tmp_path / "checkpoints" / "0000012" / "meta.json").write_text("{")
    train(tiny_model, tmp_path, steps_per_save=4)  # a new run
    line = next(line for line in capsys.readouterr().out.splitlines() if "an earlier run left" in line)
    assert re.search(r"--resume \S*previous-2/checkpoints/0000008 goes on from there$", line)


def test_options_that_cannot_be(tiny_model: Path, tmp_path: Path) -> None:
    def refused(message: str, val: bool = False, batches=Batches, **options) -> None:
        examples = dataset(options.pop("count", 12))
        names = ("steps_per_report", "steps_per_eval", "val_batches", "grad_accumulation_steps", "batch_size")
        args = arguments(tmp_path, **{name: options.pop(name) for name in names if name in options})
        valid = dataset() if val else None
        with pytest.raises(ValueError, match=re.escape(message)):
            ca.train(lora(tiny_model), ca.Adam(1e-3), examples, valid, args, iterate_batches=batches, **options)

    refused("save_best (--save-best) needs a validation loss, but there is no validation set", save_best=True)
    refused("early_stop_patience (--early-stop-patience) needs a validation loss", early_stop_patience=1)
    refused(
        "early_stop_patience (--early-stop-patience) is 0; it must be a whole number of at least 1",
        True,
        early_stop_patience=0,
    )
    refused("keep_checkpoints (--keep-checkpoints) is -1", keep_checkpoints=-1)
    refused("nonfinite_limit (--nonfinite-limit) is True", nonfinite_limit=True)
    refused("steps_per_report (--steps-per-report) is 0", steps_per_report=0)
    refused("a checkpoint needs batches that know their position", batches=trainer.iterate_batches, keep_checkpoints=1)
    refused(
        "val_batches (--val-batches) is 0; it must be a whole number of at least 1, or -1 for the whole validation set",
        True,
        steps_per_eval=1,
        val_batches=0,
    )
    refused("grad_accumulation_steps (--grad-accumulation-steps) is 0", grad_accumulation_steps=0)
    refused("validation set has 12 examples, fewer than batch_size=24", True, batch_size=24, count=30)
    (tmp_path / "checkpoints" / "0000003").mkdir(parents=True)
    refused("there is no whole checkpoint in", resume="auto")
    refused("nowhere is not a checkpoint", resume=tmp_path / "nowhere")
    ca.save_checkpoint(tmp_path / "own", ca.make_step(lora(tiny_model), trainer.default_loss))
    refused("was saved by another run", resume=tmp_path / "own")


def test_log_has_every_step(tiny_model: Path, tmp_path: Path) -> None:
    optimizer = ca.Adam(1e-3, max_grad_norm=1.0)
    train(tiny_model, tmp_path, optimizer=optimizer, steps_per_report=5, grad_accumulation_steps=2, log=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 13))
    assert [line["grad_norm"] is None for line in lines] == [True, False] * 6
    assert all(line["loss"] > 0 and line["tokens"] == 38 and line["seconds"] > 0 for line in lines)
    assert lines[0].keys() == {
        *("iteration", "loss", "tokens", "grad_norm", "learning_rate", "skipped", "traces", "seconds", "memory")
    }


# An earlier run, and what is not ours.


def test_nothing_of_others_is_deleted(tiny_model: Path, tmp_path: Path, capsys) -> None:
    mine = ["previous-1/thesis.txt", "checkpoints/mine.txt", "best/notes.txt", "log.jsonl"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for _ in range(3):
        train(tiny_model, tmp_path, val=True, save_best=True)
    for name in mine:
        assert (tmp_path / name).read_text() == "mine", name
    for number in (2, 3):  # both earlier runs are still there, and their checkpoints can be resumed
        assert sorted(os.listdir(tmp_path / f"previous-{number}" / "checkpoints")) == [
            f"00000{i:02}" for i in (4, 8, 12)
        ]
    output = capsys.readouterr().out
    path = re.findall(r"--resume (\S+) goes on from there", output)[-1]
    train(tiny_model, tmp_path, val=True, resume=path, iters=13)
    assert "not saved:" in output and "best has notes.txt, which is not ours" in output


def test_what_an_earlier_run_without_checkpoints_left_is_put_aside(tiny_model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        train(tiny_model, tmp_path, val=True, iters=1, log=True, save_best=True, keep_checkpoints=0)
    assert {*os.listdir(tmp_path / "previous-1")} == {"best", "checkpoints", "log.jsonl", "run.json"}
    assert {*os.listdir(tmp_path / "best")} == {"adapters.safetensors", "best.json"}  # there is no configuration


def test_a_damaged_newest_checkpoint_does_not_stand_in_the_way(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("whole", "broken", "missing"):
        (tmp_path / name).mkdir()
        train(tiny_model, tmp_path / name, log=True)
    (tmp_path / "broken" / "checkpoints" / "0000012" / "weights.safetensors").write_bytes(b"")
    (tmp_path / "missing" / "checkpoints" / "0000012" / "meta.json").unlink()
    for name in ("broken", "missing"):
        train(tiny_model, tmp_path / name, log=True, resume="auto")
        assert losses_of(tmp_path / name) == losses_of(tmp_path / "whole")
        assert ca.latest_checkpoint(tmp_path / name / "checkpoints").name == "0000012"
        assert os.listdir(tmp_path / name / "previous-1" / "checkpoints") == ["0000012"]


def test_going_back_to_an_older_checkpoint_keeps_the_new_work(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path)
    train(tiny_model, tmp_path, resume=tmp_path / "checkpoints" / "0000004", iters=6, keep_checkpoints=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["0000004", "0000006"]
    assert sorted(os.listdir(tmp_path / "previous-1" / "checkpoints")) == ["0000008", "0000012"]


def test_a_refused_run_changes_no_file(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path, log=True, adapter_config={"rank": 4})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ValueError, match="learning_rate"):
        train(tiny_model, tmp_path, optimizer=ca.Adam(1.0), resume="auto", log=True, adapter_config={"rank": 8})
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after


# Loops of one's own.


def test_batches_that_end_and_tokens_that_python_counts(tiny_model: Path, tmp_path: Path) -> None:
    def three(dataset, batch_size, max_seq_length, loop=False, seed=None, comm_group=None):
        return iter([next(Batches(dataset, batch_size, max_seq_length, seed=i)) for i in range(3)])

    def loss(model, batch, lengths):
        return trainer.default_loss(model, batch, lengths)[0], 7

    train(tiny_model, tmp_path, iterate_batches=three, loss=loss, log=True, keep_checkpoints=0)
    assert [entry["tokens"] for entry in read(tmp_path / "log.jsonl")] == [7, 7, 7]


def test_the_cache_is_cleared_beyond_the_threshold_only(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1000)
    for threshold, times in ((0, 0), (1000, 0), (999, 12)):
        train(tiny_model, tmp_path, clear_cache_threshold=threshold, keep_checkpoints=0)
        assert len(cleared) == times
