from __future__ import annotations

import inspect
from pathlib import Path

import compiled_adam as ca
import pytest
from compiled_adam import cli, schedulers
from compiled_adam.commands import schedule
from compiled_adam.schedulers import picture
from conftest import ROOT

YAML = """
lr_schedule: {name: cosine_decay, arguments: [1.0e-3, 90], warmup: 10}
iters: 200
grad_accumulation_steps: 2
"""


def printed(capsys, *arguments: str) -> tuple[str, dict[int, float]]:
    """What the command prints, and the learning rates in it."""
    assert cli.main(["schedule", *arguments]) == 0
    out = capsys.readouterr().out
    rows = out.split("learning rate\n")[1].splitlines()
    return out, {int(row.split()[0]): float(row.split()[1]) for row in rows if not row.startswith("wrote")}


def test_a_schedule_by_its_parameters_names(capsys) -> None:
    out, rates = printed(capsys, "cosine", "1e-3", "1000", "--warmup", "100", "--end", "1e-5")
    assert out.startswith("cosine(peak=0.001, steps=1000, end=1e-05, warmup=100)\n1.00e-03 |")
    schedule = ca.schedulers.cosine(1e-3, 1000, 1e-5, warmup=100)
    assert rates == {step: pytest.approx(schedule(step).item(), rel=1e-5) for step in (0, 100, 550, 1000)}
    _, rates = printed(capsys, "cosine", "1e-3", "1000", "--at", "3,2000")
    assert list(rates) == [3, 2000] and rates[2000] == 0
    out, _ = printed(capsys, "linear", "1", "50")
    assert out.count("\n         0  ") == 1  # also the highest of all
    assert max(printed(capsys, "inverse_sqrt", "1", "--warmup", "3000")[1]) == 12_000


REQUIRED = {
    "constant": "1",
    "linear": "1 50",
    "cosine": "1 50",
    "polynomial": "1 50",
    "warmup_stable_decay": "1 50",
    "inverse_sqrt": "1",
    "exponential": "1 0.9",
    "step_decay": "1 0.5 10",
    "one_cycle": "1 50",
}


@pytest.mark.parametrize("name", REQUIRED)
def test_every_schedule_is_a_command(name: str, capsys) -> None:
    out, rates = printed(capsys, name, *REQUIRED[name].split(), "--warmup", "10", "--warmup-init", "0.25")
    assert rates[0] == 0.25 and rates[10] == 1.0
    assert max(rates) == (50 if "50" in REQUIRED[name] else schedule.UPDATES)
    assert len(out.splitlines()) > 12
    # Its options are its parameters.
    parameters = inspect.signature(getattr(schedulers, name)).parameters
    with pytest.raises(SystemExit):
        cli.main(["schedule", name, "--help"])
    text = capsys.readouterr().out
    for parameter in parameters:
        assert parameter.replace("_", "-") in text.replace("_", "-")


def test_all_of_them_are_there() -> None:
    assert set(REQUIRED) == set(schedule.SCHEDULES)


def test_a_yaml_file_of_mlx_lm(tmp_path: Path, capsys) -> None:
    (tmp_path / "lora.yaml").write_text(YAML)
    out, rates = printed(capsys, "--config", str(tmp_path / "lora.yaml"))
    assert "100 updates" in out  # 200 micro-batches
    assert rates == {0: 0, 10: 1e-3, 55: pytest.approx(5e-4, rel=1e-5), 100: 0}


