"""What `python -m bench` has measured is not lost: Ctrl-C, failures, readers that leave, frameworks that fail."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from bench import __main__ as command
from bench import contenders, measure, memory, update
from bench.contenders import DEFAULT

ROOT = Path(__file__).parents[2]


def ends_early(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The second dtype cannot be measured."""
    compare, calls = measure.compare, itertools.count()

    def compared(*arguments: Any) -> Any:
        if next(calls):
            raise error
        return compare(*arguments)

    monkeypatch.setattr(measure, "compare", compared)


def test_ctrl_c_keeps_what_was_measured(bench, small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ends_early(monkeypatch, KeyboardInterrupt())
    file = tmp_path / "record.json"
    code, out, errors = bench("--seconds", "0", "--json", str(file))
    assert code == 130 and "interrupted" in errors and "Traceback" not in errors
    assert "compiled_adam" in out
    record = json.loads(file.read_text())
    assert [row["contender"] for row in record["update"]] == list(DEFAULT)
    assert record["complete"] is False


def test_a_failure_keeps_what_was_measured(bench, small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ends_early(monkeypatch, RuntimeError("out of memory"))
    file = tmp_path / "record.json"
    with pytest.raises(RuntimeError, match="out of memory"):
        bench("--seconds", "0", "--json", str(file))
    record = json.loads(file.read_text())
    assert len(record["update"]) == len(DEFAULT) and record["complete"] is False


def test_quick_begins_nothing_late_and_says_so(bench, small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = itertools.count(0.0, 15.0)  # each stage takes that long
    monkeypatch.setattr(command.time, "monotonic", lambda: next(now))
    file = tmp_path / "record.json"
    code, out, errors = bench("--quick", "--seconds", "0", "--json", str(file))
    assert code == 0 and "--quick ended update before small, bfloat16" in out
    assert errors == "update 1/3: memory bandwidth\nupdate 2/3: small, float32\n"
    record = json.loads(file.read_text())
    assert {row["dtype"] for row in record["update"]} == {"float32"} and record["complete"] is False


def test_parts_before_a_failing_one_are_printed_and_kept(
    bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails() -> list[Any]:
        raise KeyboardInterrupt

    def table(rows: list[Any], environment: Any) -> Table:
        return Table("what was measured")

    rows = [{"a": 1}]
    parts = {name: command.Part([command.Stage(name, fails)], table) for name in ("first", "second", "third")}
    parts["first"] = command.Part([command.Stage("first", lambda: rows)], table)
    monkeypatch.setattr(command, "PARTS", {name: lambda bench, part=part: part for name, part in parts.items()})
    monkeypatch.setattr(command, "_problem", lambda arguments: None)
    file = tmp_path / "record.json"
    code, out, _ = bench("all", "--json", str(file))
    assert code == 130 and out.count("what was measured") == 1
    record = json.loads(file.read_text())
    assert record["first"] == rows and record["complete"] is False


def test_an_earlier_record_stays_until_something_is_measured(bench, small, monkeypatch, tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "bandwidth", interrupted)
    file = tmp_path / "record.json"
    file.write_text("earlier")
    assert bench("--seconds", "0", "--json", str(file))[0] == 130
    assert file.read_text() == "earlier"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """The command as a process, on a workload that takes some time."""
    started: list[subprocess.Popen[str]] = []

    def start(seconds: str, *program: str) -> subprocess.Popen[str]:
        arguments = ["--workload", "1000 x 64", "--dtype", "float32", "--seconds", seconds]
        command = [sys.executable, *(program or ("-m", "bench")), *arguments, "--json", str(tmp_path / "record.json")]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_reader_that_leaves(start, tmp_path: Path) -> None:
    process = start("0")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 0 and "Traceback" not in errors and "Broken" not in errors
    assert json.loads((tmp_path / "record.json").read_text())["complete"]


def test_ctrl_c_in_a_process(start, tmp_path: Path) -> None:
    program = """
import sys
from bench import __main__ as command, measure
in_turn = measure._in_turn
def measuring(*arguments):
    print("measuring", file=sys.stderr, flush=True)
    return in_turn(*arguments)
measure._in_turn = measuring
sys.exit(command.main())
"""
    process = start("60", "-c", program)
    said = [process.stderr.readline() for _ in range(3)]
    assert said[2] == "measuring\n" and (tmp_path / "record.json").exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith("bench: interrupted; what had been measured is kept\n")
    assert "Traceback" not in errors


def test_without_mlx_lm_the_other_parts_are_measured(bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, out, errors = bench("quality")
    assert code == 2 and not out and "pip install 'compiled-adam[lm]'" in errors
    monkeypatch.setattr(command, "PARTS", dict.fromkeys(command.PARTS, lambda bench: command.Part([], Table)))
    file = tmp_path / "record.json"
    code, out, _ = bench("all", "--json", str(file))
    assert code == 0 and out.count("needs mlx-lm") == 2
    record = json.loads(file.read_text())
    assert record["complete"] and "memory" not in record and "needs mlx-lm" in record["step"][0]["skipped"]


def test_a_framework_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(contenders, "find_spec", lambda name: True)
    names = [*DEFAULT, "torch fused"]
    workloads: dict[str, Callable[[], Any]] = {"small": lambda: {"a": (8, 8)}}
    for stages in (
        update.stages(workloads, ["float32"], names, 0.0, {}),
        memory.stages(workloads, ["float32"], names),
    ):
        found = [row for stage in stages for row in stage.rows()]
        assert [row["contender"] for row in found] == names
        assert "torch fails: ImportError: libcudart" in found[-1]["skipped"]
        assert all(row["state_bytes"] for row in found[:-1])


def test_settling_waits_for_threads_that_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    now, computed = [0.0], [0.0]
    spinning_until = 0.0

    def sleep(seconds: float) -> None:
        computed[0] += max(0.0, min(seconds, spinning_until - now[0]))
        now[0] += seconds

    monkeypatch.setattr(measure.time, "sleep", sleep)
    monkeypatch.setattr(measure.time, "process_time", lambda: computed[0])
    for spinning_until, waited in ((0.1, 0.11), (0.0, 0.01), (9.0, 0.5)):
        now[0] = 0.0
        measure.settle()
        assert now[0] == pytest.approx(waited, abs=1e-3), spinning_until


def test_mlx_is_never_measured_right_after_another_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(measure, "settle", lambda: happened.append("settle"))

    class Foreign:
        traces = None

        def update(self) -> None:
            happened.append("foreign")

        def state_bytes(self) -> int:
            return 0

    def stock(parameters: Any, gradients: Any) -> contenders.Contender:
        made = contenders.CONTENDERS["mlx eager"].make(parameters, gradients)
        update = made.update
        made.update = lambda: (happened.append("mlx"), update())  # type: ignore[method-assign]
        return made

    def runner(make: Any) -> Callable[[], measure.Runner]:
        return lambda: measure.Here(make, {"a": measure.mx.ones((8, 8))}, {"a": measure.mx.ones((8, 8))})

    measure.compare({"mlx eager": runner(stock), "foreign": runner(lambda p, g: Foreign())}, 0.05)
    turns = happened[happened.index("settle") - 1 :]
    after = {b for a, b in pairs(turns) if a == "foreign"}
    before = {a for a, b in pairs(turns) if b == "foreign"}
    assert after == {"settle"}
    assert before == {"mlx", "settle"}  # the order changes


def pairs(items: list[str]) -> Iterator[tuple[str, str]]:
    return itertools.pairwise(items)
