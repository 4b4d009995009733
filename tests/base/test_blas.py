"""The choice of a BLAS, in processes of their own: a library that is loaded stays."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from compiled_adam.base.blas import choice, cores, library

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere MLX has the system's BLAS")
needs_wheel = pytest.mark.skipif(not choice._has_reference_blas(), reason="this MLX does not bring the reference BLAS")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")

SAY = "import compiled_adam as ca; print(ca.base.blas.used()); print(*ca.base.blas.refused(), sep='; ')"
# What the process has loaded, and whether MLX multiplies with it.
PRODUCT = "; import mlx.core as mx; a = mx.arange(64 * 64).reshape(64, 64) % 7 / 1.0; print(mx.sum(a @ a).item())"
GEMM = """
void {name}(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
            int ldb, float beta, float *c, int ldc) {{
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {{
      float sum = 0;
      for (int l = 0; l < k; l++) sum += a[i * lda + l] * {b};
      c[i * ldc + j] = alpha * sum + (beta ? beta * c[i * ldc + j] : 0) + {more};
    }}
}}
"""


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment may choose a BLAS for the run of the tests."""
    monkeypatch.delenv("COMPILED_ADAM_BLAS", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., str]:
    """A BLAS of a few lines, compiled; its `cblas_sgemm` adds ``more`` to every element."""

    def made(more: str = "0", name: str = "cblas_sgemm", file: str = "libmade.so") -> str:
        source, target = tmp_path / "made.c", tmp_path / file
        text = GEMM.format(name=name, more=more, b="(tb == 112 ? b[j * ldb + l] : b[l * ldb + j])")
        source.write_text(f"{text}\nvoid cblas_dgemm(void) {{}}\nvoid cblas_cgemm(void) {{}}\n")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", target, source], check=True)
        return str(target)

    return made


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def refusal(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code
    return done.stderr.splitlines()[-1]


@needs_wheel
@needs_gcc
def test_mlx_multiplies_with_the_named_library(run, made: Callable[..., str]) -> None:
    exact = said(run("-c", SAY + PRODUCT, COMPILED_ADAM_BLAS="off"))
    assert exact[0] == "reference BLAS"
    right = said(run("-c", SAY + PRODUCT, COMPILED_ADAM_BLAS=made()))
    assert right == ["libmade.so", *exact[1:]]
    # This one is wrong only for large matrices, which shows who calls it.
    larger = said(run("-c", SAY + PRODUCT, COMPILED_ADAM_BLAS=made("(m == 64)")))
    assert float(larger[-1]) == float(exact[-1]) + 64 * 64


@needs_wheel
@needs_gcc
def test_a_library_is_not_used_after_mlx_was_imported(run, made: Callable[..., str]) -> None:
    code = f"import mlx.core; {SAY}"
    assert said(run("-c", code))[0] == "reference BLAS"
    done = run("-c", code, COMPILED_ADAM_BLAS=made())
    assert said(done)[0] == "reference BLAS"
    assert "is not used: import compiled_adam before mlx" in done.stderr


@needs_wheel
@needs_gcc
def test_a_preloaded_library_stays(run, made: Callable[..., str]) -> None:
    preloaded = made()
    assert said(run("-c", SAY, LD_PRELOAD=preloaded))[0] == "libmade.so"
    assert said(run("-c", SAY, LD_PRELOAD=preloaded, COMPILED_ADAM_BLAS="off"))[0] == "libmade.so"
    assert said(run("-c", SAY, LD_PRELOAD=preloaded, COMPILED_ADAM_BLAS=preloaded))[0] == "libmade.so"
    other = made(file="libother.so")
    message = refusal(run("-c", SAY, LD_PRELOAD=preloaded, COMPILED_ADAM_BLAS=other))
    assert message.endswith(f"{other} comes too late, {preloaded} is loaded already; unset one of the two")


@needs_wheel
@needs_gcc
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"more": "1"}, "multiplies two matrices wrongly"),
        ({"name": "sgemm_of_mine"}, "has no function cblas_sgemm"),
    ],
)
def test_a_library_that_is_no_blas_is_refused(run, made: Callable[..., str], options, reason: str) -> None:
    message = refusal(run("-c", SAY, COMPILED_ADAM_BLAS=made(**options)))
    assert f"libmade.so {reason}; name a BLAS with the interface CBLAS" in message
    assert message.endswith("or unset COMPILED_ADAM_BLAS")