def test_pictures(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, start in (("a.svg", b"<?xml"), ("a.png", b"\x89PNG")):
        out, _ = printed(capsys, "linear", "1", "30000", "--out", str(tmp_path / name))
        assert out.endswith(f"wrote {tmp_path / name}\n")
        assert (tmp_path / name).read_bytes().startswith(start) and (tmp_path / name).stat().st_size > 5000
    drawn: list[list[int]] = []
    monkeypatch.setattr(picture, "plot", lambda *_, at: drawn.append(at) or picture.canvas())
    printed(capsys, "linear", "1", "50", "--at", "3,99", "--out", str(tmp_path / "a.svg"))
    assert drawn == [[3]]  # the others would make the axis longer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "schedule needs a name and its arguments"),
        ("sine 1", "there is no schedule 'sine'; did you mean cosine?"),
        ("cosine 1", "schedule cosine needs steps"),
        ("cosine 1 ten", "steps is 'ten'; it must be a whole number"),
        ("cosine 1 10 --warmup 20", "warmup is 20; it must be less than steps"),
        ("cosine 1 10 --peek 2", "schedule cosine has no option --peek"),
        ("cosine 1 10 --at 1,x", "'1,x' is not a list of updates"),
        ("cosine 1 10 --at=-1", "'-1' is not a list of updates"),
        ("cosine 1 10 --until 0", "until is 0"),
        ("cosine 1 10 --out a.gif", "its name must end in .svg or .png"),
        ("cosine 1 10 --out /nonexistent/a.png", "/nonexistent is no folder; make it first"),
        ("--config nowhere.yaml", "there is no file nowhere.yaml"),
        ("--config empty.yaml", "empty.yaml has no lr_schedule"),
        ("--config broken.yaml", "broken.yaml is not YAML"),
    ],
)
def test_errors_are_a_sentence(
    arguments: str, message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").touch()
    Path("broken.yaml").write_text("a: [1\nb: {")
    try:
        code = cli.main(["schedule", *arguments.split()])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_in_a_pipe_that_knows_no_blocks_and_without_matplotlib(run, tmp_path: Path) -> None:
    job = ("-m", "compiled_adam.cli", "schedule", "linear", "1", "100")
    done = run(*job, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "#" in done.stdout, done.stderr
    assert "█" in run(*job, PYTHONIOENCODING="utf-8").stdout
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not installed')")
    done = run(*job, "--out", "a.svg", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2
    assert done.stderr == (
        "compiled-adam: drawing needs matplotlib (not installed); install it with `pip install 'compiled-adam[plot]'`\n"
    )
    assert run(*job, PYTHONPATH=f"{tmp_path}:{ROOT}").returncode == 0


def test_the_characters_are_the_curve() -> None:
    rates = [0.0, 1.0, 0.5, 0.25, 1.0, 0.0]
    lines = picture.text(rates, 5, height=4, blocks=" .:#")
    cells = [line[10:].ljust(6) for line in lines[:4]]
    heights = [sum(" .:#".index(row[i]) for row in cells) / 12 for i in range(6)]
    assert heights == pytest.approx(rates, abs=1 / 24)
    # A peak of one step in a long run is not lost.
    assert picture.text([0.0] * 500 + [1.0] + [0.0] * 500, 1000)[0].count("█") == 1
    assert picture.text([0.0, 0.0], 1)[0].strip().endswith("|")
    top, *_, bottom, _, ticks = picture.text([1.0] * 101, 100, width=40)
    assert top.startswith("1.00e+00 |") and bottom.startswith("         |") and ticks.split() == ["0", "50", "100"]


def test_plot_gives_a_figure_of_the_values() -> None:
    cosine = ca.schedulers.cosine(1.0, 10, warmup=2)
    figure = ca.schedulers.plot({"a": cosine, "b": ca.schedulers.constant(0.5)}, 12, at=[0, 2])
    axes = figure.axes[0]
    curve, marks, other, _ = axes.lines
    assert list(curve.get_xdata()) == list(range(13)) and list(marks.get_xdata()) == [0, 2]
    assert list(curve.get_ydata()) == pytest.approx([cosine(step).item() for step in range(13)], abs=1e-6)
    assert list(other.get_ydata()) == [0.5] * 13
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert len(ca.schedulers.plot(lambda step: step * 2.0, 10**6).axes[0].lines[0].get_xdata()) == 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.0, 10), "schedule is 1.0"), (({}, 10), "schedule is {}"), ((ca.schedulers.constant(1.0), 0), "steps is 0")],
)
def test_plot_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ca.schedulers.plot(*arguments)
