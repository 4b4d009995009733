"""Standard output that is closed, full, without a reader, or for ASCII only ends no run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_adam import cli
from compiled_adam.base import streams
from compiled_adam.finetune.console import TrainingProgress

from tests.conftest import ROOT


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


class FullWhenFlushed(io.StringIO):
    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [Full, FullWhenFlushed, closed])
def test_what_cannot_be_written_is_left_out(make) -> None:
    stream = streams.lenient(make())
    for _ in range(2):
        print("text", file=stream, flush=True)
    stream.writelines(["a", "b"])
    assert stream.write("text") == 4  # as if it were written


def test_other_characters_become_escapes() -> None:
    raw = io.BytesIO()
    stream = streams.lenient(io.TextIOWrapper(raw, encoding="ascii", newline="\n"))
    assert stream.write("loss ━ 5 é\n") == 11
    stream.flush()
    assert raw.getvalue() == b"loss \\u2501 5 \\xe9\n"


def test_a_stream_is_wrapped_once_and_keeps_what_it_has() -> None:
    inner = io.StringIO()
    stream = streams.lenient(inner)
    assert streams.lenient(stream) is stream
    print("text", file=stream)
    assert stream.getvalue() == "text\n" and not stream.isatty()  # type: ignore[attr-defined]
    assert streams.lenient(None).write("text") == 4


@pytest.mark.parametrize("make", [Full, FullWhenFlushed, closed, lambda: None])
def test_progress_goes_on(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", make())
    with TrainingProgress(2) as progress:
        progress.line("first ━")
        progress.advance()
        progress.line("second")
    assert progress.completed == 1


def test_the_streams_are_put_back() -> None:
    before = sys.stdout, sys.stderr
    with streams.lenient_streams():
        assert isinstance(sys.stdout, streams.Lenient) and isinstance(sys.stderr, streams.Lenient)
    assert (sys.stdout, sys.stderr) == before


# The command itself. `schedule` prints most, and imports least.

SCHEDULE = ["schedule", "cosine", "1e-3", "100", "--warmup", "10"]


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    "how",
    [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full", "> /dev/full 2>&1", "| head -n 1"],
)
def test_a_command_ends_well_whatever_its_output_is(how: str, tmp_path: Path) -> None:
    if "/dev/full" in how and not os.path.exists("/dev/full"):
        pytest.skip("this system has no full device")
    program = f"{sys.executable} -m compiled_adam.cli {' '.join(SCHEDULE)}"
    done = shell(f"set -o pipefail; {program} {how}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if how == "> /dev/full":
        assert "standard output cannot be written any more ([Errno 28]" in done.stderr


def test_ascii_only(tmp_path: Path) -> None:
    program = f"{sys.executable} -m compiled_adam.cli"
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    assert shell(f"{program} {' '.join(SCHEDULE)}", tmp_path, **ascii_only).returncode == 0
    missing = shell(f"{program} report dossier-é", tmp_path, **ascii_only)
    assert missing.returncode == 2 and "dossier-\\xe9 has no log.jsonl" in missing.stderr, missing.stderr


def test_files_get_no_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Or what is printed would be written into the first file that is opened, a checkpoint for example."""
    code = (
        "import os, sys; from compiled_adam import cli\n"
        "def demo(arguments):\n"
        "    with open('file', 'w') as file:\n"
        "        assert file.fileno() > 2\n"
        "        print('text'); os.write(1, b'text'); os.write(2, b'text'); file.write('own')\n"
        "cli._demo = demo\n"
        "sys.exit(cli.main(['demo']))"
    )
    (tmp_path / "program.py").write_text(code)
    assert shell(f"{sys.executable} program.py <&- >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "file").read_text() == "own"


@pytest.mark.slow
@pytest.mark.parametrize("how", [">&-", "> /dev/full", ">&- 2>&-", "| head -n 1"])
def test_a_run_is_complete_whatever_its_output_is(how: str, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    options = "--train --test --iters 2 --batch-size 2 --num-layers 1 --steps-per-report 1 --adapter-path out --bucket"
    program = f"{sys.executable} -m compiled_adam.cli lora --model {tiny_model} --data {data} {options}"
    done = shell(f"set -o pipefail; {program} {how}", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "adapters.safetensors").exists()


def test_help_and_version_without_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            cli.main([option])
        assert ended.value.code == 0
