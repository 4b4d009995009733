"""The screen of a run, as a terminal emulator draws it; and what a pipe and a notebook get instead."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import compiled_adam as ca
import numpy as np
import pytest
from compiled_adam import cli
from compiled_adam.commands import lora as lora_command
from compiled_adam.finetune import console, padding, screen, table, trainer
from compiled_adam.finetune.batches import Batches
from compiled_adam.finetune.chunked import ChunkedLoss
from compiled_adam.finetune.console import TrainingProgress, stage
from compiled_adam.finetune.screen import RunScreen

from tests import tiny_runs
from tests.commands.test_lora_command import job
from tests.terminal import Terminal, terminal
from tests.tiny_runs import stop_after

FACTS = [("model", "mlx-community/Qwen3-0.6B-4bit"), ("results", "unlike mlx_lm.lora: batches of similar length")]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "machine_memory", lambda: 34e9)


class Clock:
    """Ten seconds for each step."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def still(progress: TrainingProgress) -> TrainingProgress:
    """Without the thread that draws the bar from time to time."""
    progress._live.auto_refresh = False
    return progress


def info(iteration: int, loss: float, **more: object) -> dict:
    figures = {"iteration": iteration, "train_loss": loss, "learning_rate": 1e-5, "tokens_per_second": 1349.4}
    more = {"trained_tokens": 12_345 * iteration, "peak_memory": 0.512, "grad_norm": 1.2345, "skipped_steps": 0, **more}
    return {**figures, "traces": 3, "iterations_per_second": 0.1, **more}


def a_run(shown: Terminal | None = None, narrow: int | None = None) -> None:
    """A box, and four reports of a run of 200 iterations; before the third the window becomes ``narrow``."""
    clock = Clock()
    with still(TrainingProgress(200, clock=clock)) as progress:
        seen = RunScreen(progress, per_epoch=27)
        seen.box("compiled-adam lora", FACTS)
        seen.validation(1, 6.2513, 0.61, best=True)
        for place, loss in enumerate((5.6618, 5.5, 5.7, float("nan")), start=1):
            for _ in range(10):
                clock.now += 10.0
                progress.advance()
            if place == 3 and narrow is not None:
                assert shown is not None
                shown.resize(narrow)
            seen.report(info(10 * place, loss, trained_tokens=12_345 * place, skipped_steps=int(place == 4)))
        seen.validation(40, 5.4, 0.61, best=True)
        progress._live.refresh()  # as four times a second
        progress.line("40 of 200 iterations in 6.7 min; best 5.4000 at 40 -> adapters/best", "bold")


def columns(lines: list[str]) -> tuple[list[str], list[list[str]]]:
    """The names of a table and its training reports; every number must end where the name of its column ends."""
    (heading,) = [i for i, line in enumerate(lines) if line.startswith("  iter")]
    names = lines[heading].split()
    ends = [match.end() for match in re.finditer(r"\S+", lines[heading])]
    found = []
    for line in lines[heading + 1 :]:
        if not re.match(r" +\d+ ", line) or " val" in line:
            continue
        cells = {m.end(): m.group() for m in re.finditer(r"\d\S*/\S+ GB|[^\s▲▼v^]+", line)}
        assert set(ends) == set(cells), line
        found.append([cells[end] for end in ends])
    return names, found


@pytest.mark.parametrize(
    ("width", "names"),
    [
        (120, "iter epoch loss lr norm tokens/s tokens memory left"),
        (80, "iter loss lr norm tokens/s memory left"),
        (40, "iter loss tokens/s left"),
    ],
)
def test_a_table_with_the_columns_that_fit(width: int, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, width) as shown:
        a_run()
    lines = shown.close()
    found, rows = columns(lines)
    assert found == names.split()
    cells = {name: [row[i] for row in rows] for i, name in enumerate(found)}
    assert cells["iter"] == ["10", "20", "30", "40"]
    assert cells["loss"] == ["5.6618", "5.5000", "5.7000", "nan"]
    assert cells["left"] == ["31:40", "30:00", "28:20", "26:40"]  # of 190 ... 160 steps, ten seconds each
    assert [re.findall("[▲▼]", line) for line in lines if re.match(r" +[23]0 ", line)] == [["▼"], ["▲"]]
    if "memory" in cells:
        assert cells["memory"] == ["0.51/34 GB"] * 4 and cells["lr"] == ["1.00e-05"] * 4
    if "epoch" in cells:
        assert cells["epoch"] == ["0.37", "0.74", "1.11", "1.48"] and cells["tokens"][3] == "49.4k"
    # Validations stand in the same columns, and are told apart by words.
    for iteration, loss in ((1, "6.2513"), (40, "5.4000")):
        assert any(re.fullmatch(rf" +{iteration}( +\d\.\d\d)? +{loss} +val  best  0.6 s", line) for line in lines)
    assert lines[0].startswith("╭─ compiled-adam lora ─") and len(lines[0]) == width
    assert all(len(line) == width and line[0] + line[-1] == "││" for line in lines[1:3])
    # The bar is gone, and what the run came to is whole.
    text = " ".join(lines)
    assert "━" not in text and "train" not in text
    assert text.endswith("40 of 200 iterations in 6.7 min; best 5.4000 at 40 -> adapters/best")
    assert "1 updates skipped so far: a gradient was not finite" in text


