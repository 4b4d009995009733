"""Saves that fail while a model is fine-tuned."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import compiled_adam as ca
import pytest
from compiled_adam.base.errors import InputError, TrainingStopped
from compiled_adam.checkpoint import durable, series
from compiled_adam.finetune import saving
from compiled_adam.finetune.batches import Batches

from tests.tiny_runs import WithBadBatch, loss_that_fails_on_bad, stop_after, train, weights


@pytest.mark.parametrize("ending", ["complete", "SIGINT", "SIGTERM", "nonfinite"])
def test_adapters_are_saved_where_a_checkpoint_cannot(
    ending: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_checkpoint", full)
    expected = {"complete": TrainingStopped, "SIGINT": KeyboardInterrupt, "SIGTERM": SystemExit}
    options = {"training_callback": stop_after(3, getattr(signal, ending))} if ending.startswith("SIG") else {}
    if ending == "nonfinite":
        options = {"loss": loss_that_fails_on_bad, "nonfinite_limit": 1, "iterate_batches": WithBadBatch}
    with pytest.raises(expected.get(ending, TrainingStopped)) as stopped:
        train(tiny_model, tmp_path, **options)
    assert weights(tmp_path / "adapters.safetensors")
    said = str(stopped.value) + capsys.readouterr().out
    assert "No space left on device" in said and "adapters.safetensors has the weights after iteration" in said
    if ending == "SIGTERM":
        assert stopped.value.code == 143


class Sixth(Batches):
    """Instead of the sixth batch it does something."""

    does: Callable[[], None]

    def __next__(self):
        if self.position()["next"] == 5:
            type(self).does()
        return super().__next__()


def sixth(*actions: int | Exception) -> type[Sixth]:
    """Batches whose sixth sends signals and raises errors, in this order."""

    def does() -> None:
        for action in actions:
            if isinstance(action, Exception):
                raise action
            os.kill(os.getpid(), action)

    return type("SixthOnce", (Sixth,), {"does": staticmethod(does)})


@pytest.mark.parametrize("kind", [InputError, ValueError, KeyError, RuntimeError, ZeroDivisionError])
def test_an_error_in_the_middle_saves_what_there_is(kind, tiny_model: Path, tmp_path: Path, capsys) -> None:
    error = kind("example 3 cannot be used")

    # The error itself, and beside it a line that says what there is and how to go on.
    with pytest.raises(type(error)) as raised:
        train(tiny_model, tmp_path, iterate_batches=sixth(error), steps_per_save=100)
    assert raised.value is error
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"iteration 6: '?example 3 .*; .*has the weights after iteration 5, and .*--resume goes on", line)
    assert ("--allow-change data" in line) == isinstance(error, InputError)
    assert ca.latest_checkpoint(tmp_path / "checkpoints").name == "0000005"


@pytest.mark.parametrize(
    ("kind", "ended", "message"),
    [(signal.SIGINT, KeyboardInterrupt, "stopped by SIGINT after iteration 5"), (signal.SIGTERM, SystemExit, "143")],
)
def test_what_a_signal_breaks_is_no_error(kind, ended, message: str, tiny_model: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal, and so the compiler that MLX waits for, whose failure it raises."""
    broken = RuntimeError("[Compile::eval_cpu] Failed to compile function")
    with pytest.raises(ended, match=message):
        train(tiny_model, tmp_path, iterate_batches=sixth(kind, broken), steps_per_save=100)
    assert ca.latest_checkpoint(tmp_path / "checkpoints").name == "0000005"
    # An error that no signal can cause stays one.
    with pytest.raises(ZeroDivisionError):
        train(tiny_model, tmp_path, iterate_batches=sixth(kind, ZeroDivisionError()), steps_per_save=100)


def test_the_second_ctrl_c_says_what_there_is(tiny_model: Path, tmp_path: Path) -> None:
    # With Python's own handler, also where the tests run in the background and inherit that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(
            KeyboardInterrupt, match=r"stopped at once in iteration 6; there is a checkpoint .*iteration 4"
        ):
            train(tiny_model, tmp_path, iterate_batches=sixth(signal.SIGINT, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ca.latest_checkpoint(tmp_path / "checkpoints").name == "0000004"


def test_readers_of_adapters_see_a_whole_file(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    real = durable.save_arrays

    def killed(file: Path, arrays) -> None:
        real(file, arrays)
        if file.name.startswith(".adapters"):
            file.write_bytes(file.read_bytes()[:100])
            raise OSError("killed in the middle")

    train(tiny_model, tmp_path)
    before = (tmp_path / "adapters.safetensors").read_bytes()
    monkeypatch.setattr(durable, "save_arrays", killed)
    with pytest.raises(TrainingStopped, match="killed in the middle"):
        train(tiny_model, tmp_path, iters=3)
    assert (tmp_path / "adapters.safetensors").read_bytes() == before


def test_a_checkpoint_that_a_killed_save_left_under_another_name_is_put_aside_like_others(tmp_path: Path) -> None:
    for name in ("0000002", ".0000004.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "meta.json").write_text(name)
    said: list[str] = []
    saving.put_aside(tmp_path, series.numbered(tmp_path / "checkpoints"), [], said.append)
    assert not os.listdir(tmp_path / "checkpoints")
    aside = tmp_path / "previous-1" / "checkpoints"
    assert (aside / "0000004" / "meta.json").read_text() == ".0000004.old" and "previous-1" in said[0]
    assert [path.name for path in series.numbered(aside)] == ["0000002", "0000004"]
