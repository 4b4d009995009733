"""The wheel in an environment of its own, outside the checkout. Minutes, and a network."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.long
BACKEND = "" if platform.system() == "Darwin" else "cpu"
STEP = """
import mlx.core as mx, mlx.nn as nn, compiled_adam as ca
step = ca.make_step(nn.Linear(4, 1), lambda model, x: mx.square(model(x)).mean())
losses = [step(mx.ones((8, 4))).loss.item() for _ in range(3)]
assert losses[2] < losses[0]
print(ca.__file__)
"""


def execute(*command: object, cwd: Path, code: int = 0) -> str:
    """What a command prints, both streams; it must end with ``code``."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # From a copy of what git has: files that lie around in the checkout are no part of it.
    source = folder / "source"
    execute("git", "clone", "--quiet", ROOT, source, cwd=folder)
    execute(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def environment(folder: Path, requirement: str) -> Path:
    """The folder of programs of a fresh environment that has ``requirement`` only."""
    venv.create(folder, with_pip=True)
    execute(folder / "bin" / "python", "-m", "pip", "install", "--quiet", requirement, cwd=folder)
    return folder / "bin"


def test_without_extras(wheel: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path / "bare", str(wheel))
    if not BACKEND:
        execute(programs / "python", "-c", STEP, cwd=tmp_path)
        return
    said = execute(programs / "python", "-c", "import compiled_adam", cwd=tmp_path, code=1).splitlines()[-1]
    assert "MLX cannot be loaded" in said and "pip install 'compiled-adam[cpu]'" in said
    said = execute(programs / "compiled-adam", "doctor", cwd=tmp_path, code=1)
    assert re.fullmatch(r"compiled-adam: MLX cannot be loaded .*\n", said)

    # With a backend, and nothing else.
    execute(programs / "python", "-m", "pip", "install", "--quiet", f"{wheel}[{BACKEND}]", cwd=tmp_path)
    assert str(tmp_path) in execute(programs / "python", "-c", STEP, cwd=tmp_path)
    assert "training works" in execute(programs / "compiled-adam", "doctor", cwd=tmp_path)
    for command, extra in (("demo", "lm"), ("lora --help", "lm")):
        said = execute(programs / "compiled-adam", *command.split(), cwd=tmp_path, code=2)
        assert f"compiled-adam[{extra}]'" in said and "Traceback" not in said
    assert "0.5" in execute(programs / "compiled-adam", "schedule", "linear", "1", "10", cwd=tmp_path)


def test_the_demo_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path / "full", f"{wheel}[{','.join(filter(None, ('lm', BACKEND)))}]")
    work = tmp_path / "work"
    work.mkdir()
    out = execute(programs / "compiled-adam", "demo", cwd=work)
    rows = re.findall(r"^(\w+(?:, \w+)?) +\S+ +(\d\.\d{3}) +(\d+) of 32", out, re.M)
    losses, right = {row[0]: float(row[1]) for row in rows}, {row[0]: int(row[2]) for row in rows}
    before, reference = losses["before"], losses["float32, ours"]
    assert reference < before - 1.5
    assert losses["bfloat16, ours"] == pytest.approx(reference, abs=0.1 * (before - reference))
    assert losses["bfloat16, stock"] > before - 0.3 * (before - reference)
    assert right["bfloat16, ours"] > 16 > right["bfloat16, stock"]
    assert "-> Paris." in out
    assert (work / "demo" / "adapters" / "adapters.safetensors").exists()
