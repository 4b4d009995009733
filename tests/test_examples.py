"""Every example runs, and shows what it says it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LAUNCH = Path(sys.executable).with_name("mlx.launch")


def shown(run, name: str) -> str:
    done = run(str(ROOT / "examples" / name))
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern + r" (-?[\d.]+)", text).group(1))


def test_mlp(run) -> None:
    out = shown(run, "mlp.py")
    assert number("accuracy", out) > 0.98
    assert "traces {'grad': 2, 'accumulate': 0, 'update': 1, 'evicted': 0}  updates skipped 0" in out


def test_convnet(run) -> None:
    out = shown(run, "convnet.py")
    assert number("accuracy", out) > 0.95
    # The images have a variance of 0.75, the convolutions shrink it.
    assert 0.1 < number("running variance 1.000 ->", out) < 0.9


def test_lora(run) -> None:
    out = shown(run, "lora.py")
    assert "45,056 trainable parameters" in out
    before, after = map(float, re.search(r"validation loss (\S+) -> (\S+)\n$", out).groups())
    assert after < before - 0.4


def test_muon(run) -> None:
    out = shown(run, "muon.py")
    loss = number("ca.Compensated  loss", out)
    assert loss < 0.15 * 2.0  # the variance of four sines
    assert number("MLX alone       loss", out) > 1.5 * loss


def test_bf16(run) -> None:
    out = shown(run, "bf16.py")
    before = number("before fine-tuning +loss", out)
    loss = {name: number(f"{name} +loss", out) for name in ("float32, ours", "mlx.optimizers", "bfloat16, ours")}
    moved = {name: number(f"{name} .* moved by", out) for name in loss}
    reference = loss["float32, ours"]
    assert reference < 0.1 * before
    # Rounded to bfloat16 for the forward pass, a network of this size differs by a few per cent of its loss.
    assert loss["bfloat16, ours"] == pytest.approx(reference, rel=0.15)
    assert loss["mlx.optimizers"] > 0.8 * before
    assert moved["bfloat16, ours"] == pytest.approx(moved["float32, ours"], rel=0.02)
    assert moved["mlx.optimizers"] < 0.1 * moved["float32, ours"]


def test_resume(run) -> None:
    out = shown(run, "resume.py")
    assert number("without a stop  loss", out) == number("resumed         loss", out)
    assert out.endswith("every array of model, optimizer, window and random state is the same: True\n")


@pytest.mark.skipif(not LAUNCH.exists(), reason="no mlx.launch beside this Python")
def test_two_processes(run, tmp_path: Path) -> None:
    alone = re.search(r"process 0 of 1: loss (\S+), sum of the weights' sizes (\S+)", shown(run, "two_processes.py"))
    done = subprocess.run(
        [LAUNCH, "-n", "2", "--env", f"PYTHONPATH={ROOT}", sys.executable, ROOT / "examples" / "two_processes.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    both = re.findall(r"process (\d) of 2: loss (\S+), sum of the weights' sizes (\S+)", done.stdout)
    assert sorted(rank for rank, *_ in both) == ["0", "1"], done.stdout + done.stderr
    assert both[0][1:] == both[1][1:]  # exactly: the same gradients, the same update
    # The mean of two halves is rounded in another order than the mean of the whole.
    for one, two in zip(alone.groups(), both[0][1:], strict=True):
        assert float(two) == pytest.approx(float(one), rel=1e-3)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_each_is_tested_is_short_and_says_what_it_shows(file: Path) -> None:
    assert f"test_{file.stem}" in globals()
    text = file.read_text()
    assert text.startswith('"""') and len(text.splitlines()) < 60