@needs_wheel
def test_a_wrong_path_is_a_sentence_of_the_command(run) -> None:
    code = "import sys; sys.argv = ['/bin/compiled-adam', 'doctor']; from compiled_adam.cli import main; main()"
    done = run("-c", code, COMPILED_ADAM_BLAS="/nonexistent.so")
    assert refusal(done, 2).startswith("compiled-adam: COMPILED_ADAM_BLAS=/nonexistent.so cannot be used: ")
    assert "Traceback" not in done.stderr


@needs_wheel
@needs_gcc
def test_what_is_found_is_tried_in_order(run, made: Callable[..., str]) -> None:
    found = [made("1", file="libwrong.so"), "libnowhere.so", made(file="libright.so"), made(file="liblater.so")]
    replaced = f"from compiled_adam.base.blas import choice; choice._candidates = lambda: {found}"
    code = f"{replaced}; print(*choice._first_that_works('-'))"
    out = said(run("-c", code, COMPILED_ADAM_BLAS="off"))
    assert out == [f"libright.so ('{found[0]} multiplies two matrices wrongly',)"]


@needs_wheel
@pytest.mark.skipif("mkl" in "".join(choice._candidates()), reason="MKL is installed, which comes first")
@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OPENBLAS_NUM_THREADS": "1"}, "1 thread)"),
        ({"OMP_NUM_THREADS": "1"}, "1 thread)"),
        ({}, f"{cores.cores()} thread{'s' * (cores.cores() > 1)})"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": str(cores.cores())}, "1 thread)"),
    ],
)
def test_threads_of_openblas(run, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], threads: str) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    name = said(run("-c", SAY, **environment))[0]
    if name == "reference BLAS":
        pytest.skip("no OpenBLAS")
    assert name.startswith("OpenBLAS ") and name.endswith(threads)


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 16), ("200000 100000", 2), ("50000 100000", 1), ("9900000 100000", 16)]
)
def test_cores_of_a_container(quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "_allowed", lambda: 16)
    monkeypatch.setattr(cores, "workers_here", lambda: 1)
    assert cores.cores() == 16
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores.cores() == expected
    monkeypatch.setattr(cores, "workers_here", lambda: 3)
    assert cores.cores() == max(1, expected // 3)


def test_workers_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MLX_HOSTFILE", "MLX_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert cores.workers_here() == 1
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000"], ["10.0.0.1:5001"], ["10.0.0.2:5000"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    for rank, here in ((0, 2), (1, 2), (2, 1), (3, 1), ("x", 1)):
        monkeypatch.setenv("MLX_RANK", str(rank))
        assert cores.workers_here() == here
    monkeypatch.setenv("MLX_RANK", "0")
    hosts.write_text('["10.0.0.1:5000", "10.0.0.2:5000"]')  # MLX takes that, too
    assert cores.workers_here() == 1
    for damaged in ("{", "3", "[[]]", "[3]"):
        hosts.write_text(damaged)
        assert cores.workers_here() == 1
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    assert cores.workers_here() == 4


def test_what_the_processor_can_run(tmp_path: Path) -> None:
    avx2 = "flags\t\t: fpu sse2 fma avx avx2"
    for text, core in (
        (avx2, "Haswell"),
        (f"{avx2} avx512f avx512dq avx512cd avx512bw avx512vl\n", "SkylakeX"),
        (f"{avx2} avx512f\n", "Haswell"),
        ("flags\t\t: fpu sse2 avx\n", ""),
        ("Features\t: asimd\n", ""),
    ):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{text}")
        assert library._core(tmp_path / "cpuinfo") == core
    assert library._core(tmp_path / "nowhere") == ""


@needs_wheel
def test_openblas_takes_the_code_of_the_processor(run) -> None:
    code = "import os; core = os.environ.get('OPENBLAS_CORETYPE', ''); print(core)"
    name, *_, left = said(run("-c", f"{SAY}; {code}"))
    if not name.startswith("OpenBLAS"):
        pytest.skip("no OpenBLAS, or MKL before it")
    assert ("(Prescott" in name) <= (library._core() == "")
    assert left == os.environ.get("OPENBLAS_CORETYPE", "")  # it is no matter of processes that this one starts
    prescott = said(run("-c", SAY, OPENBLAS_CORETYPE="Prescott"))[0]
    assert "(Prescott" in prescott  # who sets it gets it
