from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import pytest
from compiled_adam import cli
from compiled_adam.base.errors import InputError
from compiled_adam.commands import report
from compiled_adam.finetune import metrics
from compiled_adam.finetune.log import RunLog, read
from hypothesis import given, settings
from hypothesis import strategies as st

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_run(folder: Path, iterations: int = 40, **settings) -> Path:
    """A log as `lora` writes it: every tenth update skipped, every fourth clipped at 1."""
    folder.mkdir()
    log = RunLog(folder / "log.jsonl", 0, warn=pytest.fail)
    for i in range(1, iterations + 1):
        if i % 20 == 1:
            log.write({"iteration": i, "val_loss": 5.0 / i + 1, "seconds": 0.1})
        bad = i % 10 == 0
        log.write(
            {
                "iteration": i,
                "loss": float("nan") if bad else 4.0 / i + 1,
                "tokens": 100,
                "grad_norm": float("inf") if bad else (2.0 if i % 4 == 1 else 0.5),
                "learning_rate": 1e-3 / i,
                "skipped": i // 10,
                "traces": min(i, 3),
                "seconds": 0.05,
                "memory": 2 * 10**9,
            }
        )
    log.close()
    (folder / "adapter_config.json").write_text(json.dumps({"max_grad_norm": 1.0, "seed": 0, **settings}))
    return folder


def test_a_report_has_everything_and_needs_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a<b", model="x&y")
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "log.jsonl", "report.html"]
    summary = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", text))
    assert summary["iterations"] == "40" and summary["tokens"] == "4,000" and summary["tokens/s"] == "2,000"
    assert summary["updates skipped"] == "4" and summary["peak memory"] == "2.00 GB"
    assert summary["last training loss"] == "not finite" and summary["best validation loss"] == f"{5 / 21 + 1:.4f}"
    assert summary["seed"] == "0" and summary["model"] == html.escape("x&y")
    for name in report.PICTURES:
        assert f">{name}</text>" in text, name
    # Iterations 1, 5, ..., 37 but for none that was skipped; 10, 20, 30 and 40.
    assert ">clipped (10)</text>" in text and ">skipped (4)</text>" in text
    assert "a<b" not in text and "<script" not in text and 'name="viewport"' in text
    loaded = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(target.startswith("#") for target in loaded)  # marks within the same picture


def test_runs_are_compared_in_the_same_pictures(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one", seed=1), make_run(tmp_path / "two", 20, seed=2, extra=True)]
    report.write(folders, tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert text.count("<svg") == len(report.PICTURES)
    for folder in folders:
        assert f">{folder}, training</text>" in text and f">{folder}, validation</text>" in text
    assert "<td>seed</td><td>1</td><td>2</td>" in text and "<td>extra</td><td>-</td><td>True</td>" in text


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
    parser.feed(report.render([report.load(make_run(tmp_path / "run"))]))
    parser.close()
    assert parser.open == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [500, 1300])  # Chromium has no narrower window than 500
def test_a_browser_shows_it_without_errors(width: int, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    report.write([folder], folder / "report.html")
    # The page measures itself, for --dump-dom to tell, and notes what goes wrong.
    probe = (
        "<script>window.errors=[];window.onerror=m=>errors.push(m);document.addEventListener('error',"
        "e=>errors.push(e.target.tagName),true);window.onload=()=>{document.title=JSON.stringify({errors,"
        "wide:document.documentElement.scrollWidth,inner:innerWidth,"
        "drawn:[...document.querySelectorAll('svg')].map(s=>s.getBoundingClientRect().width)})}</script>"
    )
    page = tmp_path / "page.html"
    page.write_text((folder / "report.html").read_text().replace("<head>", f"<head>{probe}"))
    picture = tmp_path / "page.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2400"]
    done = subprocess.run(
        [
            *command,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout).group(1)))
    assert found["errors"] == []
    assert len(found["drawn"]) == len(report.PICTURES) and min(found["drawn"]) > 280
    assert found["wide"] <= found["inner"]  # no scrolling sideways
    subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert picture.stat().st_size > 20_000  # an empty page of this size has 5 kB


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
    with patch.object(report, "PICTURES", {}):
        try:
            report.write([folder], folder / "report.html")
        except InputError as error:
            assert "\n" not in str(error) and str(folder) in str(error)


EXTREMES = st.sampled_from([0, 5e-324, 1e-45, 1, 2.5, 1e30, 3.4e38, 10**37])


@settings(max_examples=12, deadline=None)
@given(
    steps=st.lists(
        st.fixed_dictionaries(dict.fromkeys(STEP.keys() - {"iteration", "loss"}, EXTREMES)), min_size=1, max_size=3
    ),
    losses=st.lists(st.none() | EXTREMES | EXTREMES.map(lambda value: -value), min_size=3, max_size=3),
    limit=ANYTHING,
    picture=st.sampled_from(sorted(report.PICTURES)),
)
def test_whatever_a_log_can_have_is_drawn(steps: list[dict], losses: list, limit: object, picture: str) -> None:
    lines = [{"iteration": i, "loss": loss, **step} for i, (step, loss) in enumerate(zip(steps, losses, strict=False))]
    run = report.Run("run", lines, [{"iteration": 1, "val_loss": losses[0]}], {"max_grad_norm": limit})
    with patch.object(report, "PICTURES", {picture: report.PICTURES[picture]}):  # one, for they take most of the time
        assert "<svg" in report.render([run])


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


def test_a_run_whose_steps_took_no_time(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(STEP | {"seconds": 0, "grad_norm": 0}) + "\n")
    report.write([tmp_path], tmp_path / "report.html")
    assert "<td>tokens/s</td><td>-</td>" in (tmp_path / "report.html").read_text()


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    folder = make_run(tmp_path / r"$\frac$")
    report.write([folder], folder / "report.html")
    assert r"$\frac$, training</text>" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_lora_draws_its_run(tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--train --iters 10 --batch-size 2 --num-layers 2 --steps-per-report 5 --steps-per-eval 10 --report"
    assert (
        cli.main(["lora", "--model", str(tiny_model), "--data", str(data), "--val-batches", "1", *options.split()]) == 0
    )
    assert "<svg" in (tmp_path / "adapters" / "report.html").read_text()


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

    class Slow(test_lora.Recorder):
        def on_val_loss_report(self, info: dict) -> None:
            nonlocal now
            now += 100.0

    monkeypatch.setattr(metrics.StepReader, "put", put_after_a_second)
    model, train_set, valid_set = test_lora.setting(tiny_model, "lora")
    options = test_lora.arguments(tmp_path, iters=12, steps_per_report=5, steps_per_eval=4, steps_per_save=3)
    ca.train(model, ca.Adam(1e-3), train_set, valid_set, options, training_callback=Slow(), log=True)
    assert [entry["seconds"] for entry in read(tmp_path / "log.jsonl") if "loss" in entry] == [1.0] * 12
