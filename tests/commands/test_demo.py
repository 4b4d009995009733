"""The demo, run once with few iterations, as a new user runs it: in a pipe, and with no kernel compiled yet."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest
from compiled_adam.cli import main
from compiled_adam.commands import capitals, demo, report
from compiled_adam.finetune import log
from rich.console import Console

from tests import compiler
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
ITERATIONS = 6
COMMAND = ("demo", "--iters", str(ITERATIONS), "--pretraining", "8")
# Half a second of g++ or more for each, which is most of what a new user waits for.
KERNELS = 48


class Shown(NamedTuple):
    folder: Path
    lines: list[str]
    kernels: int

    def losses(self) -> dict[str, float]:
        """What stands beside the bars."""
        rows = [re.fullmatch(r"(.*\S)  +\S+ +(\d+\.\d{3}) +\d+ of 32 *", line) for line in self.lines]
        return {row[1]: float(row[2]) for row in rows if row}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("demo")
    if compiler.COUNTS:
        compiler.put_into(folder)
    (temporary := folder / "t").mkdir()
    own = {"PYTHONPATH": str(ROOT), "PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-m", "compiled_adam.cli", *COMMAND],
        cwd=folder,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return Shown(folder, done.stdout.splitlines(), compiler.compiled(temporary))


@pytest.mark.skipif(not compiler.COUNTS, reason="g++ compiles nothing here")
def test_few_kernels_are_compiled(shown: Shown) -> None:
    assert 20 < shown.kernels <= KERNELS


def test_stages_have_names_and_times(shown: Shown) -> None:
    names = [line for line in shown.lines if re.match(r"\d\. ", line)]
    assert [name[0] for name in names] == list("123456")
    for name in names:
        assert re.fullmatch(r"   \d+\.\d s", shown.lines[shown.lines.index(name) + 1])


def test_ours_follows_float32_where_stock_stalls(shown: Shown) -> None:
    """With so few iterations nothing is learned yet; but the weights have moved as those in float32, or have not."""
    for each in demo.CONTENDERS:
        saved = mx.load(str(shown.folder / f"demo/{each.folder}/adapters.safetensors"))
        assert {array.dtype for array in saved.values()} == {getattr(mx, each.dtype)}
    stock, ours, reference = (
        demo.changed(shown.folder / "demo/model", shown.folder / "demo" / each.folder) for each in demo.CONTENDERS
    )
    assert reference > 0.9
    assert 0 < stock < 0.5 * ours
    assert any(f"stock {stock:.0%}, ours {ours:.0%}" in line for line in shown.lines)


def test_the_bars_are_the_losses_of_the_runs(shown: Shown) -> None:
    losses = shown.losses()
    assert list(losses) == ["before", *(each.name for each in demo.CONTENDERS)]
    for each in demo.CONTENDERS:
        entries = log.read(shown.folder / "demo" / each.folder / "log.jsonl")
        assert len([entry for entry in entries if "loss" in entry]) == ITERATIONS
        first = next(entry["val_loss"] for entry in entries if "val_loss" in entry)
        assert first == pytest.approx(losses["before"], abs=0.02)  # rounding of activations to bfloat16


@pytest.mark.parametrize("width", [40, 80, 120])
def test_bars_at_every_width(width: int) -> None:
    found = {"before": demo.Quality(4.0, 1), "stock": demo.Quality(4.0, 2), "adapters": demo.Quality(1.0, 30)}
    console = Console(width=width, record=True, color_system=None, file=StringIO())
    console.print(demo.bars({**found, "reference": demo.Quality(1.0, 30)}, asked=32))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    bars = [line.count("━") for line in text.splitlines() if "━" in line]
    assert bars[0] == bars[1] == pytest.approx(4 * bars[2], abs=3)
    assert "4.000" in text and "30 of 32" in text


def test_both_answers_the_report_and_a_command_that_works(
    shown: Shown, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, report, command = shown.lines[-4:]
    assert before.startswith(f"before  {capitals.ASKED} -> ") and after.startswith(f"after   {capitals.ASKED} -> ")
    assert report == "report  demo/report.html" and (shown.folder / "demo/report.html").stat().st_size > 1000
    words = shlex.split(command)
    assert words[:2] == ["try", "mlx_lm.generate"] and words[-3] == capitals.ASKED
    monkeypatch.chdir(shown.folder)
    monkeypatch.setattr(sys, "argv", words[1:])
    import_module("mlx_lm.generate").main()  # the package has a function of this name
    said = capsys.readouterr().out.split("==========")[1].strip()
    assert said == after.partition("-> ")[2]


def test_the_same_again_in_its_own_folder(shown: Shown, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shown.folder)
    monkeypatch.setattr(report, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert main(COMMAND) == 0
    again = Shown(shown.folder, capsys.readouterr().out.splitlines(), 0)
    assert again.losses() == shown.losses()
    assert "there is no report: disk full" in again.lines
    assert {path.name for path in (shown.folder / "demo").iterdir()} >= {"model", "report.html"}
    assert not list((shown.folder / "demo").glob("*/previous-*"))


def test_countries_to_validate_are_never_trained() -> None:
    trained, validated = capitals.facts()
    words = {word for fact in trained for word in re.findall(r"\w+", fact.prompt + fact.answer)}
    for country in list(capitals.CAPITALS)[: capitals.HELD_OUT]:
        assert country not in words and capitals.CAPITALS[country] not in words
        assert any(country in fact.prompt for fact in validated)
    assert capitals.Fact(capitals.ASKED, " Paris") in validated
    assert len(validated) == 32
