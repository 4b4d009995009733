from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import kernels

kernels.separate()
os.environ["HF_HUB_OFFLINE"] = "1"  # before Hugging Face's packages are imported

from compiled_adam import cli  # noqa: E402

# compiled_adam comes before MLX, which then has a fast BLAS.
# isort: split

import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A shell that starts pytest in the background lets it ignore Ctrl-C, and so every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time: a run of the tests must not depend on luck.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")
ROOT = Path(__file__).parent.parent


def python_blocks(page: Path) -> list[str]:
    """The Python code in a Markdown file, which tests run."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


# These start processes of Python, each of which imports mlx-lm for two seconds.
PROCESSES = {"run", "start", "steps", "fine", "ran"}


@pytest.hookimpl(tryfirst=True)  # before what `-m` leaves out is chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow: Counter[Path] = Counter()
    for item in items:
        if PROCESSES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        slow[item.path] += item.get_closest_marker("slow") is not None
    # The longest files first, so that of two processes of pytest none is alone at the end.
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    gc.freeze()  # else each garbage collection of a test visits all that pytest has collected


def pytest_sessionfinish() -> None:
    kernels.keep()


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(0)


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """For a test of what the CPU does, whatever the default device is."""
    with mx.stream(mx.cpu):
        yield


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """The garbage collector neither visits nor lists what exists already. Else counting takes most of a test's time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 0.3 M random parameters and its tokenizer."""
    from compiled_adam.commands.small_model import make_model, texts

    folder = tmp_path_factory.mktemp("tiny") / "model"
    mx.random.seed(0)
    make_model(folder, texts()[1])
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that mlx_lm.lora accepts; pieces of one length, so that accumulation is over equal batches."""
    from compiled_adam.commands.small_model import texts

    folder = tmp_path_factory.mktemp("data")
    text = texts()[1]
    pieces = [json.dumps({"text": text[i : i + 100]}) for i in range(0, 4000, 100)]
    for name, part in (("train", pieces[:24]), ("valid", pieces[24:32]), ("test", pieces[32:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python with arguments in an empty folder, without waiting for ever."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``compiled-adam`` in this process, which saves two seconds of imports; for what is not about processes."""

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command changes
        capsys.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return command


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, which is quicker: its exit code, output and errors."""

    from bench import __main__ as command

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        try:
            code = command.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workload that takes no time, in place of those that do."""
    from bench import __main__ as command
    from bench import apart

    monkeypatch.setattr(command, "WORKLOADS", {"small": lambda: {"a": (8, 8), "b": (3,)}})
    monkeypatch.setattr(command, "QUICK", ("small",))
    monkeypatch.setattr("bench.measure.bandwidth", lambda: {"scale": 1e9, "triad": 2e9, "best": 2e9})
    monkeypatch.setattr("bench.apart.Apart", apart.here)  # a new process takes a second to start
