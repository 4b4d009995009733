from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from compiled_adam import cli
from compiled_adam.base.errors import InputError
from compiled_adam.commands import report, report_charts
from compiled_adam.commands.report_html import page
from compiled_adam.finetune import metrics
from compiled_adam.finetune.log import read
from compiled_adam.finetune.record import Record
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.callbacks import TrainingCallback

from tests.logs import make_run, record


def charts_of(text: str) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', text).group(1))


def lines_of(text: str) -> dict[str, tuple[list, list]]:
    return {line["label"]: (line["x"], line["y"]) for chart in charts_of(text) for line in chart["series"]}


def test_a_report_has_everything_and_needs_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a<b", model="x&y", iters=40, bias_correction=True, bucket=None, keys=["a"])
    record(folder, answers=[("What?", "This & that.", "<b>That.")])
    assert cli.main(["report", str(folder)]) == 0
    files = {"adapter_config.json", "log.jsonl", "run.json", "report.html"}
    assert {path.name for path in folder.iterdir()} == files
    text = (folder / "report.html").read_text()
    cards = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))
    assert cards["iterations"] == "40" and cards["tokens"] == "4,000" and cards["tokens/s"] == "2,000"
    assert cards["updates skipped"] == "4" and cards["peak memory"] == "2.00 GB"
    assert cards["last training loss"] == "not finite"
    assert cards["best validation loss"] == f"{5 / 21 + 1:.4f}" and cards["at iteration"] == "21"
    settings = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", text))
    assert settings["seed"] == "0" and settings["model"] == html.escape("x&y") and settings["bucket"] == "-"
    assert settings["bias_correction"] == "true" and settings["keys"] == html.escape('["a"]')
    samples = re.findall(r"<h4>([^<]*)</h4><pre>([^<]*)</pre>", text)
    assert samples == [
        *[("prompt", "What?"), ("before training", "the the the of")],
        *[("after iteration 40", html.escape("<b>That.")), ("in the data", html.escape("This & that."))],
    ]
    footer = re.search(r"<footer>.*</footer>", text).group()
    assert all(word in footer for word in (" UTC", "mlx 0.", "compiled-adam 0.", "Python 3.", " cores, "))
    assert "a<b" not in text and 'name="viewport"' in text and 'http-equiv="refresh"' not in text
    assert not re.findall(r"(?:src|href)=|url\(|@import|fetch\(|XMLHttp", text)
    assert len(text) < 100_000  # of which 51 k are uPlot


