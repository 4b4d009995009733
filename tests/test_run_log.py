from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiled_adam.run_log import RunLog, read


def test_lines_are_json_and_what_will_happen_again_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    log = RunLog(file, keep=0)
    for iteration in (1, 2, 3):
        log.write({"iteration": iteration, "loss": float("nan") if iteration == 2 else 0.5})
    assert [json.loads(line)["loss"] for line in file.read_text().splitlines()] == [0.5, None, 0.5]  # at once
    log.close()
    with open(file, "a") as stream:
        stream.write('{"iteration": 4, "lo')  # killed in the middle of a line
    assert [entry["iteration"] for entry in read(file)] == [1, 2, 3]
    log = RunLog(file, keep=2)
    log.write({"iteration": 3, "loss": 0.25})
    log.close()
    assert read(file) == [
        {"iteration": 1, "loss": 0.5},
        {"iteration": 2, "loss": None},
        {"iteration": 3, "loss": 0.25},
    ]
    RunLog(file, keep=0).close()
    assert read(file) == []


def test_something_else(tmp_path: Path) -> None:
    for content in ("not json\n", "[1]\n", '"x"\n'):
        (tmp_path / "log.jsonl").write_text(content)
        with pytest.raises(ValueError, match="is not the log of a run"):
            read(tmp_path / "log.jsonl")
