"""The command ``compiled-adam``."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import __version__
from .base import InputError, TrainingStopped, lenient_streams, while_handling
from .finetune.packages import needed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code.

    0; 1 for training that could not go on, or by `doctor`'s word could not begin; 2 for input that cannot be used;
    130 after Ctrl-C, 143 after SIGTERM. An error of another kind is a fault of the program, and is raised.
    """
    with lenient_streams():
        try:
            with _Interrupts() as interrupts:
                return _run(argv, interrupts)
        except KeyboardInterrupt:  # a further one, while the first was being told
            return 130


def _run(argv: Sequence[str] | None, interrupts: _Interrupts) -> int:
    parser = _parser()
    # What follows `lora` and `plan` is for mlx-lm's parser, whose import takes a second; `schedule` has a parser for
    # each name.
    arguments, rest = parser.parse_known_args(argv)
    arguments.rest = rest
    if rest and arguments.command not in (_lora, _plan, _schedule):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code: int | None = arguments.command(arguments)
        return code or 0
    except KeyboardInterrupt as error:
        _tell(str(error) or "interrupted")
        return 130
    except SystemExit as ended:
        # SIGTERM, while an error was on its way here: a launcher sends it when another worker has ended.
        if (stopped := while_handling(ended, lambda error: isinstance(error, TrainingStopped))) is None:
            raise
        _tell(str(stopped))
        return 1
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, TrainingStopped) and interrupts.soon():
            # Ctrl-C ends every process of a terminal, as the compiler that MLX is waiting for: its failure came first.
            _tell("interrupted")
            return 130
        if arguments.debug or not _is_told(error):
            raise
        _tell(str(error))
        return 1 if isinstance(error, TrainingStopped) else 2


class _Interrupts:
    """A context in which Ctrl-C raises KeyboardInterrupt as usual, and SIGTERM raises SystemExit(143).

    So open files are closed. A second SIGTERM ends the process at once. ``seen`` says whether there was a Ctrl-C."""

    seen = False

    def __enter__(self) -> _Interrupts:
        # Only in place of Python's own handlers, not of those of a caller.
        handlers = {
            signal.SIGINT: (signal.default_int_handler, self._note),
            signal.SIGTERM: (signal.SIG_DFL, self._end),
        }
        main = threading.current_thread() is threading.main_thread()
        self._before = {n: old for n, (old, _) in handlers.items() if main and signal.getsignal(n) is old}
        for number in self._before:
            signal.signal(number, handlers[number][1])
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def soon(self) -> bool:
        """Whether there was a Ctrl-C, or comes in a moment: a signal does not reach all processes at the same time."""
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(0.0 if self.seen else 0.1)
        return self.seen

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.default_int_handler(number, frame)

    def _end(self, number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(143)


def _is_told(error: Exception) -> bool:
    """Whether a user can mend the cause of an error, so that its message is shown without a traceback."""
    missing_package = isinstance(error, ImportError) and "install" in str(error)  # the message says what to install
    return isinstance(error, (InputError, OSError, TrainingStopped)) or missing_package


def _tell(message: str) -> None:
    print(f"compiled-adam: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compiled-adam",
        description="Fine-tunes language models on Apple's MLX, with float32 arithmetic for half-precision weights and"
        " exact resume.",
        epilog="Begin with doctor and demo. compiled-adam COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"compiled-adam {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="make a small language model and fine-tune it; needs no network",
        description="Makes a small language model and trains it a little. Then fine-tunes all its weights: in bfloat16"
        " with stock AdamW and with ours, and in float32. Takes about a minute, and needs no network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="the folder for model, runs and report")
    demo.add_argument("--iters", type=int, default=200, help="iterations of each fine-tuning")
    demo.add_argument("--pretraining", type=int, default=200, help="iterations of the training before the fine-tuning")
    demo.add_argument("--seed", type=int, default=0, help="the seed of the weights and of the order of the batches")
    demo.set_defaults(command=_demo)
    told = "fine-tune a model, with the flags and files of mlx_lm.lora"
    commands.add_parser("lora", help=told, add_help=False).set_defaults(command=_lora)
    told = "compute the memory and communication of a job from the model's config.json"
    commands.add_parser("plan", help=told, add_help=False).set_defaults(command=_plan)
    report = commands.add_parser(
        "report",
        help="draw one or more runs as one HTML file",
        description="Draws the runs of one or more folders of adapters as one HTML file. Needs matplotlib.",
    )
    report.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="a folder of adapters that `lora` wrote"
    )
    report.add_argument("--out", type=Path, help="the file to write (default: report.html in the first folder)")
    report.set_defaults(command=_report)
    told = "draw a learning rate schedule in the terminal, or as a picture"
    commands.add_parser("schedule", help=told, add_help=False).set_defaults(command=_schedule)
    doctor = commands.add_parser(
        "doctor",
        help="check whether this machine can train, and give advice",
        description="Runs a small training and prints a line for each check, with advice below it. The exit code is 0"
        " if training works, and 1 if it does not.",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(command=_doctor)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from .commands import doctor

    findings = doctor.examine()
    works = doctor.training_works(findings)
    if arguments.json:
        print(json.dumps({"training_works": works, "findings": [each._asdict() for each in findings]}, indent=1))
    else:
        print("\n".join(doctor.lines(findings)))
        print("training works" if works else "training does not work on this machine as it is")
    return 0 if works else 1


def _schedule(arguments: argparse.Namespace) -> None:
    from .commands import schedule

    schedule.main(arguments.rest)


def _report(arguments: argparse.Namespace) -> None:
    from .commands import report  # here, because it imports matplotlib, which is optional

    out = arguments.out or arguments.folders[0] / "report.html"
    report.write(arguments.folders, out)
    print(f"wrote {out}")


def _lora(arguments: argparse.Namespace) -> None:
    with needed("fine-tuning", "mlx-lm", "lm"):
        from .commands import lora
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # which wants every parameter by name
    lora.main(arguments.rest)


def _plan(arguments: argparse.Namespace) -> int:
    with needed("plan", "mlx-lm", "lm"):
        from .commands import plan
    return plan.main(arguments.rest)


def _show_warning(message: Warning | str, *_: object) -> None:
    """One line, without the place in the source, which tells a user nothing."""
    print(f"warning: {message}", file=sys.stderr)


def _demo(arguments: argparse.Namespace) -> None:
    with needed("the demo", "mlx-lm", "lm"):
        from .commands import demo
    demo.run(arguments.out, arguments.pretraining, arguments.iters, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
