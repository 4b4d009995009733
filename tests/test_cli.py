from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import compiled_adam
from compiled_adam.cli import main

DEMO = ("-m", "compiled_adam.cli", "demo", "--iters", "4", "--pretraining", "2")


@pytest.mark.slow
def test_demo_trains_and_its_adapters_generate(run, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(DEMO[2:]) == 0
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"validation loss (\S+) -> (\S+)", printed).groups())
    assert after < before < 7.0
    config = json.loads((tmp_path / "demo/adapters/adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    command = re.search(r"^  mlx_lm\.generate (.*)$", printed, re.M).group(1)
    assert "demo/adapters" in command
    paths = ("--model", "demo/model", "--adapter-path", "demo/adapters")
    generated = run("-m", "mlx_lm", "generate", *paths, "--prompt", "To fine-tune", "-m", "3")
    assert generated.returncode == 0, generated.stderr
    assert "Generation: 3 tokens" in generated.stdout

    assert main(DEMO[2:]) == 0  # its own folder is written anew, with the same result
    again = re.search(r"validation loss (\S+) -> (\S+)", capsys.readouterr().out)
    assert again.groups() == (f"{before:.4f}", f"{after:.4f}")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("mine")
    assert main(DEMO[2:]) == 2
    assert (
        capsys.readouterr().err
        == "compiled-adam: demo exists and is not a demo's folder; name another one with --out\n"
    )
    assert os.listdir(tmp_path / "demo") == ["thesis.txt"]


def test_wrong_flags_and_values(capsys) -> None:
    for arguments, message in (
        ((), "required: COMMAND"),
        (("demo", "--steps", "3"), "unrecognized arguments: --steps"),
        (("demo", "--iters", "many"), "invalid int value: 'many'"),
        (("demo", "--iters", "0"), "iters is 0; it must be at least 1"),
        (("demo", "--seed", "-1"), "seed is -1; it must be in 0 to 4294967295"),
        (("demo", "--out", "/dev/null/x"), "Not a directory"),
    ):
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        errors = capsys.readouterr().err
        assert code == 2 and message in errors and "Traceback" not in errors, arguments


def test_interrupt(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "compiled_adam.cli", "demo", "--pretraining", "100000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "learns from" in process.stdout.readline()
    assert process.stdout.readline().startswith("iter     1")  # and 99 999 more
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "compiled-adam: interrupted"
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_reader_that_leaves(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} {' '.join(DEMO)} | head -n 1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "learns from" in done.stdout
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_version(capsys) -> None:
    try:
        main(["--version"])
    except SystemExit as stop:
        assert stop.code == 0
    assert capsys.readouterr().out == f"compiled-adam {compiled_adam.__version__}\n"
