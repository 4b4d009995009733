"""The command ``compiled-adam``."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import __version__
from .base import InputError, TrainingStopped, is_lost, lenient_streams, while_handling
from .commands.parsing import PROGRAM, Parser, commands_of
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
    debug = False
    try:
        arguments = _arguments(argv)
        debug = arguments.debug
        code: int | None = arguments.command(arguments)
        return code or 0
    except KeyboardInterrupt as error:
        _tell(str(error) or "interrupted")
        return 130
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, TrainingStopped) and interrupts.soon():
            # Ctrl-C ends every process of a terminal, as the compiler that MLX is waiting for: its failure came first.
            _tell("interrupted")
            return 130
        # A user can mend the cause of these: the message is enough. That of a missing package says what to install.
        missing_package = isinstance(error, ImportError) and "install" in str(error)
        if debug or not (missing_package or isinstance(error, (InputError, OSError, TrainingStopped))):
            raise
        _tell(str(error))
        return 1 if isinstance(error, TrainingStopped) else 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line, with the function that runs it as ``command``."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # What follows `lora` and `plan` is for mlx-lm's parser, whose import takes a second; `schedule` has a parser for
    # each name.
    arguments.rest = rest
    if rest and arguments.command not in (_lora, _plan, _schedule):
        chosen = parser if arguments.name is None else commands_of(parser)[arguments.name]
        chosen.refuse(rest)
    return arguments


class _Interrupts:
    """A context in which Ctrl-C raises KeyboardInterrupt as usual, and SIGTERM raises SystemExit(143).

    So open files are closed. A second SIGTERM ends the process at once. ``seen`` says whether there was a Ctrl-C.

    A training that is already ending because of an error goes on with that, and says why: when a worker has ended, a
    launcher sends SIGTERM to the others, at any moment.
    """

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
        error = sys.exc_info()[1]
        if error is None or not while_handling(error, lambda each: isinstance(each, TrainingStopped) or is_lost(each)):
            raise SystemExit(143)


def _tell(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [options]",
        description="Fine-tunes language models on Apple's MLX, with float32 arithmetic for half-precision weights and"
        " exact resume.",
        epilog="Begin with doctor and demo. compiled-adam COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"compiled-adam {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh"),
        metavar="SHELL",
        help="print a script for the tab key in bash or zsh",
    )
    parser.set_defaults(command=_without_command)
    _add_commands(parser)
    return parser


def _add_commands(parser: Parser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name", prog=PROGRAM)
    init = commands.add_parser(
        "init",
        help="write a YAML file with every option of lora",
        description="Writes a YAML file for `lora --config`. It has every option with its meaning and its default, as"
        " comments. Replaces no file.",
    )
    init.add_argument(
        "file", type=Path, nargs="?", default=Path("lora.yaml"), metavar="FILE", help="default: lora.yaml"
    )
    init.set_defaults(command=_init)
    demo = commands.add_parser(
        "demo",
        help="make a small model and fine-tune it, without network",
        description="Makes a small language model and trains it a little. Then fine-tunes all its weights: in bfloat16"
        " with stock AdamW and with ours, and in float32. Takes about a minute, and needs no network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="the folder for model, runs and report")
    demo.add_argument("--iters", type=int, default=200, help="iterations of each fine-tuning")
    demo.add_argument("--pretraining", type=int, default=200, help="iterations of the training before the fine-tuning")
    demo.add_argument("--seed", type=int, default=0, help="the seed of the weights and of the order of the batches")
    demo.set_defaults(command=_demo)
    told = "fine-tune a model, with the flags of mlx_lm.lora"
    commands.add_parser("lora", help=told, add_help=False).set_defaults(command=_lora)
    told = "compute the memory that a job needs"
    commands.add_parser("plan", help=told, add_help=False).set_defaults(command=_plan)
    report = commands.add_parser(
        "report",
        help="draw one or more runs as one HTML file",
        description="Draws the runs of one or more folders of adapters as one HTML file, which needs no network. It"
        " says whether the training worked, and has charts, samples and settings.",
    )
    report.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="a folder of adapters that `lora` wrote"
    )
    report.add_argument("--out", type=Path, help="the file to write (default: report.html in the first folder)")
    report.add_argument(
        "--watch", action="store_true", help="draw again while the runs go on, until they end or you press Ctrl-C"
    )
    report.set_defaults(command=_report)
    told = "draw a learning rate schedule"
    commands.add_parser("schedule", help=told, add_help=False).set_defaults(command=_schedule)
    doctor = commands.add_parser(
        "doctor",
        help="check whether this machine can train",
        description="Runs a small training and prints a line for each check, with advice below it. The exit code is 0"
        " if training works, and 1 if it does not.",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(command=_doctor)


def _without_command(arguments: argparse.Namespace) -> int:
    if arguments.print_completion is None:
        _parser().print_help(sys.stderr)
        return 2
    from .commands import completion

    print(completion.script(_parser(), arguments.print_completion))
    return 0


def _init(arguments: argparse.Namespace) -> None:
    with needed("fine-tuning", "mlx-lm", "lm"):
        from .commands import init
    init.write(arguments.file)
    print(f"wrote {arguments.file}; edit it, then: compiled-adam lora -c {shlex.quote(str(arguments.file))} --train")


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
    from .commands import report

    out = arguments.out or arguments.folders[0] / "report.html"
    if arguments.watch:
        report.watch(arguments.folders, out)
    else:
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
