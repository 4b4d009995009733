from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from compiled_adam.finetune.log import RunLog, is_log, read


def test_lines_are_json_and_what_will_happen_again_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    log = RunLog(file, 0, warn=pytest.fail)
    for iteration in (1, 2, 3):
        log.write({"iteration": iteration, "loss": float("nan") if iteration == 2 else 0.5})
    assert [json.loads(line)["loss"] for line in file.read_text().splitlines()] == [0.5, None, 0.5]  # at once
    log.close()
    with open(file, "a") as stream:
        stream.write('{"iteration": 4, "lo')  # killed in the middle of a line
    assert [entry["iteration"] for entry in read(file)] == [1, 2, 3]
    log = RunLog(file, 2, warn=pytest.fail)
    log.write({"iteration": 3, "loss": 0.25})
    log.close()
    assert read(file) == [
        {"iteration": 1, "loss": 0.5},
        {"iteration": 2, "loss": None},
        {"iteration": 3, "loss": 0.25},
    ]
    RunLog(file, 0, warn=pytest.fail).close()
    assert read(file) == []


def test_something_else(tmp_path: Path) -> None:
    for content in ("not json\n", "[1]\n", '"x"\n'):
        (tmp_path / "log.jsonl").write_text(content)
        with pytest.raises(ValueError, match="is not the log of a run"):
            read(tmp_path / "log.jsonl")


def test_lines_that_cannot_be_read_are_set_aside(tmp_path: Path) -> None:
    file, said = tmp_path / "log.jsonl", []
    damaged = b'{"iteration": 1, "loss": 1.0}\n\xff\x00\x00\n{"iteration": 2, "loss": 2.0}\n'
    file.write_bytes(damaged)
    RunLog(file, 2, said.append).close()
    assert [entry["loss"] for entry in read(file)] == [1.0, 2.0]
    assert (tmp_path / "damaged-log.jsonl").read_bytes() == damaged
    assert said == [
        f"1 lines of {file} cannot be read; it is {tmp_path / 'damaged-log.jsonl'} now, and the others are kept"
    ]


def test_lines_of_wrong_types_are_set_aside_too(tmp_path: Path) -> None:
    """When a run goes on, what it cannot place must not end it."""
    file, said = tmp_path / "log.jsonl", []
    file.write_text('{"iteration": "2", "loss": 1.0}\n{"iteration": 1, "loss": 1.0}\n[["iteration", 1]]\n{"loss": 2}\n')
    RunLog(file, 2, said.append).close()
    assert read(file) == [{"iteration": 1, "loss": 1.0}]
    assert said[0].startswith(f"3 lines of {file} cannot be read")


@pytest.mark.parametrize("keep", [0, 2])
def test_a_log_that_is_no_file_is_said_and_left(keep: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")  # which would be waited for
    said: list[str] = []
    log = RunLog(tmp_path / "log.jsonl", keep, said.append)
    log.write({"iteration": 1})
    log.close()
    assert len(said) == 1 and "cannot be written any more" in said[0] and "is a pipe" in said[0]
    assert (tmp_path / "log.jsonl").is_fifo() and not is_log(tmp_path / "log.jsonl")
    assert list(tmp_path.iterdir()) == [tmp_path / "log.jsonl"]


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    log = RunLog(tmp_path / "log.jsonl", 0, said.append)
    log._stream.close()
    log._stream = open("/dev/full", "a")  # noqa: SIM115
    for _ in range(3):
        log.write({"iteration": 1})
    log.close()
    assert len(said) == 1 and "cannot be written any more" in said[0] and "No space left" in said[0]


@pytest.mark.parametrize("text", ["mine\nmine too\n", "mine", '{"mine": 1}\n'])
@pytest.mark.parametrize("keep", [0, 3])
def test_a_file_that_is_no_log_is_kept(text: str, keep: int, tmp_path: Path) -> None:
    file, said = tmp_path / "log.jsonl", []
    file.write_text(text)
    RunLog(file, keep, said.append).close()
    assert (tmp_path / "damaged-log.jsonl").read_text() == text and file.read_text() == ""
    assert len(said) == 1 and "damaged-log.jsonl now" in said[0]
