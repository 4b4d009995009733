"""What a user did not type, or what does not fit together, is said in the user's terms."""

from __future__ import annotations

from pathlib import Path

import pytest
from compiled_adam.commands import lora_options
from compiled_adam.commands.lora_together import check_together, not_named, short_schedule


def job(folder: Path, text: str, *argv: str):
    (folder / "job.yaml").write_text(text + "\n")
    return lora_options.settings(["-c", str(folder / "job.yaml"), "--train", *argv])


COSINE = "lr_schedule: {name: cosine_decay, arguments: [1.0e-3, 90], warmup: 10}"
LINEAR = "lr_schedule: {name: linear, arguments: [1.0e-3, 100, 1.0e-5]}"


def test_a_schedule_that_is_shorter_than_the_run(tmp_path: Path) -> None:
    (note,) = check_together(job(tmp_path, COSINE))
    assert note == (
        "lr_schedule ends at update 100, but the run has 1000 (iters is 1000 by default): from there on the learning"
        " rate stays 0, so nothing more is learned. Give --iters 100, or a longer schedule"
    )
    (note,) = check_together(job(tmp_path, LINEAR, "--iters", "500", "--grad-accumulation-steps", "2"))
    assert "but the run has 250 (iters is 500): from there on the learning rate stays 1e-05. Give --iters 200" in note
    for more in (["--iters", "100"], ["--iters", "200", "--grad-accumulation-steps", "2"]):
        assert check_together(job(tmp_path, COSINE, *more)) == []
    assert check_together(job(tmp_path, "lr_schedule: {name: exponential_decay, arguments: [1.0e-3, 0.9]}")) == []


def test_with_epochs_it_is_said_when_they_are_counted(tmp_path: Path) -> None:
    args = job(tmp_path, COSINE, "--epochs", "2.5")
    assert check_together(args) == []
    args.iters = 300  # which `lora` computes from the data
    (note,) = short_schedule(args)
    assert "but the run has 300 (epochs is 2.5): from there on" in note


@pytest.mark.parametrize(
    ("text", "argv", "named"),
    [
        ("", [], ["model (--model) is not given, so it is mlx-lm's default, Qwen", "data (--data) is not given"]),
        ("model: a", ["--data", "b"], []),
        ("hf_dataset: {path: a/b}", ["--model", "c"], []),
    ],
)
def test_a_model_and_data_that_nobody_named(text: str, argv: list[str], named: list[str], tmp_path: Path) -> None:
    found = not_named(job(tmp_path, text, *argv))
    assert len(found) == len(named)
    assert all(note.startswith(begin) for note, begin in zip(found, named, strict=True))
