"""Writers that are killed: the folder has the old checkpoint or the new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import compiled_adam as ca
import pytest
from compiled_adam.checkpoint import durable, series

from tests.conftest import ROOT
from tests.written_folders import load, save, write

CHILD = """
import sys, time
from pathlib import Path
from compiled_adam.checkpoint import durable
from tests.checkpoint.test_folders import save

def wait(*_):
    print("now", flush=True)
    time.sleep(600)

setattr(durable, sys.argv[2], wait)
save(Path(sys.argv[1]), 2)
"""


def killed_in(function: str, folder: Path, *meanwhile) -> None:
    """A process that saves a checkpoint of value 2, and is killed when it calls a function of `durable`."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), function],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        for check in meanwhile:
            check()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_killed_between_the_two_renamings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run / "000050", 1)
    killed_in("_renamed", run / "000050")
    assert "000050" not in os.listdir(run)
    (tmp_path / "link").symlink_to(run / "000050")
    (tmp_path / "runs").symlink_to(run)
    (run / "000040").symlink_to(run / "000050")
    for folder in (run / "000050", tmp_path / "link", tmp_path / "runs" / "000050", run / "000040"):
        assert load(folder) == 1
    for folder in (run, tmp_path / "runs"):
        assert ca.latest_checkpoint(folder) == folder / "000050" and load(ca.latest_checkpoint(folder)) == 1
    assert series.numbered(run) == [run / "000040", run / "000050"]
    (run / "000040").unlink()
    # Whoever goes on, by a link or not, saves the next one and prunes: nothing is left over, and nothing lost.
    save(tmp_path / "link", 3)
    assert load(run / "000050") == 3 and os.listdir(run) == ["000050"]


def test_what_is_left_between_two_renamings_is_pruned_like_others(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        save(tmp_path / str(value), value)
    (tmp_path / "1").rename(tmp_path / ".1.old")
    assert series.prune(tmp_path, 3) == [] and load(tmp_path / "1") == 1
    (tmp_path / "2").rename(tmp_path / ".2.old")
    save(tmp_path / "2", 4)
    (tmp_path / ".3.old").mkdir()  # killed just before it was gone
    assert durable.present(tmp_path / "3") == tmp_path / "3"
    assert series.prune(tmp_path, 2) == [tmp_path / "1"]
    assert sorted(os.listdir(tmp_path)) == ["2", "3"] and load(tmp_path / "2") == 4


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run / "1", 1)

    def lives() -> None:
        (partial,) = run.glob(".*.partial")
        save(run / "2", 3)
        assert series.prune(run, 5) == []
        assert (partial / "meta.json").exists()

    killed_in("flush", run / "2", lambda: None)
    assert len(list(run.glob(".2.*.partial"))) == 1
    killed_in("_put", run / "2", lives)
    assert load(run / "2") == 3 and len(list(run.glob(".2.*.partial"))) == 1
    (run / ".0000007.partial").mkdir()  # of version 0.1
    series.prune(run, 5)
    assert sorted(os.listdir(run)) == ["1", "2"]


def test_a_leftover_goes_with_the_next_save(tmp_path: Path) -> None:
    for name in (f".last.{'0' * 16}.partial", f".last.more.{'0' * 16}.partial", ".last.partial", ".mine.partial"):
        (tmp_path / name).mkdir()
    write(tmp_path / "last", "1")
    assert sorted(os.listdir(tmp_path)) == [f".last.more.{'0' * 16}.partial", ".mine.partial", "last"]


def test_another_process_prunes_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in range(5):
        save(tmp_path / str(value), value)
    real = series.discard

    def discard(path: Path) -> bool:
        if path.name == "1":
            monkeypatch.setattr(series, "discard", real)
            assert series.prune(tmp_path, 2) == [tmp_path / "1", tmp_path / "2"]
        return real(path)

    monkeypatch.setattr(series, "discard", discard)
    assert series.prune(tmp_path, 2) == [tmp_path / "0"]
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]
    assert series.prune(tmp_path / "none", 2) == []