def test_the_lines_are_those_of_the_log(tmp_path: Path) -> None:
    report.write([make_run(tmp_path / "run")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    titles = ["loss", "gradient norm", "learning rate", "tokens per second", "peak memory, GB", "gradient traces"]
    assert [chart["title"] for chart in charts_of(text)] == titles
    finite = [i for i in range(1, 41) if i % 10]
    lines = lines_of(text)
    assert lines["training"] == (
        finite,
        pytest.approx([4 / i + 1 for i in finite], rel=1e-5),
    )  # so short that all count
    assert "one step" not in lines
    assert lines["validation"] == ([1, 21], [6.0, 1.2381]) and lines["best, 1.2381 at 21"][0] == [21]
    assert lines["clipped (10)"][0] == list(range(1, 41, 4)) and lines["skipped (4)"][0] == [10, 20, 30, 40]
    assert lines["traces"] == (list(range(1, 41)), [min(i, 3) for i in range(1, 41)])


def test_long_runs_are_thinned_but_keep_what_stands_out(tmp_path: Path) -> None:
    points = [(i, 5.0 if i == 77_777 else 1.0 + i % 7 / 10) for i in range(1, 100_001)]
    thinned = report_charts._thinned(points)
    assert len(thinned) <= 2 * report_charts._MOST and (77_777, 5.0) in thinned and (7, 1.0) in thinned
    assert thinned == sorted(thinned) and report_charts._thinned(points[:50]) == points[:50]


def test_runs_are_compared_in_the_same_charts_and_what_differs_comes_first(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one", seed=1), make_run(tmp_path / "two", 20, seed=2, extra=True)]
    report.write(folders, tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert len(charts_of(text)) == 6
    lines = lines_of(text)
    for folder in folders:
        assert f"{folder.name}: training" in lines and f"{folder.name}: validation" in lines
    assert not any("clipped" in label or "skipped" in label for label in lines)  # details of a single run
    assert "<td>iterations</td><td>40</td><td>20</td>" in text and text.count("<h1>") == 2
    differing, alike = re.search(r"Settings that differ(.*)<figure>.*Settings that are alike(.*)", text).groups()
    assert "<td>seed</td><td>1</td><td>2</td>" in differing and "<td>extra</td><td>-</td><td>true</td>" in differing
    assert "max_grad_norm" not in differing and "<td>max_grad_norm</td><td>1.0</td></tr>" in alike


def test_the_same_log_gives_the_same_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    report.write([folder], tmp_path / "a.html")
    report.write([folder], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_markup_is_balanced(tmp_path: Path) -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta",):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    folder = make_run(tmp_path / "run")
    record(folder, answers=[("a", "b", "c")])
    parser.feed(page([report.load(folder)]))
    parser.close()
    assert parser.open == []


def test_a_watch_follows_a_run_to_its_end(tmp_path: Path, capsys) -> None:
    """And waits for its first step. The page loads itself again only while there is more to come."""
    folder, out, refreshes = tmp_path / "run", tmp_path / "page.html", []

    def begin() -> None:
        make_run(folder, 10)
        running = Record(folder / "run.json", 0, 1, pytest.fail)
        happens.extend([lambda: None, step, lambda: running.__exit__(None, None, None)])

    def step() -> None:
        with open(folder / "log.jsonl", "a") as stream:
            stream.write(json.dumps(STEP | {"iteration": 11}) + "\n")

    happens = [lambda: None, begin]

    def wait(seconds: float) -> None:
        refreshes.append(out.exists() and "refresh" in out.read_text() and out.stat().st_mtime_ns)
        happens.pop(0)()

    report.watch([folder], out, wait)
    said = capsys.readouterr().out.splitlines()
    assert not happens and len(said) == 2 and said[0] == "waiting for the first step" and str(out) in said[1]
    assert refreshes[:2] == [False, False] and all(refreshes[2:])
    assert refreshes[2] == refreshes[3] < refreshes[4]  # written again when there is something new
    assert 'http-equiv="refresh"' not in out.read_text() and "<dt>iterations</dt><dd>11</dd>" in out.read_text()
    report.watch([folder], out, lambda _: pytest.fail("the run is over"))


def test_a_watch_ends_with_a_killed_run_and_with_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = make_run(tmp_path / "run", 10), tmp_path / "run" / "report.html"

    def at_once(_: float) -> None:
        raise KeyboardInterrupt

    for unknown in (tmp_path, folder):  # no run yet, and one of which nobody knows how long it is
        with pytest.raises(KeyboardInterrupt):
            report.watch([unknown], out, at_once)
    Record(folder / "run.json", 0, 1, pytest.fail)

    def interrupt(_: float) -> None:
        assert "refresh" in out.read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr(report.watch, "__defaults__", (interrupt,))
    assert cli.main(["report", str(folder), "--watch"]) == 130
    assert 'http-equiv="refresh"' not in out.read_text() and "Still training: iteration 10" in out.read_text()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    found = json.loads((folder / "run.json").read_text())
    found["sessions"][0]["pid"] = ended.pid
    (folder / "run.json").write_text(json.dumps(found))
    assert cli.main(["report", str(folder), "--watch"]) == 0
    assert "The run was killed after iteration 10" in out.read_text()


def test_folders_that_have_no_run(tmp_path: Path, capsys) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has no log.jsonl; give a folder that `compiled-adam lora` wrote" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text("")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has no step yet" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


# What a damaged log or config can have in the place of a value.
ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.text(max_size=3),
        st.integers(),
        st.sampled_from(
            [10**40, -1, 0, 1.5, -0.0, 5e-324, 3e38, 1e308, float("nan"), float("inf"), "1", "\ud800", "$x"]
        ),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
STEP = {"iteration": 1, "loss": 5.0, "tokens": 9, "grad_norm": 1.0, "learning_rate": 1e-5, "skipped": 0, "traces": 1}
STEP |= {"seconds": 0.1, "memory": 1}
VALIDATION = {"iteration": 1, "val_loss": 5.0, "seconds": 0.1}


@st.composite
def damaged_lines(draw: st.DrawFn) -> bytes:
    line = dict(draw(st.sampled_from([STEP, STEP, VALIDATION])))
    for name in draw(st.lists(st.sampled_from(sorted(line)), max_size=2)):
        if draw(st.booleans()):
            line[name] = draw(ANYTHING)
        else:
            line.pop(name, None)
    whole = json.dumps(line).encode()
    return draw(st.sampled_from([whole] * 8 + [whole.replace(b"1", b"1e400"), whole[:20], b"[" * 9999, b"\xff", b""]))


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(damaged_lines(), max_size=4),
    config=st.dictionaries(st.sampled_from(["max_grad_norm", "\ud800", "a"]), ANYTHING).map(json.dumps),
)
def test_damaged_logs_and_settings_are_one_sentence(
    lines: list[bytes], config: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (folder / "adapter_config.json").write_text(config)
    try:
        report.write([folder], folder / "report.html")
    except InputError as error:
        assert "\n" not in str(error) and str(folder) in str(error)


EXTREMES = st.sampled_from([0, 5e-324, 1e-45, 1, 2.5, 1e30, 3.4e38, 10**37])


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.fixed_dictionaries(dict.fromkeys(STEP.keys() - {"iteration", "loss"}, EXTREMES)), min_size=1, max_size=3
    ),
    losses=st.lists(st.none() | EXTREMES | EXTREMES.map(lambda value: -value), min_size=3, max_size=3),
    limit=ANYTHING,
)
def test_whatever_a_log_can_have_is_drawn(steps: list[dict], losses: list, limit: object) -> None:
    lines = [{"iteration": i, "loss": loss, **step} for i, (step, loss) in enumerate(zip(steps, losses, strict=False))]
    vals = [{"iteration": i, "val_loss": loss} for i, loss in enumerate(losses)]
    run = report.Run("run", lines, vals, {"max_grad_norm": limit})
    assert len(charts_of(page([run]))) > 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 is not JSON: Expecting value"),
        ("[1]", "line 2 is not an object"),
        ('"x"', "line 2 is not an object"),
        ("", "line 2 is not JSON"),
        ("{}", "line 2 has iteration None; it must be a whole number"),
        ('{"iteration": "1"}', "line 2 has iteration '1'"),
        ('{"iteration": -1}', "line 2 has iteration -1; it must be a number from 0 to 3.5e+38"),
        ('{"iteration": 1, "loss": 1.0}', "line 2 has no tokens"),
        (
            json.dumps(STEP | {"loss": [1, 2]}),
            "line 2 has loss [1, 2]; it must be a number from -3.5e+38 to 3.5e+38, or null",
        ),
        (json.dumps(STEP | {"memory": True}), "line 2 has memory True; it must be a number from 0 to 3.5e+38"),
        (json.dumps(STEP | {"tokens": -1}), "line 2 has tokens -1; it must be a number from 0 to 3.5e+38"),
        (json.dumps(STEP | {"grad_norm": 10**60}), "line 2 has grad_norm 1000000000000000000000000000000000000..."),
        (
            json.dumps(STEP | {"grad_norm": -1}),
            "line 2 has grad_norm -1; it must be a number from 0 to 3.5e+38, or null",
        ),
        (
            json.dumps(STEP | {"loss": 1e300}),
            "line 2 has loss 1e+300; it must be a number from -3.5e+38 to 3.5e+38, or",
        ),
        (json.dumps(STEP).replace("5.0", "1e400"), "line 2 has loss inf"),
        (json.dumps(STEP).replace("5.0", "NaN"), "line 2 has loss nan"),
    ],
)
def test_a_damaged_line_is_named(line: str, message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(STEP)}\n{line}\n")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path / 'log.jsonl'} is not the log of a run: {message}" in capsys.readouterr().err


def test_what_is_no_file_is_not_read(tmp_path: Path, capsys) -> None:
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "log.jsonl")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has no log.jsonl" in capsys.readouterr().err
    make_run(tmp_path / "run")
    for content, message in ((b"[1]", "not an object"), (b"{", "not JSON"), (b"\xff", "not JSON"), (None, "no file")):
        (tmp_path / "run" / "adapter_config.json").unlink()
        if content is None:
            os.mkfifo(tmp_path / "run" / "adapter_config.json")
        else:
            (tmp_path / "run" / "adapter_config.json").write_bytes(content)
        assert cli.main(["report", str(tmp_path / "run")]) == 2
        assert f"adapter_config.json is {message}" in capsys.readouterr().err


