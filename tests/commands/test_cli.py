from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import compiled_adam
import pytest
from compiled_adam import cli
from compiled_adam.base.errors import InputError, TrainingStopped
from compiled_adam.cli import main
from compiled_adam.distributed.workers import Workers

DEMO = ("-m", "compiled_adam.cli", "demo", "--iters", "4", "--pretraining", "2")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("mine")
    assert main(DEMO[2:]) == 2
    said = "compiled-adam: demo exists and is not a demo's folder; name another one with --out\n"
    assert capsys.readouterr().err == said
    assert os.listdir(tmp_path / "demo") == ["thesis.txt"]


def test_wrong_flags_and_values(capsys) -> None:
    for arguments, message in (
        ((), "check whether this machine can train"),
        (("demo", "--steps", "3"), "demo has no option --steps"),
        (("demo", "--iters", "many"), "--iters is 'many'; it must be a whole number"),
        (("demo", "--iters", "0"), "iters is 0; it must be at least 1"),
        (("demo", "--seed", "-1"), "seed is -1; it must be in 0 to 4294967295"),
        (("demo", "--out", "/dev/null/x"), "Not a directory"),
    ):
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        errors = capsys.readouterr().err
        assert code == 2 and message in errors and "Traceback" not in errors, arguments


@pytest.mark.slow
def test_interrupt(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "compiled_adam.cli", "demo", "--pretraining", "100000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not process.stdout.readline().startswith("2. "):  # 100 000 updates
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "compiled-adam: interrupted"
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_reader_that_leaves(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} {' '.join(DEMO)} | head -n 1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.startswith("1. ")
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_version(capsys) -> None:
    try:
        main(["--version"])
    except SystemExit as stop:
        assert stop.code == 0
    assert capsys.readouterr().out == f"compiled-adam {compiled_adam.__version__}\n"


# What the command makes of errors. `demo` stands for any command here.


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Makes the command raise an error; gives a function that runs it."""

    def run(error: BaseException, *options: str) -> int:
        def demo(arguments: object) -> None:
            raise error

        monkeypatch.setattr(cli, "_demo", demo)
        return main([*options, "demo"])

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("iters is 0; it must be at least 1"), 2),
        (FileNotFoundError(2, "No such file or directory", "a/b.jsonl"), 2),
        (ConnectionError("cannot reach the hub"), 2),
        (ImportError("drawing needs matplotlib; install it with `pip install x`"), 2),
        (TrainingStopped("out of memory in iteration 3; nothing was saved"), 1),
        (KeyboardInterrupt("stopped by SIGINT after iteration 3; all is saved"), 130),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(error: BaseException, code: int, failing, capsys) -> None:
    assert failing(error) == code
    assert capsys.readouterr().err == f"compiled-adam: {error}\n"


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError])
def test_every_other_error_keeps_its_traceback(kind: type[Exception], failing, capsys) -> None:
    with pytest.raises(kind, match="a bug"):
        failing(kind("a bug"))
    assert capsys.readouterr().err == ""


def test_debug_shows_the_traceback_of_any_error(failing) -> None:
    with pytest.raises(InputError):
        failing(InputError("iters is 0"), "--debug")


@pytest.fixture
def pythons_own_handler():
    """Also where the tests run in the background and inherit that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_ctrl_c_breaks_is_no_error(pythons_own_handler, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """At a terminal it also ends the compiler that MLX is waiting for, and MLX raises before Python sees the signal."""

    def before(arguments: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("could not load a library") from None

    def after(arguments: object) -> None:
        def late(seconds: float) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(cli.time, "sleep", late)
        raise RuntimeError("could not load a library")

    for demo in (before, after):
        monkeypatch.setattr(cli, "_demo", demo)
        assert main(["demo"]) == 130
        assert capsys.readouterr().err == "compiled-adam: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_further_ctrl_c_while_the_first_is_told(pythons_own_handler, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(message: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def demo(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_demo", demo)
    monkeypatch.setattr(cli, "_tell", tell)
    assert main(["demo"]) == 130


@pytest.mark.parametrize(
    "at", ["as it was raised", "as the watchdog ends", "as it gets its words", "on its way out", "as it is told"]
)
def test_a_launcher_ends_a_worker_that_is_about_to_say_why_it_ends(at: str, monkeypatch, capsys) -> None:
    """`mlx.launch` sends SIGTERM to the others when a worker has ended, at any moment."""
    workers = Workers(SimpleNamespace(rank=lambda: 0, size=lambda: 1), 6.0)
    workers.many = True
    monkeypatch.setattr(workers, "_open", ExitStack())
    if at == "as the watchdog ends":
        workers._open.callback(signal.raise_signal, signal.SIGTERM)
    workers.saved = "there is a checkpoint"

    def then_ended(function):
        def called(*arguments):
            signal.raise_signal(signal.SIGTERM)
            return function(*arguments)

        return called

    if at == "as it gets its words":
        monkeypatch.setattr(workers, "_explain", then_ended(workers._explain))
    if at == "as it is told":
        monkeypatch.setattr(cli, "_tell", then_ended(cli._tell))

    def command(_) -> None:
        try:
            with workers:
                try:
                    raise RuntimeError("[ring] Too many send/recv errors")
                finally:
                    if at == "as it was raised":
                        signal.raise_signal(signal.SIGTERM)
        finally:
            if at == "on its way out":
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(workers, "_watchdog", nullcontext())
    monkeypatch.setattr(cli, "_doctor", command)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert "another worker has ended ([ring] Too many" in said and "there is a checkpoint" in said
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_closes_what_is_open(monkeypatch, capsys) -> None:
    closed = []

    def command(_) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            closed.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(cli, "_doctor", command)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 143 and closed == [signal.SIG_DFL]  # a second one would end the process at once