@pytest.mark.parametrize(("width", "narrow"), [(120, 60), (60, 120), (120, 24)])
def test_a_window_is_resized_while_the_run_goes_on(width: int, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, width) as shown:
        a_run(shown, narrow)
    lines = shown.close()
    headings = [i for i, line in enumerate(lines) if line.startswith("  iter")]
    assert len(headings) == 2  # one for the new width
    names, rows = columns(lines[headings[1] :])
    assert [row[0] for row in rows] == ["30", "40"] and (narrow < 60 or "left" in names)
    assert all(len(line) < narrow for line in lines[headings[1] :] if re.match(r" +\d", line))
    assert "━" not in " ".join(lines[headings[1] :])  # no piece of a bar stays


def bars(width: int, monkeypatch: pytest.MonkeyPatch, **more: str) -> str:
    with terminal(monkeypatch, width, **more) as shown:
        clock = Clock()
        with still(TrainingProgress(200, clock=clock)) as progress:
            for _ in range(120):
                clock.now += 10.0
                progress.advance()
            progress.best, progress.doing = "best 5.6618 at 100", "validating 12/25"
            progress._live.refresh()
            shown.resize(width)  # when it is drawn
            with shown._read:
                line = shown._screen.display[0].rstrip()
    shown.close()
    return line


def test_a_bar_is_one_line_of_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bars(80, monkeypatch).endswith(" 120/200  validating 12/25  13:20 left  best 5.6618 at 100")
    assert bars(60, monkeypatch).endswith(" 120/200  validating 12/25  13:20 left")
    assert re.fullmatch("train ━+[╸╺]?━* 120/200  validating 12/25", bars(40, monkeypatch))
    assert re.fullmatch("train ━+[╸╺]?━* 120/200", bars(20, monkeypatch))
    # Without colours, what is done and what is not are other characters.
    assert re.fullmatch("train ━+╸? +120/200  validating 12/25", bars(40, monkeypatch, NO_COLOR="1"))
    bars(40, monkeypatch, LANG="C").encode("ascii")


def test_colours_and_their_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    def colours(**environment: str) -> set[bytes]:
        with terminal(monkeypatch, 100, **environment) as shown:
            a_run()
        assert columns(shown.close())[1]
        return {code for codes in re.findall(rb"\x1b\[([\d;]*)m", shown.raw) for code in codes.split(b";")}

    assert {b"32", b"33", b"31", b"35"} <= colours()  # green, yellow, red, magenta
    assert colours(NO_COLOR="1") <= {b"0", b"1", b"2"}  # bold and dim are no colours


@pytest.mark.parametrize("environment", [{"encoding": "ascii"}, {"LANG": "C"}, {"LC_ALL": "C", "LANG": "en_US.UTF-8"}])
def test_a_terminal_for_ascii_only(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80, **environment) as shown:
        a_run()
    lines = shown.close()
    shown.raw.decode("ascii")
    assert lines[0].startswith("+- compiled-adam lora ---") and "\\u" not in " ".join(lines)
    assert [re.findall(r"\d ([v^]) ", line) for line in lines if re.match(r" +[23]0 ", line)] == [["v"], ["^"]]


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80, TERM="dumb") as shown:
        a_run()
    text = " ".join(shown.close())
    assert b"\x1b" not in shown.raw and "train " not in text
    assert all(number in text for number in ("loss 5.6618", "peak 0.51/34 GB", "left 26:40"))


