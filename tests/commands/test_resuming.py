"""A checkpoint of other options: the message has the flags, and commands that work."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from compiled_adam.commands.resuming import with_values


@pytest.mark.parametrize(
    ("typed", "settings", "works"),
    [
        ("--batch-size 4 --iters 9", {"batch_size": 2}, "--iters 9 --batch-size 2"),
        ("--num-layers=-1 --train", {"num_layers": 2}, "--train --num-layers 2"),
        ("--num-layers -1 --train", {"num_layers": 2}, "--train --num-layers 2"),
        ("--bucket 1.5 --train", {"bucket": None}, "--train"),
        ("--bucket --train", {"bucket": None}, "--train"),
        ("-c bucket.yaml --train", {"bucket": None}, None),  # the file would win
        ("--mask-prompt --train", {"mask_prompt": False}, "--train"),
        ("--train", {"mask_prompt": True}, "--train --mask-prompt"),
        ("--no-group-by-length", {"group_by_length": True}, "--group-by-length"),
        ("--train", {"group_by_length": None}, "--train --no-group-by-length"),
        ("--learning-rate 1", {"learning_rate": 9.999999747378752e-06}, "--learning-rate 1e-05"),
        ("", {"accumulate": 2, "bias_correction": 0.0}, "--grad-accumulation-steps 2 --no-bias-correction"),
        ("--optimizer adamw --weight-decay 1", {"optimizer": "Adam"}, "--weight-decay 1 --optimizer adam"),
        ("--optimizer adamw", {"optimizer": "Adam", "weight_decay": 0.0, "decays": "x"}, None),
        ("--optimizer adamw", {"optimizer": "Adam", "weight_decay": 0.0}, "--optimizer adam"),
        ("--learning-rate 1", {"learning_rate": [1.0, 0.5]}, None),  # a schedule
        ("", {"betas": [0.9, 0.95]}, None),
        ("--data a", {"data": "rows 82a4e9c3b64fcf69"}, None),
    ],
)
def test_the_command_with_the_values_of_a_checkpoint(
    typed: str, settings: dict, works: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bucket.yaml").write_text("bucket: 1.5")
    assert with_values(typed.split(), settings) == (None if works is None else works.split())


def test_the_commands_in_the_message_work(tiny_model: Path, data: Path, command, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "my data")
    begin = ("--train", "--model", str(tiny_model), "--data", "my data", "--num-layers", "2", "--iters", "2")
    begin = (*begin, "--batch-size", "2")
    assert command("lora", *begin).returncode == 0
    options = ("--no-bias-correction", "--steps-per-eval", "3", "--moments", "8bit", "--val-batches", "1")
    refused = command("lora", *begin, *options, "--resume")
    assert refused.returncode == 2
    for row in (
        "--steps-per-eval +3 +200",
        "--val-batches +1 +25",
        "--bias-correction +0 +1",
        "--moments +8bit +float32",
    ):
        assert re.search(f"^  {row}$", refused.stderr, re.M), refused.stderr
    printed = re.findall(r"^  compiled-adam (lora .*)$", refused.stderr, re.M)
    assert len(printed) == 2 and "--allow-change steps_per_eval" in printed[1] and "8bit" not in printed[0]
    for line in printed:
        done = command(*shlex.split(line))
        assert done.returncode == 0 and "resumed from adapters/checkpoints/0000002" in done.stdout, done.stderr


def test_what_cannot_change_is_not_allowed(tiny_model: Path, data: Path, command, tmp_path: Path) -> None:
    begin = ("--train", "--model", str(tiny_model), "--iters", "1", "--batch-size", "2")
    assert command("lora", *begin, "--data", str(data), "--num-layers", "2").returncode == 0
    more = command("lora", *begin, "--data", str(data), "--num-layers", "3", "--resume").stderr
    assert (
        re.search(r"^  so \d+ arrays of the model or the optimizer differ", more, re.M) and "--allow-change" not in more
    )
    assert re.search(r"^  compiled-adam lora .* --num-layers 2$", more, re.M)
    shutil.copytree(data, tmp_path / "fewer")
    lines = (data / "valid.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer" / "valid.jsonl").write_text("".join(lines[:6]))
    other = command("lora", *begin, "--data", "fewer", "--num-layers", "2", "--resume").stderr
    assert re.search(r"^  validation examples +6 +8$", other, re.M), other
    (line,) = re.findall(r"^  compiled-adam (lora .*)$", other, re.M)
    assert "--allow-change 'validation examples'" in line and command(*shlex.split(line)).returncode == 0
