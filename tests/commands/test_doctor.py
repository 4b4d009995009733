from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest
from compiled_adam.base import blas
from compiled_adam.commands import doctor
from conftest import ROOT

DOCTOR = ("-m", "compiled_adam.cli", "doctor")


def findings(done) -> dict[str, dict[str, str]]:
    found = json.loads(done.stdout)
    assert found["training_works"] is (done.returncode == 0)
    return {finding.pop("name"): finding for finding in found["findings"]}


needs_cpu = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU needs no g++")


@pytest.fixture
def kernel_cache(tmp_path: Path) -> str:
    """A temporary folder of its own, for what must not meet the kernels that MLX keeps."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return str(folder)


def test_here_training_works(run) -> None:
    done = run(*DOCTOR)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "training works"
    assert f"ok      MLX         {mx.__version__}" in done.stdout
    assert "1 per float32 tensor, 3 per bfloat16 tensor" in done.stdout
    first, last = map(float, re.search(r"loss (\S+) -> ([\d.]+)", done.stdout).groups())
    assert last < 0.5 * first

    found = findings(run(*DOCTOR, "--json"))
    assert list(found)[:5] == ["MLX", "device", "mx.compile", "kernels", "training"]
    if "matmul" in found:
        assert f"({blas.used()})" in found["matmul"]["found"]
    for name in ("MLX", "device", "mx.compile", "kernels", "training", "mlx-lm", "matplotlib"):
        assert found[name]["state"] == "ok" and not found[name]["advice"], found[name]


@needs_cpu
def test_without_a_compiler_it_works_and_says_what_to_do(run) -> None:
    done = run(*DOCTOR, "--json", PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    found = findings(done)
    assert found["mx.compile"]["state"] == found["kernels"]["state"] == "advice"
    assert "no g++ in PATH" in found["mx.compile"]["found"] and "g++" in found["mx.compile"]["advice"]
    assert found["training"]["state"] == "ok"


def test_mlx_told_not_to_compile(run) -> None:
    found = findings(run(*DOCTOR, "--json", MLX_DISABLE_COMPILE="1"))
    assert found["mx.compile"]["advice"] == "unset MLX_DISABLE_COMPILE"


@needs_cpu
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_compiler_that_does_not_work(run, tmp_path: Path, kernel_cache: str) -> None:
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no headers\nexit 1\n')
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(*DOCTOR, PATH=path, TMPDIR=kernel_cache)
    assert done.returncode == 1
    assert "broken  mx.compile  RuntimeError" in done.stdout and "g++ is there but does not work" in done.stdout
    assert done.stdout.splitlines()[-1] == "training does not work on this machine as it is"
    # The kernels that MLX has kept do not hide it.
    assert run(*DOCTOR, PATH=path).returncode == 1


@needs_cpu
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_damaged_cache_of_kernels(run, kernel_cache: str) -> None:
    assert run(*DOCTOR).returncode == 0
    for library in Path(tempfile.gettempdir()).glob("mlx/*/cpu/*.so"):
        damaged = Path(kernel_cache) / library.relative_to(tempfile.gettempdir())
        damaged.parent.mkdir(parents=True, exist_ok=True)
        damaged.touch()  # as after a crash, or a second process that read too early
    done = run(*DOCTOR, "--json", TMPDIR=kernel_cache)
    assert done.returncode == 1
    assert findings(done)["training"]["advice"] == (
        f"a compiled kernel cannot be loaded; remove {kernel_cache}/mlx, which MLX fills again"
    )
    shutil.rmtree(f"{kernel_cache}/mlx")
    assert run(*DOCTOR, TMPDIR=kernel_cache).returncode == 0


def test_without_the_extras_it_names_them(run, tmp_path: Path) -> None:
    for module in ("mlx_lm", "matplotlib"):
        (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('no {module}')")
    done = run(*DOCTOR, "--json", PYTHONPATH=f"{tmp_path}:{ROOT}")
    found = findings(done)
    assert done.returncode == 0
    assert (found["mlx-lm"]["state"], found["matplotlib"]["state"]) == ("advice", "advice")
    assert "pip install 'compiled-adam[lm]'" in found["mlx-lm"]["advice"]
    assert "pip install 'compiled-adam[plot]'" in found["matplotlib"]["advice"]


def test_without_a_backend_the_command_is_a_sentence(run, tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    code = "import sys; sys.argv = ['/bin/compiled-adam', 'doctor']; from compiled_adam.cli import main; main()"
    done = run("-c", code, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert done.stderr.startswith("compiled-adam: MLX cannot be loaded") and "compiled-adam[cpu]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("on_cpu")
def test_a_slow_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.blas, "used", lambda: "reference BLAS")
    monkeypatch.setattr(doctor.blas, "is_slow", lambda: True)
    monkeypatch.setattr(doctor.blas, "refused", lambda: ("libopenblas.so.0 multiplies two matrices wrongly",))
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("COMPILED_ADAM_BLAS", raising=False)
    found = doctor._matmul()
    assert found.state == "advice" and "GFLOP/s in float32 (reference BLAS)" in found.found
    assert found.advice == (
        "pip install 'compiled-adam[blas]', or apt-get install libopenblas0-pthread (Debian, Ubuntu), makes it many"
        " times faster; libopenblas.so.0 multiplies two matrices wrongly"
    )
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")  # for which there is no MKL
    assert doctor._matmul().advice.startswith("apt-get install libopenblas0-pthread (Debian, Ubuntu) makes it")
    monkeypatch.setenv("COMPILED_ADAM_BLAS", "off")
    assert doctor._matmul().advice == "unset COMPILED_ADAM_BLAS to use a faster library"
    monkeypatch.setattr(doctor.blas, "is_slow", lambda: False)
    assert doctor._matmul().state == "ok"


def test_a_check_that_raises_is_a_finding() -> None:
    def check() -> doctor.Finding:
        raise RuntimeError(f"first{' ' * 10}{'x' * 1000} last")

    found = doctor._made("training", check)
    assert found.state == "broken" and not doctor.training_works([found])
    assert found.found.startswith("RuntimeError: first xxx") and found.found.endswith("xxx last")
    assert len(found.found) < 350
