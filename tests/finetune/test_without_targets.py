"""Batches without a token to train, as prompts that fill the length make them: they count for nothing, anywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from compiled_adam.base.errors import TrainingStopped
from compiled_adam.finetune.metrics import Report, failures
from mlx_lm.tuner.trainer import TrainingArgs

from tests.tiny_runs import Reports

NAN = math.nan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(3)
        self.layers = [nn.Linear(3, 1)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.layers[0](x)


def loss(model: nn.Module, x: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """0/0 for a mask of zeros, as losses of one's own are; mlx-lm's, too."""
    tokens = mask.sum()
    return (mx.square(model(x) - 1).squeeze(-1) * mask).sum() / tokens, tokens


def batches(counts: list[int]):
    """The iterator of a run whose batches have so many targets, again and again."""

    def iterate(dataset, batch_size, max_seq_length, loop=False, seed=None, comm_group=None):
        i = 0
        while loop or i < len(counts):
            x = mx.random.normal((4, 3), key=mx.random.key(i % len(counts)))
            yield x, (mx.arange(4) < counts[i % len(counts)]).astype(mx.float32)
            i += 1

    return iterate


def train(folder: Path, counts: list[int], optimizer=None, valid: bool = False, accumulate: int = 1, **options):
    names = ("iters", "steps_per_report", "steps_per_eval")
    args = TrainingArgs(
        batch_size=4,
        adapter_file=str(folder / "a.safetensors"),
        **{"iters": len(counts), **{name: options.pop(name) for name in names if name in options}},
    )
    args.grad_accumulation_steps = accumulate
    model, seen = Net(), Reports()
    optimizer = ca.AdamW(1e-2) if optimizer is None else optimizer
    ca.train(
        model, optimizer, [0] * 8, [0] * 8 if valid else None, args, loss, batches(counts), seen, log=True, **options
    )
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return model, seen, [entry for entry in entries if "loss" in entry]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "make",
    [lambda: optim.SGD(0.1, momentum=0.9), lambda: optim.Adam(0.1), lambda: ca.AdamW(0.1, skip_nonfinite=True)],
    ids=["sgd", "adam", "guarded"],
)
def test_reports_and_weights_are_those_of_the_other_batches(make, accumulate: int, tmp_path: Path) -> None:
    model, seen, entries = train(tmp_path, [2, 0, 3, 0, 0, 4], make(), accumulate=accumulate, steps_per_report=3)
    assert all(mx.isfinite(array).all().item() for array in model.layers[0].parameters().values())
    assert [entry["tokens"] for entry in entries] == [2, 0, 3, 0, 0, 4]
    assert [entry["loss"] is None for entry in entries] == [False, True, False, True, True, False]
    assert all(entry["skipped"] == 0 for entry in entries)
    first, second = seen.training
    assert first["train_loss"] == pytest.approx((entries[0]["loss"] + entries[2]["loss"]) / 2, rel=1e-6)
    assert second["train_loss"] == entries[5]["loss"]
    assert second["trained_tokens"] == 9


def test_an_update_without_targets_has_the_gradient_0(tmp_path: Path) -> None:
    """Momentum goes on moving the weights, as it does where several workers have no targets."""
    model, _, entries = train(tmp_path, [4, 0], optim.SGD(0.1, momentum=0.5))
    assert entries[1]["grad_norm"] == 0
    alone, _, _ = train(tmp_path, [4], optim.SGD(0.1, momentum=0.5))
    start = Net().layers[0].weight
    moved, before = model.layers[0].weight - start, alone.layers[0].weight - start
    # float32: v = g, then v = g / 2
    assert mx.allclose(moved, 1.5 * before, rtol=1e-5).item() and mx.abs(before).max().item() > 0.01


def test_a_report_of_such_batches_alone_says_so(tmp_path: Path, capsys) -> None:
    _, seen, _ = train(tmp_path, [3, 0, 0], steps_per_report=1)
    assert [math.isnan(info["train_loss"]) for info in seen.training] == [False, True, True]
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert ["no targets" in line for line in lines] == [False, True, True]
    assert ["loss nan" in line for line in lines] == [False] * 3


def test_a_run_that_trains_no_token_says_why_once(tmp_path: Path, capsys) -> None:
    train(tmp_path, [0] * 6, steps_per_report=2, nonfinite_limit=2)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert line.startswith("warning: no token has been trained yet")
    for word in ("--mask-prompt", "max_seq_length (--max-seq-length), 2048 tokens", "shorten the prompts"):
        assert word in line, word
    assert out.index("iter     2") < out.index(line) < out.index("iter     4")
    train(tmp_path, [1] * 6, steps_per_report=2)
    assert "no token has been trained" not in capsys.readouterr().out


def test_empty_micro_batches_are_no_failures(tmp_path: Path) -> None:
    _, seen, _ = train(tmp_path, [0, 2] * 8, accumulate=16, nonfinite_limit=2, steps_per_report=8)
    assert all(math.isfinite(info["train_loss"]) for info in seen.training)


def entry(loss: float, tokens: float, grad_norm: float | None) -> dict:
    return {"loss": loss, "tokens": tokens, "grad_norm": grad_norm}


@pytest.mark.parametrize(
    ("entries", "counts"),
    [
        # A batch without tokens in a row of failures is no failure, and does not end the row.
        ([entry(NAN, 5, NAN), entry(NAN, 0, 0.0), entry(NAN, 5, NAN), entry(1.0, 5, 2.0)], [1, 1, 2, 0]),
        # In a window that has no update yet, and at its end: the norm is that of all micro-batches.
        ([entry(NAN, 5, None), entry(NAN, 0, None), entry(NAN, 0, NAN)], [1, 1, 2]),
        ([entry(NAN, 5, None), entry(1.0, 5, None), entry(NAN, 0, 3.0)], [1, 1, 0]),
        ([entry(NAN, 0, None), entry(NAN, 0, 0.0)], [0, 0]),
    ],
)
def test_failures_are_counted_over_batches_without_tokens(entries: list[dict], counts: list[int]) -> None:
    found, so_far = [], 0
    for each in entries:
        so_far = failures(so_far, each)
        found.append(so_far)
    assert found == counts


def test_real_failures_between_them_still_end_the_run(tmp_path: Path) -> None:
    model = Net()
    model.layers[0].weight = mx.full((1, 3), mx.nan)  # a batch with targets has no finite loss
    args = TrainingArgs(batch_size=4, iters=40, adapter_file=str(tmp_path / "a.safetensors"))
    optimizer = ca.Adam(1e-2, skip_nonfinite=True)
    # The sixth batch is the third with targets; it is read when the seventh step is on its way.
    with pytest.raises(TrainingStopped, match="not finite in 3 steps in a row, up to iteration 7"):
        ca.train(model, optimizer, [0] * 8, None, args, loss, batches([0, 2]), nonfinite_limit=3)


def test_a_report_goes_on_from_a_checkpoint() -> None:
    more = {"iteration": 1, "seconds": 1.0, "learning_rate": 0.1, "memory": 0, "skipped": 0, "traces": 1}
    report = Report()
    for each in (entry(2.0, 5, 1.0), entry(NAN, 0, 0.0)):
        report.add({**each, **more})
    again = Report()
    again.sums = json.loads(json.dumps(report.sums))
    again.add({**entry(4.0, 1, 1.0), **more})
    assert again.close()["train_loss"] == 3.0


def test_a_validation_without_targets_is_no_loss(tmp_path: Path, capsys) -> None:
    _, seen, _ = train(
        tmp_path, [0, 0, 0, 0], valid=True, steps_per_eval=1, early_stop_patience=1, save_best=True, steps_per_report=4
    )
    assert len(seen.validation) == 4 and all(math.isnan(info["val_loss"]) for info in seen.validation)
    assert not (tmp_path / "best").exists()
    out = capsys.readouterr().out
    assert out.count("no validation loss: no example has a token to predict") == 4 and "stopped early" not in out