@pytest.mark.parametrize("norm", [0, None])  # None: of an optimizer that does not compute it
def test_a_run_whose_steps_took_no_time(norm: float | None, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(STEP | {"seconds": 0, "grad_norm": norm}) + "\n")
    report.write([tmp_path], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<dt>tokens/s</dt><dd>-</dd>" in text and "Settings that differ" not in text


def test_samples_without_answers_are_not_shown(tmp_path: Path) -> None:
    record = {"sessions": [], "samples": [{"iteration": 0, "answers": []}]}
    assert "<h2>Samples" not in page([report.load(make_run(tmp_path / "run"))._replace(record=record)])


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "is not the record"), ('{"sessions": [{}], "samples": []}', "is not the record")],
)
def test_a_damaged_record_is_one_sentence(content: str, message: str, tmp_path: Path, capsys) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "run.json").write_text(content)
    assert cli.main(["report", str(folder)]) == 2
    assert f"{folder / 'run.json'} {message}" in (said := capsys.readouterr().err) and "; remove it: " in said


@pytest.mark.slow
def test_lora_draws_its_run(tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With samples before and after, and the settings that held."""
    monkeypatch.chdir(tmp_path)
    options = "--train --iters 10 --batch-size 2 --num-layers 2 --steps-per-report 5 --steps-per-eval 10 --report"
    job = ["lora", "--model", str(tiny_model), "--data", str(data), "--val-batches", "1", *options.split()]
    assert cli.main([*job, "--sample-prompts", "2"]) == 0
    text = (tmp_path / "adapters" / "report.html").read_text()
    assert len(charts_of(text)) == 6 and text.count("<h4>before training</h4>") == 2
    assert text.count("<h4>after iteration 10</h4>") == 2
    settings = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", text))
    assert settings["bias_correction"] == "true" and settings["moments"] == "float32"
    assert settings["keep_checkpoints"] == "2" and settings["skip_nonfinite"] == "true"
    assert settings["like_mlx_lm"] == "false" and settings["max_grad_norm"] == "-"
    assert "Ended at iteration 10 of 10: all 10 iterations are done." in text


def test_no_step_gets_the_time_of_another(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are read a step late, and before a report, a validation and a save at once."""
    import compiled_adam as ca

    from tests.finetune import test_lora

    now = 0.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)

    put = metrics.StepReader.put

    def put_after_a_second(self, *arguments):
        nonlocal now
        now += 1.0
        return put(self, *arguments)

    class Slow(TrainingCallback):
        def on_val_loss_report(self, info: dict) -> None:
            nonlocal now
            now += 100.0

    monkeypatch.setattr(metrics.StepReader, "put", put_after_a_second)
    model, train_set, valid_set = test_lora.setting(tiny_model, "lora")
    options = test_lora.arguments(tmp_path, iters=12, steps_per_report=5, steps_per_eval=4, steps_per_save=3)
    ca.train(model, ca.Adam(1e-3), train_set, valid_set, options, training_callback=Slow(), log=True)
    assert [entry["seconds"] for entry in read(tmp_path / "log.jsonl") if "loss" in entry] == [1.0] * 12
