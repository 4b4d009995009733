"""``compiled-adam doctor``: whether this machine can train, how well, and what to do where it could be better."""

from __future__ import annotations

import importlib
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from ..base import blas, kernels
from ..finetune.packages import install
from ..optimizers import AdamW
from ..step import make_step

KERNELS = {mx.float32: 1, mx.bfloat16: 3}  # of AdamW, for one tensor; weight and residual have one each
BACKENDS = ("ring", "mpi", "nccl", "jaccl")
OPENBLAS = "libopenblas0-pthread"  # Debian's and Ubuntu's package


class Finding(NamedTuple):
    """One line of the examination."""

    name: str
    state: Literal["ok", "advice", "broken"]  # "advice": training works, and could do so better
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Every finding; each depends on those before it. Takes some seconds, most of them in a compiler."""
    checks: dict[str, Callable[[], Finding]] = {
        "MLX": _mlx,
        "device": _device,
        "mx.compile": _compile,
        "kernels": _kernels,
        "training": _training,
    }
    if _on_cpu():
        checks["matmul"] = _matmul
    checks |= {
        "processes": _processes,
        "mlx-lm": partial(_package, "mlx-lm", "lm", "`lora`, `demo` and `train`"),
        "matplotlib": partial(_package, "matplotlib", "plot", "`report` and pictures of schedules"),
    }
    return [_made(name, check) for name, check in checks.items()]


def training_works(findings: list[Finding]) -> bool:
    return all(finding.state != "broken" for finding in findings)


def lines(findings: list[Finding]) -> list[str]:
    """The findings for a person: a line for each, and the advice below it.

    >>> print("\\n".join(lines([Finding("MLX", "ok", "1.0"), Finding("matmul", "advice", "slow", "use another")])))
    ok      MLX         1.0
    advice  matmul      slow
                        -> use another
    """
    return [
        line
        for name, state, found, advice in findings
        for line in (f"{state:<8}{name:<12}{found}", *([f"{'':20}-> {advice}"] if advice else []))
    ]


def _made(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding of a check; an error of the check is a finding, too."""
    try:
        return check()
    except Exception as error:
        what = " ".join(str(error).split())
        if len(what) > 300:  # a compiler's complaint comes last
            what = f"{what[:100]} ... {what[-200:]}"
        return Finding(name, "broken", f"{type(error).__name__}: {what}", _remedy(str(error)))


def _remedy(error: str) -> str:
    cache = Path(tempfile.gettempdir()) / "mlx"
    if "shared library" in error:
        return f"a compiled kernel cannot be loaded; remove {cache}, which MLX fills again"
    if "compile function" in error:
        return "g++ is there but does not work; repair it, or take it off PATH to train without compiled kernels"
    return f"reinstall MLX (pip install --force-reinstall mlx), and remove {cache}, where it keeps compiled kernels"


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _mlx() -> Finding:
    backend = "CPU" if _on_cpu() else "Metal" if mx.metal.is_available() else "CUDA"
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return Finding("MLX", "ok", f"{version('mlx')}, {backend} backend, {system}")


def _device() -> Finding:
    info: dict[str, Any] = dict(mx.device_info())
    name = info["device_name"]
    if not _on_cpu():
        if mx.metal.is_available():
            usable = info["max_recommended_working_set_size"]
            return Finding("device", "ok", f"{name}, {_gb(info['memory_size'])}, {_gb(usable)} for the GPU")
        return Finding("device", "ok", f"{name}, {_gb(info['total_memory'])}, {_gb(info['free_memory'])} free")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{name}, {cores} cores, {_gb(memory)}"
    if shutil.which("nvidia-smi"):
        return Finding("device", "advice", found, f"for the NVIDIA GPU, {install('cuda13')} (or cuda12)")
    return Finding("device", "ok", found)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _compile() -> Finding:
    """Whether a function is traced once, and its kernel built from nothing: the cache of kernels must not hide a
    compiler that has gone."""
    traced = 0

    def function(x: mx.array) -> mx.array:
        nonlocal traced
        traced += 1
        return mx.tanh(3 * x) - mx.square(x)

    compiled = mx.compile(function)
    x = mx.array([0.0, 0.25]) + mx.array([0.0, 0.25])
    mx.eval(x)  # before the first evaluation of a process, MLX would trace once more
    start = time.perf_counter()
    # MLX keeps the kernels of the CPU in the system's temporary folder, which it asks for at each new kernel.
    with tempfile.TemporaryDirectory() as empty, patch.dict(os.environ, TMPDIR=empty):
        values = cast(list[float], [compiled(x).tolist() for _ in range(2)][-1])
    seconds = time.perf_counter() - start
    if values[0] != 0.0 or not math.isclose(values[1], math.tanh(1.5) - 0.25, abs_tol=1e-5):
        return Finding("mx.compile", "broken", f"a compiled function gave {values}", _remedy(""))
    if traced == 1:
        by = f" by {shutil.which('g++')}" if _on_cpu() else ""
        return Finding("mx.compile", "ok", f"traces once; a kernel is built in {seconds:.1f} s{by}")
    if _on_cpu() and shutil.which("g++") is None:
        how = "xcode-select --install" if platform.system() == "Darwin" else "apt-get install g++"
        return Finding(
            "mx.compile",
            "advice",
            "compiles nothing: there is no g++ in PATH; steps are slower",
            f"{how} (or the like)",
        )
    why = "unset MLX_DISABLE_COMPILE" if "MLX_DISABLE_COMPILE" in os.environ else "see whether g++ --version works"
    return Finding("mx.compile", "advice", "compiles nothing; steps are slower", why)


