"""What `train` returns."""

from __future__ import annotations

import errno
import math
import os
import sys
from pathlib import Path

import compiled_adam as ca
import pytest
from compiled_adam.checkpoint import output
from compiled_adam.finetune import log

from tests.tiny_runs import Reports, train

TIMES = {"seconds", "memory", "traces"}  # these differ between two runs of the same job


def alike(history: ca.History) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history.entries]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ca.History, Reports, Path]:
    """Ten iterations with a report after every four, and a log."""
    reports, folder = Reports(), tmp_path_factory.mktemp("whole")
    history = train(tiny_model, folder, val=True, iters=10, steps_per_report=4, log=True, training_callback=reports)
    return history, reports, folder


def test_it_has_what_callbacks_get(whole: tuple[ca.History, Reports, Path]) -> None:
    history, reports, folder = whole
    assert history.losses == [(info["iteration"], info["train_loss"]) for info in reports.training]
    assert [iteration for iteration, _ in history.losses] == [4, 8, 10]
    val_losses = [info["val_loss"] for info in reports.validation]
    assert history.val_losses == list(zip((1, 3, 6, 9, 10), val_losses, strict=True))
    best = min(val_losses)
    assert history.best == next(found for found in history.val_losses if found[1] == best)
    lines = log.read(folder / "log.jsonl")
    assert sum(row["tokens"] for row in history.entries if "loss" in row) == sum(e.get("tokens", 0) for e in lines)
    assert {*lines[1]} == {*next(row for row in history.entries if "loss" in row)}  # the names of the log
    first, last = history.losses[0][1], history.losses[-1][1]
    assert repr(history) == (
        f"History(10 iterations, loss {first:.4f} -> {last:.4f}, best validation loss {best:.4f} at {history.best[0]})"
    )


def test_it_is_read_from_the_log_too(whole: tuple[ca.History, Reports, Path]) -> None:
    history, _, folder = whole
    assert ca.History.read(folder, every=4).entries == history.entries
    each = ca.History.read(folder / "log.jsonl", every=1)
    assert each.entries == log.read(folder / "log.jsonl")
    with pytest.raises(ca.InputError, match=r"log.jsonl does not exist; `train` writes a log with log=True"):
        ca.History.read(folder / "nothing" / "log.jsonl")
    with pytest.raises(ca.InputError, match="every is 0; it must be a whole number of at least 1"):
        ca.History.read(folder, every=0)


def test_a_resumed_run_has_what_came_before(
    whole: tuple[ca.History, Reports, Path], tiny_model: Path, tmp_path: Path
) -> None:
    train(tiny_model, tmp_path, val=True, iters=6, steps_per_report=4, steps_per_save=3, log=True)
    (tmp_path / "checkpoints" / "0000006").rename(tmp_path / "later")  # so that it goes on in the middle of a report
    history = train(tiny_model, tmp_path, val=True, iters=10, steps_per_report=4, log=True, resume="auto")
    assert alike(history) == alike(whole[0])


def test_without_a_log_it_has_what_this_run_did(tiny_model: Path, tmp_path: Path) -> None:
    first = train(tiny_model, tmp_path, iters=2)
    assert [iteration for iteration, _ in first.losses] == [1, 2] and first.best is None
    second = train(tiny_model, tmp_path, iters=3, resume="auto", log=True)  # nothing was logged before
    assert [iteration for iteration, _ in second.losses] == [3]
    assert not (tmp_path / "elsewhere").exists()


def test_an_early_end_is_a_row(tiny_model: Path, tmp_path: Path) -> None:
    options = {"iters": 9, "steps_per_report": 100, "steps_per_eval": 2, "val_batches": -1}
    # Without a learning rate nothing improves.
    history = train(tiny_model, tmp_path, val=True, optimizer=ca.Adam(0.0), early_stop_patience=1, **options)
    assert [iteration for iteration, _ in history.losses] == [1]
    assert [iteration for iteration, _ in history.val_losses] == [1, 2]


def test_the_rows_are_as_many_as_the_reports() -> None:
    history = ca.History()
    for i in range(1, 10_001):
        history.add({"iteration": i, "loss": 1.0, "tokens": 2, "seconds": 0.5, "grad_norm": None, "memory": i})
    history.report()
    assert history.entries == [
        {"iteration": 10_000, "loss": 1.0, "tokens": 20_000, "seconds": 5000.0, "grad_norm": None, "memory": 10_000}
    ]


def test_what_is_not_finite_is_none_in_rows_and_nan_in_losses() -> None:
    history = ca.History()
    for loss, tokens in ((math.nan, 0), (2.0, 4), (math.inf, 4)):
        history.add({"iteration": 1, "loss": loss, "tokens": tokens, "seconds": 1.0})
        history.report()
    history.add({"iteration": 2, "val_loss": math.nan})
    assert [row.get("loss", row.get("val_loss")) for row in history.entries] == [None, 2.0, None, None]
    assert str([loss for _, loss in history.losses]) == "[nan, 2.0, nan]"
    assert history.best is None
    assert repr(ca.History()) == "History(0 iterations)"


def test_a_picture_of_it(whole: tuple[ca.History, Reports, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    history = whole[0]
    figure = history.plot()
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == [
        "training",
        "validation",
        f"best: {history.best[1]:.4f} at {history.best[0]}",
    ]
    assert [tuple(point) for point in axes.lines[1].get_xydata()] == history.val_losses
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    assert not ca.History().plot().axes[0].lines
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'compiled-adam\[plot\]'"):
        history.plot()


def test_a_table_of_it(whole: tuple[ca.History, Reports, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    table = whole[0].to_pandas()
    assert len(table) == len(whole[0].entries)
    assert table["val_loss"].dropna().tolist() == [loss for _, loss in whole[0].val_losses]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_pandas needs pandas .*pip install 'compiled-adam\[notebook\]'"):
        whole[0].to_pandas()


def test_a_log_that_is_a_pipe_is_not_waited_for(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path, iters=2)
    os.mkfifo(tmp_path / "log.jsonl")
    history = train(tiny_model, tmp_path, iters=3, resume="auto", log=True)
    assert [iteration for iteration, _ in history.losses] == [3]


def test_lines_that_happen_again_are_there_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that cannot be written anew, as on a full disk, still has lines from after the checkpoint."""
    train(tiny_model, tmp_path, iters=4, steps_per_save=2, log=True)
    (tmp_path / "checkpoints" / "0000004").rename(tmp_path / "later")
    write = output.write

    def full(file: Path, content: bytes) -> None:
        if file.name == "log.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content)

    monkeypatch.setattr(output, "write", full)
    history = train(tiny_model, tmp_path, iters=4, resume="auto", log=True)
    assert [iteration for iteration, _ in history.losses] == [1, 2, 3, 4]
