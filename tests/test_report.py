from __future__ import annotations

import html
import json
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compiled_adam import cli, report
from compiled_adam.run_log import RunLog, read

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


def test_lora_draws_its_run_and_times_its_steps(tiny_model: Path, data: Path, run, tmp_path: Path) -> None:
    options = "--train --iters 40 --batch-size 2 --num-layers 2 --steps-per-report 5 --steps-per-eval 10 --report"
    job = ("--model", str(tiny_model), "--data", str(data), "--val-batches", "1", *options.split())
    done = run("-m", "compiled_adam.cli", "lora", *job)
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "adapters" / "report.html").read_text()
    seconds = [entry["seconds"] for entry in read(tmp_path / "adapters" / "log.jsonl") if "loss" in entry]
    # Results are read a step late; no step may get the time of another one, as those before a report once did.
    assert min(seconds) > 0.2 * statistics.median(seconds)