def _kernels() -> Finding:
    found = {dtype: _kernels_per_tensor(dtype) for dtype in KERNELS}
    text = ", ".join(f"{count:g} per {str(dtype).split('.')[-1]} tensor" for dtype, count in found.items())
    if found == KERNELS:
        return Finding("kernels", "ok", f"an AdamW update is {text}")
    return Finding("kernels", "advice", f"an AdamW update is {text}", "it should be 1 and 3; see mx.compile")


def _kernels_per_tensor(dtype: mx.Dtype) -> float:
    """Of one AdamW update, read from its graph: the difference that three more tensors make, divided by three."""
    counts = []
    for tensors in (1, 4):
        optimizer = AdamW(1e-3, lowering="fused")  # "auto" joins small tensors on a CPU
        parameters = {f"w{i}": mx.ones((8, 8), dtype) for i in range(tensors)}
        gradients = {path: mx.ones((8, 8), dtype) for path in parameters}
        optimizer.init(parameters)
        mx.eval(parameters, gradients, optimizer.state)
        new = optimizer.apply_gradients(gradients, parameters)
        arrays = [array for path in parameters for array in optimizer.state[path].values()]
        counts.append(sum(kernels([*new.values(), *arrays]).values()))
    return (counts[1] - counts[0]) / 3


def _training() -> Finding:
    """Twenty steps of a small bfloat16 network, with clipping and the guard."""
    mx.random.seed(0)
    x = mx.random.normal((64, 8)).astype(mx.bfloat16)
    y = x.sum(axis=1, keepdims=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    model.set_dtype(mx.bfloat16)
    optimizer = AdamW(1e-2, bias_correction=True, max_grad_norm=1.0, skip_nonfinite=True)
    step = make_step(model, lambda model, x, y: nn.losses.mse_loss(model(x), y), optimizer)
    losses, seconds = [], []
    for _ in range(20):
        start = time.perf_counter()
        losses.append(cast(float, step(x, y).loss.item()))
        seconds.append(time.perf_counter() - start)
    found = f"20 compiled bfloat16 steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        return Finding("training", "broken", f"{found}, which must be finite and fall", _remedy(""))
    return Finding("training", "ok", f"{found}, {1e3 * statistics.median(seconds):.1f} ms each")


def _matmul() -> Finding:
    """The CPU's matrix product, which a training step consists of."""
    n = 512
    a = mx.random.normal((n, n), key=mx.random.key(0))
    mx.eval(a @ a)
    speed = 2 * n**3 / min(timeit.repeat(lambda: mx.eval(a @ a), repeat=5, number=1)) / 1e9
    found = f"{speed:.0f} GFLOP/s in float32 ({blas.used()})"
    if not blas.is_slow():
        return Finding("matmul", "ok", found)
    return Finding("matmul", "advice", found, _faster_blas())


def _faster_blas() -> str:
    if os.environ.get(blas.VARIABLE) == "off":
        return f"unset {blas.VARIABLE} to use a faster library"
    found = f"apt-get install {OPENBLAS} (Debian, Ubuntu)"
    if platform.machine() == "x86_64":
        found = f"{install('blas')}, or {found},"
    refused = "".join(f"; {reason}" for reason in blas.refused())
    return f"{found} makes it many times faster{refused}"


def _processes() -> Finding:
    found = [name for name in BACKENDS if mx.distributed.is_available(backend=name)]
    if found:
        return Finding("processes", "ok", f"mlx.launch can use {', '.join(found)}")
    return Finding("processes", "advice", "no distributed backend", "training runs in one process; install Open MPI")


def _package(name: str, extra: str, purpose: str) -> Finding:
    try:
        importlib.import_module(name.replace("-", "_"))
    except Exception as error:
        found = "not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"
        return Finding(name, "advice", found, f"for {purpose}: {install(extra)}")
    return Finding(name, "ok", version(name))
