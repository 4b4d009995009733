"""`python -m bench` as a command: its tables and records, what it says, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from compiled_adam.base import blas

from bench import __main__ as command
from bench import environment, progress, quality, readme, step, tables, update
from bench.contenders import CONTENDERS, DEFAULT

ENVIRONMENT = {"mlx": "0", "device": "Device(cpu, 0)", "cores": 2, "blas": "?"}
# The fields of a record: a reader of one may rely on these. If a field goes or changes its meaning, SCHEMA goes up.
FIELDS = {
    "workload": str, "dtype": str, "contender": str, "tensors": int, "parameters": int,
    "median_ms": float, "p10_ms": float, "p90_ms": float, "rounds": int,
    "ratio": float, "ratio_p10": float, "ratio_p90": float, "ratio_noisy": bool,
    "compiled_ratio": float, "compiled_ratio_p10": float, "compiled_ratio_p90": float, "compiled_ratio_noisy": bool,
    "ns_per_parameter": float, "us_per_tensor": float, "required_bytes": int, "bandwidth_percent": float,
    "peak_extra_bytes": int, "state_bytes": int, "state_bytes_per_parameter": float,
    "traces": int, "trace_ms": float, "first_call_ms": float,
    "kernels": int,
}  # fmt: skip


@pytest.mark.slow
def test_command_writes_a_table_and_a_record(run, tmp_path: Path) -> None:
    done = run(
        "-m", "bench", "--workload", "448 x (8x1024)", "--dtype", "float32", "--seconds", "0", "--json", "record.json"
    )
    assert done.returncode == 0, done.stderr
    assert "compiled_adam" in done.stdout and "ns/param" in done.stdout
    for said in ("with bias correction", "same gradients", "when parameters and state are computed", "noisy: the p10"):
        assert said in " ".join(done.stdout.split())
    record = json.loads((tmp_path / "record.json").read_text())
    assert [row["contender"] for row in record["update"]] == list(DEFAULT)
    assert all(row["median_ms"] > 0 and row["rounds"] >= 5 for row in record["update"])
    assert 1e8 < record["bandwidth"]["best"] < 1e14
    kernels = {row["contender"]: row["kernels"] / row["tensors"] for row in record["update"] if row["kernels"]}
    assert kernels["mlx compiled"] == pytest.approx(1, abs=0.05) and kernels["mlx eager"] > 20


def test_schema_of_a_record(bench, small, tmp_path: Path) -> None:
    code, _, _ = bench("--seconds", "0", "--json", str(tmp_path / "record.json"))
    assert code == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["schema"] == environment.SCHEMA == 3
    assert record.keys() == {"schema", "command", "environment", "complete", "bandwidth", "update"}
    assert record["complete"] is True
    assert record["environment"].keys() >= {
        "date", "device", "device_info", "system", "cores", "memory_bytes", "load_average", "busy", "python", "mlx",
        "compiled_adam", "versions", "blas", "commit",
    }  # fmt: skip
    for row in record["update"]:
        assert {name: type(value) for name, value in row.items() if value is not None} == {
            name: kind for name, kind in FIELDS.items() if row[name] is not None
        }
        none = {name for name, value in row.items() if value is None}
        # Stock MLX traces nothing. A step has computed its update when it returns, so no graph is left to look at.
        expected = {"mlx eager": {"traces"}, "compiled_adam step": {"kernels", "trace_ms"}}
        assert none == expected.get(row["contender"], set())


def test_readme_tables_from_records_of_this_schema(
    bench, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "WORKLOADS", ("small",))
    bench("--seconds", "0", "--json", str(tmp_path / "record.json"))
    record = json.loads((tmp_path / "record.json").read_text())
    record["update"].append(
        {"workload": "small", "dtype": "float32", "contender": "mlx eager", "skipped": "not installed"}
    )
    absent = {"workload": "Qwen", "dtype": "", "contender": "", "skipped": "mlx_lm missing"}
    record["update"].append(absent)
    ours, torch = record["update"][3], {**record["update"][3], "contender": "torch fused"}
    record["update"].append(torch | {"median_ms": ours["median_ms"] / 2})
    ours |= {"ratio": 0.25, "ratio_noisy": False, "compiled_ratio": 7.5, "compiled_ratio_noisy": True}
    lines = readme.update_table(record).splitlines()
    assert lines[2].endswith("| 0.25 | 7.50 (noisy) | 2.0 |")
    assert len(lines) == 2 + 2 and lines[2].startswith("| small | float32 |")
    assert lines[3].endswith("| - |") and lines[3].count(" - ") == 2
    runs = [
        {"policy": policy, "dtype": dtype, "seed": seed, "eval_loss": 1.5 + seed, "state_bytes_per_parameter": 4.06}
        for dtype in ("float32", "bfloat16")
        for policy in readme.POLICIES
        for seed in (0, 1)
    ]
    lines = readme.quality_table({"quality": runs}).splitlines()
    assert len(lines) == 2 + len(readme.POLICIES)
    assert lines[2] == "| mlx | 4.06 | 2.0000 (1.5000-2.5000) | 4.06 | 2.0000 (1.5000-2.5000) |"


def test_readme_needs_a_place_for_each_table() -> None:
    with pytest.raises(ValueError, match="0 places for the update table"):
        readme.rendered("no markers", ["update"])


def test_a_missing_framework_is_one_line(bench, small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.contenders.find_spec", lambda name: None)
    code, out, _ = bench("--seconds", "0", "--contender", "all", "--json", str(tmp_path / "record.json"))
    assert code == 0
    assert out.count("torch and numpy not installed") == 1
    rows = json.loads((tmp_path / "record.json").read_text())["update"]
    assert {row["contender"] for row in rows} == set(CONTENDERS)
    skipped = {row["contender"] for row in rows if "skipped" in row and row["dtype"] == "bfloat16"}
    assert skipped == {name for name, entry in CONTENDERS.items() if entry.needs}


def row_with(**values: Any) -> dict[str, Any]:
    row = {"workload": "w", "dtype": "float32", "contender": "c", "tensors": 2, "parameters": 10}
    row |= {name: 1.0 for name in FIELDS if name not in row}
    return row | {"ratio_noisy": False, "compiled_ratio_noisy": False, "ratio_p10": 0.5} | values


def test_noisy_is_said_where_it_is_and_in_a_line() -> None:
    quiet, loud = row_with(), row_with(ratio_noisy=True)
    assert "noisy" in tables.ratio(loud, "ratio") and "noisy" not in tables.ratio(loud, "compiled_ratio")
    assert tables.warning([quiet]) is None
    absent = {"workload": "w", "dtype": "float32", "contender": "c", update.NOT_MEASURED: "not installed"}
    assert (tables.warning([quiet, loud, absent]) or "").startswith("warning: 1 of 2 rows are noisy")


def test_memory(bench, small, tmp_path: Path) -> None:
    code, out, _ = bench("memory", "--json", str(tmp_path / "record.json"))
    assert code == 0 and "extra/weights" in out
    rows = json.loads((tmp_path / "record.json").read_text())["memory"]
    found = {(row["dtype"], row["contender"]): row.get("state_bytes_per_parameter") for row in rows}
    assert found["float32", "compiled_adam"] == 8 and found["bfloat16", "compiled_adam"] == 10
    assert found["bfloat16", "mlx eager"] == 4
    assert {contender for _, contender in found} == {name for name, entry in CONTENDERS.items() if not entry.needs}


def text_of(table: Any) -> str:
    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def a_quality_record() -> list[dict[str, Any]]:
    return [
        {"policy": policy, "dtype": dtype, "seed": seed, "steps": 3, "eval_loss": loss,
         "parameters": 9, "state_bytes_per_parameter": 8.0}
        for dtype, policy, loss in (("float32", "float32", 1.5), ("bfloat16", "mlx", 1.75))
        for seed in (0, 1)
    ]  # fmt: skip


def test_quality_table_says_what_bfloat16_costs() -> None:
    text = text_of(quality.table(a_quality_record(), ENVIRONMENT))
    assert "+0.2500" in text and "1.7500" in text


def test_a_table_of_runs_that_ended_early() -> None:
    rows = a_quality_record()[:-1]
    table = quality.table(rows, {"mlx": "0"})
    assert [list(column.cells)[-1] for column in table.columns][2:6] == ["1.7500", "-", "-", "-"]


@pytest.mark.parametrize(
    ("slow", "device", "hint"), [(True, mx.cpu, True), (True, mx.gpu, False), (False, mx.cpu, False)]
)
def test_hint_about_the_reference_blas(slow: bool, device, hint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "is_slow", lambda: slow)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    assert ("doctor" in (environment.blas_hint() or "")) == hint


def test_step_and_quality_give_the_hint(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dict.fromkeys(("tokens_per_second", "positions_per_token", "supervised", "shapes", "peak_bytes"), 1.0)
    monkeypatch.setattr(command, "blas_hint", lambda: "Get a better one.")
    monkeypatch.setattr(step.jobs, "make", lambda *_: None)
    monkeypatch.setattr(step, "_run", lambda name, job, *_: [{"job": job, "contender": name, **run}])
    code, out, errors = bench("step", "--quick")
    assert code == 0 and out.count("Get a better one.") == 1
    assert "1.00-1.00)" in out and "step 12/12: round 2, mixed lengths, prompts masked" in errors
    monkeypatch.setattr("bench.quality.train", lambda *arguments: a_quality_record()[0])
    code, out, _ = bench("quality", "--quick", "--dtype", "float32")
    assert code == 0 and out.count("Get a better one.") == 1


def test_all_runs_every_part(bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = a_quality_record()
    part = command.Part([command.Stage("all", lambda: rows)], quality.table)
    monkeypatch.setattr(command, "PARTS", dict.fromkeys(command.PARTS, lambda bench: part))
    file = tmp_path / "record.json"
    code, _, errors = bench("all", "--json", str(file))
    assert code == 0
    assert errors.splitlines() == [f"{name} 1/1: all" for name in ("update", "step", "memory", "quality", "numerics")]
    assert {*command.PARTS, "schema", "environment"} <= json.loads(file.read_text()).keys()


@pytest.mark.parametrize("load, busy", [(0.9, False), (1.1, True)])
def test_the_first_line_says_whether_the_machine_is_busy(
    bench, small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: float, busy: bool
) -> None:
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(environment, "cores", lambda: 2)
    _, out, _ = bench("memory", "--dtype", "float32", "--json", str(tmp_path / "record.json"))
    said = {False: "quiet enough to measure", True: "too busy to measure, times will be wrong; end other programs"}
    assert out.startswith(f"load {load} on 2 cores: {said[busy]}")
    found = json.loads((tmp_path / "record.json").read_text())["environment"]
    assert (found["load_average"], found["busy"]) == (load, busy)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.Progress("memory", 2) as shown:
        shown.begin("small, float32")
        shown.begin("small, bfloat16")
    errors = capsys.readouterr().err
    assert "1/2" in errors and "small, bfloat16" in errors and "memory 1/2" not in errors


def test_a_model_that_cannot_be_measured(
    bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    config = tmp_path / "config.json"
    for wrong in ({"model_type": "nonsense"}, {"model_type": "llama", "hidden_size": 64}):
        config.write_text(json.dumps(wrong))
        code, out, errors = bench("--model", str(tmp_path))
        assert code == 2 and not out and "mlx-lm makes no model of this config.json" in errors
    config.write_text((tiny_model / "config.json").read_text())
    code, _, errors = bench("step", "--model", str(tmp_path))
    assert code == 2 and "has no weights" in errors
    # From inside its folder a model has the folder's name.
    monkeypatch.chdir(tmp_path)
    arguments = command._parser().parse_args(["--model", "."])
    assert command._problem(arguments) is None
    assert list(arguments.workloads_of_model) == [f"{tmp_path.name} LoRA r=8", tmp_path.name]


def test_options_given_twice_or_as_zero_mean_what_they_say(bench, small, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, errors = bench("--seconds", "0", "--dtype", "float32", "--dtype", "float32")
    assert code == 0 and errors.count("small, float32") == 1
    asked = []
    monkeypatch.setattr(update, "stages", lambda *arguments: asked.append(arguments[3]) or [])
    for arguments in (["--seconds", "0"], ["--quick"], []):
        assert bench(*arguments)[0] == 0
    assert asked == [0.0, 2.0, 20.0]


def test_wrong_arguments_in_a_process_of_its_own(run) -> None:
    done = run("-m", "bench", "--workload", "huge")
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "missing/folder/x.json"],
        ["--seconds", "soon"],
        ["--seconds", "-1"],
        ["--seconds", "nan"],
        ["--contender", "nobody"],
        ["--dtype", "float64"],
        ["--model", "/missing/folder"],
        ["--model", "."],
        ["quality", "--steps", "0"],
        ["numerics", "--contender", "all"],
        ["update", "--steps", "5"],
        ["step", "--seconds", "0"],
        ["--json", "."],
        ["faster"],
    ],
)
def test_wrong_arguments(bench, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, errors = bench(*arguments)
    assert code == 2 and not out and errors.startswith("bench: ") and errors.count("\n") == 1