def test_a_pipe_gets_aligned_lines(capsys: pytest.CaptureFixture[str]) -> None:
    a_run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{name:<10} {value}" for name, value in FACTS]
    assert "iter     1  validation loss 6.2513  best  0.6 s" in lines
    reports = [line for line in lines if "tokens/s" in line]
    assert reports[0] == (
        "iter    10  loss 5.6618   lr 1.00e-05  norm 1.234       1,349 tokens/s  peak 0.51/34 GB"
        "  epoch 0.37  left 31:40"
    )
    for word in ("loss", "lr", "norm", "tokens/s", "peak", "epoch", "left"):
        assert len({line.index(word) for line in reports}) == 1, word


def test_what_takes_long_is_named_with_its_time(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clock = Clock()

    def stages() -> None:
        for seconds in (0.9, 75.0):
            with stage(f"loading {seconds}", clock):
                clock.now += seconds
        with TrainingProgress(2, clock=clock) as progress:
            for seconds in (0.9, 22.0):
                with progress.stage(f"compiling {seconds}"):
                    assert progress.doing
                    clock.now += seconds
                assert not progress.doing

    stages()
    said = ["loading 0.9", "loading 75.0", "loading 75.0: 1.2 min", "compiling 22.0: 22.0 s"]
    assert capsys.readouterr().out.splitlines() == said
    with terminal(monkeypatch, 80) as shown:
        stages()
    assert shown.close() == said[2:]  # the names stood there only for so long
    assert b"loading 0.9" in shown.raw


def test_numbers_of_any_size_keep_their_columns() -> None:
    for loss in (0.0, 11.93, 999.99999, 1e30, float("inf"), -1.0):
        assert len(table.loss(loss)) <= table.WIDTHS["loss"] - 2
    for norm in (None, 0.0, 1e-12, 999.9994, 1e30, float("nan")):
        assert len(table.norm(norm)) <= table.WIDTHS["norm"]
    for seconds in (None, 0, 59.9, 3599.9, 359_000, 1e9):
        assert len(table.left(seconds)) <= table.WIDTHS["left"] + 2  # "11574 days" is not a training
    for tokens in (0, 999, 999_949, 12e9):
        assert len(table.count(tokens)) <= table.WIDTHS["tokens"]
    assert len(table.memory(100.0, 512.0)) <= table.WIDTHS["memory"]


# The command.


@pytest.mark.parametrize("width", [120, 80, 40])
def test_the_command_on_a_terminal(
    width: int, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_LONG", 1e9)  # seconds; on a slow machine other lines would come
    more = ("--save-best", "--steps-per-eval", "4")
    with terminal(monkeypatch, width) as shown:
        assert cli.main(["lora", *job(tiny_model, data, "out", *more)]) == 0
    lines = shown.close()
    assert lines[0].startswith("╭─ compiled-adam lora")  # the names of what was done before are gone
    assert [row[0] for row in columns(lines)[1]] == list("12345678")
    text = " ".join(line.strip("│ ") for line in lines)
    text = " ".join(text.split())
    for words in (
        "24 examples, 8 for validation",
        "adam, learning rate 0.001",
        "lora of rank 8, 2 layers: 22,528 of 279,104 parameters (8.07 %)",
        "unlike mlx_lm.lora: batches of similar length",
        "8 iterations = 0.667 epochs of 12 batches",
    ):
        assert words in text
    best = json.loads((tmp_path / "out" / "best" / "best.json").read_text())
    assert re.search(
        rf"8 iterations in [\d.]+ \w+; best {best['val_loss']:.4f} at {best['iteration']} -> out/best try: mlx_lm", text
    )
    # The terminal wraps the command, which has no line breaks of its own, so that it can be copied.
    command = "".join(lines[next(i for i, line in enumerate(lines) if line.startswith("try:")) :])
    assert "--adapter-path out/best --prompt" in re.sub(r"\s+", " ", command) or width == 40
    assert f"mlx_lm.generate --model {tiny_model} --adapter-path out/best --prompt".encode() in shown.raw


def test_a_run_that_is_stopped_says_how_to_go_on(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command
) -> None:
    monkeypatch.setattr(lora_command, "get_reporting_callbacks", lambda *_, **__: stop_after(3))
    words = ["lora", *job(tiny_model, data, "out", "--save-best")]
    stopped = command(*words)
    assert stopped.returncode == 130 and "stopped by SIGINT after iteration 3" in stopped.stderr
    assert re.search(r"^3 of 8 iterations in .*; best .* at 1 -> out/best$", stopped.stdout, re.M)
    (typed,) = re.findall(r"^to go on: compiled-adam (.*)$", stopped.stdout, re.M)
    assert typed == " ".join([*words, "--resume"])
    again = command(*typed.split())
    assert again.returncode == 0 and "to go on" not in again.stdout, again.stderr
    assert re.search(r"^8 iterations, 5 of them now, in .*; best .* at \d -> out/best$", again.stdout, re.M)


def test_an_earlier_run_is_put_aside_whole(tiny_model: Path, data: Path, tmp_path: Path, command) -> None:
    words = ["lora", *job(tiny_model, data, "out", "--iters", "2")]
    first = command(*words, "--save-best", "--report")
    assert first.returncode == 0 and "report -> out/report.html\ntry: " in first.stdout
    assert command(*words).returncode == 0  # which keeps no best weights, and draws no report
    aside = tmp_path / "out" / "previous-1"
    assert {path.name for path in aside.iterdir()} == {"checkpoints", "log.jsonl", "run.json", "best", "report.html"}
    assert {path.name for path in (aside / "best").iterdir()} >= {"adapters.safetensors", "best.json"}
    assert not (tmp_path / "out" / "best").exists() and not (tmp_path / "out" / "report.html").exists()


def test_too_many_shapes_are_told_once(tiny_model: Path, data: Path, tmp_path: Path, command) -> None:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    folder = tmp_path / "lengths"
    folder.mkdir()
    texts = [json.dumps({"text": row["text"] * (1 + i % 3)}) for i, row in enumerate(rows[:12])]
    (folder / "train.jsonl").write_text("\n".join(texts))
    (folder / "valid.jsonl").write_text("\n".join(texts[:4]))
    done = command("lora", *job(tiny_model, folder, "out", "--max-traces", "1"))
    (warning,) = re.findall(r"^warning: .* graphs were compiled, and \d of them dropped.*$", done.stdout, re.M)
    assert "more batch shapes than max_traces (--max-traces)" in warning
    assert "traces" not in command("lora", *job(tiny_model, folder, "out")).stdout.replace("--max-traces", "")


def test_only_traces_without_a_cause_are_told(tiny_model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    model, chance = tiny_runs.lora(tiny_model), np.random.default_rng(0)
    # All of one length, but the batches have from 4 to 38 targets, which are several sizes of the rows.
    offsets = (18, 12, 1)
    examples = tiny_runs.Tokens((chance.integers(1, 500, 20).tolist(), offsets[i % 3]) for i in range(12))
    batches = partial(Batches, padding=padding.spaced(), group_by_length=True)

    def output(loss: object) -> str:
        args = tiny_runs.arguments(tmp_path, iters=6)
        ca.train(model, ca.Adam(1e-3), examples, args=args, loss=loss, iterate_batches=batches)
        return capsys.readouterr().out

    chunked = ChunkedLoss(model)
    assert "graphs were compiled" not in output(chunked)
    monkeypatch.setattr(trainer, "most_traces", lambda loss, shapes: shapes)
    assert re.search(
        "warning: [2-6] graphs were compiled, but the batches need at most 1: each takes time", output(chunked)
    )


# A notebook.


@pytest.mark.slow
def test_a_notebook_has_one_output(tiny_model: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    code = (
        "import sys; sys.path.insert(0, 'ROOT')\n"
        "import compiled_adam as ca\nfrom pathlib import Path\nfrom tests import tiny_runs\n"
        "history = tiny_runs.train(Path('MODEL'), Path('.'), val=True)"
    ).replace("ROOT", str(Path(__file__).parents[2]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code.replace("MODEL", str(tiny_model)))])
    resources = {"metadata": {"path": str(tmp_path)}}
    kernel = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources)
    kernel.execute()
    (output,) = [each for each in notebook.cells[0].outputs if each.output_type != "stream"]
    text = output.data["text/plain"]
    assert [row[0] for row in columns([line.rstrip() for line in text.splitlines()])[1]] == [
        str(i + 1) for i in range(12)
    ]
    assert "12 iterations in " in text and "train ━" not in text
    assert "<pre" in output.data["text/html"] and "color: #" in output.data["text/html"]
    assert not [each for each in notebook.cells[0].outputs if each.get("name") == "stdout"]
