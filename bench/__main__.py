"""``python -m bench``: the questions, their options, the record, and what a person sees."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import memory, models, numerics, update
from .contenders import CONTENDERS, DEFAULT, NOT_MEASURED, named
from .environment import SCHEMA, blas_hint, environment, load_line
from .measure import Row, Stage
from .progress import Progress
from .tables import warning
from .workloads import DTYPES, QUICK, WORKLOADS, Workloads

# Which options mean something to which part; the others take all that any of them takes.
OPTIONS = {
    "workload": {"update", "memory"},
    "dtype": {"update", "memory", "quality"},
    "contender": {"update", "memory"},
    "model": {"update", "memory", "step"},
    "seconds": {"update"},
    "steps": {"quality"},
}
QUESTIONS = (
    "ours beside stock MLX: how long one update takes (update), how fast a whole step is (step), what an update"
    " allocates (memory), how well a small model trains (quality), how far half-precision weights move (numerics)"
)
NEED_MLX_LM = ("step", "quality")
QUICK_SECONDS = 50.0  # for the stages of a part with --quick; 10 more for the rest of what a minute must hold


class Part(NamedTuple):
    """One question: its stages, the table of the rows in the record, and those rows from the rows of the stages."""

    stages: list[Stage]
    table: Callable[[list[Row], Row], Table]
    rows: Callable[[list[Row]], list[Row]] = list


class Bench:
    """One run: the arguments, the record so far, and what to print besides tables."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.quick: bool = arguments.quick
        self.environment = environment()
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "command": ["python", "-m", "bench", *sys.argv[1:]],
            "environment": self.environment,
            "complete": False,
        }
        self.remarks: list[str] = []
        self.interrupted = self.shortened = False
        self.stack = ExitStack()  # what a part's stages need until the end

    def run(self) -> Iterator[Table]:
        """The table of each part when it has been measured, and is in the record."""
        names = list(PARTS) if self.arguments.what == "all" else [self.arguments.what]
        with self.stack:
            for name in names:
                if why := _lacking(name):
                    self.record[name] = [{NOT_MEASURED: why}]
                    self._remark(why)
                else:
                    part = PARTS[name](self)
                    self._measure(name, part)
                    if rows := self.record.get(name):
                        yield part.table(rows, self.environment)
                        self._remark(warning(rows))
                if self.interrupted:
                    return
                self.record["complete"] = name == names[-1] and not self.shortened
                self.save()

    def _measure(self, name: str, part: Part) -> None:
        """Each stage's rows are in the record and on the disk when it ends: what ends a run early loses none.

        Ctrl-C ends the stages, and there is a table of those until then.
        """
        found: list[Row] = []
        times = [time.monotonic()]  # when the first stage began, and when each ended
        try:
            with Progress(name, len(part.stages)) as progress:
                for label, rows in part.stages:
                    if self.quick and _late(times):
                        self.shortened = True
                        self._remark(f"--quick ended {name} before {label}; without --quick everything is measured")
                        break
                    progress.begin(label)
                    found += rows()
                    times.append(time.monotonic())
                    self.record[name] = part.rows(found)
                    self.save()
        except KeyboardInterrupt:
            self.interrupted = True

    def save(self) -> None:
        """Writes what there is of the record to ``--json``."""
        if self.arguments.json:
            self.arguments.json.write_text(json.dumps(self.record, indent=1) + "\n")

    def update(self) -> Part:
        given: float | None = self.arguments.seconds
        seconds = given if given is not None else 2.0 if self.quick else 20.0
        bandwidth = self.record["bandwidth"] = {}
        names = named(self.arguments.contender)
        return Part(
            update.stages(self._workloads(), self._dtypes(DTYPES), names, seconds, bandwidth, 1 if self.quick else 3),
            lambda rows, environment: update.table(rows, environment, bandwidth),
        )

    def step(self) -> Part:
        from . import step  # here, because it needs mlx-lm

        self._remark(blas_hint())
        model = self.arguments.model
        chosen = step.of_model(model) if model else step.QUICK if self.quick else step.JOBS
        made = self.stack.enter_context(step.folders(chosen))
        stages = step.stages(made, chosen, rounds=2 if self.quick else 3)
        return Part(stages, step.table, step.summary)

    def memory(self) -> Part:
        on_mlx = tuple(name for name, entry in CONTENDERS.items() if not entry.needs)
        names = named(self.arguments.contender, DEFAULT if self.quick else on_mlx)
        return Part(memory.stages(self._workloads(), self._dtypes(DTYPES), names), memory.table)

    def quality(self) -> Part:
        from . import quality

        self._remark(blas_hint())
        steps = self.arguments.steps or (60 if self.quick else quality.STEPS)
        seeds = quality.SEEDS[: 1 if self.quick else None]
        size = quality.QUICK if self.quick else quality.Size()
        return Part(quality.stages(self._dtypes(quality.DTYPES), seeds, steps, size), quality.table)

    def numerics(self) -> Part:
        return Part(numerics.stages(numerics.RATES[: 2 if self.quick else None]), numerics.table)

    def _dtypes(self, default: dict[str, Any]) -> list[str]:
        return list(dict.fromkeys(self.arguments.dtype or default))

    def _workloads(self) -> Workloads:
        names = self.arguments.workload
        of_user = self.arguments.workloads_of_model
        if names is None and not of_user:
            names = QUICK if self.quick else list(WORKLOADS)
            left_out = [name for name in WORKLOADS if name not in names]
            if left_out:
                self._remark(f"--quick leaves out {', '.join(left_out)}; --workload NAME measures one of them")
        return {name: WORKLOADS[name] for name in names or []} | of_user

    def _remark(self, sentence: str | None) -> None:
        if sentence and sentence not in self.remarks:
            self.remarks.append(sentence)


PARTS: dict[str, Callable[[Bench], Part]] = {
    "update": Bench.update,
    "step": Bench.step,
    "memory": Bench.memory,
    "quality": Bench.quality,
    "numerics": Bench.numerics,
}


def main() -> int:
    arguments = _parser().parse_args()
    if problem := _problem(arguments):
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    bench = Bench(arguments)
    try:
        for what in _said(bench):
            try:
                _show(what)
            except BrokenPipeError:  # the reader (head, less) has left; Python would complain once more at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if not arguments.json:  # which is still wanted
                    return 0
    except KeyboardInterrupt:
        bench.interrupted = True
    if bench.interrupted:
        print("bench: interrupted; what had been measured is kept", file=sys.stderr)
        return 130
    return 0


def _late(times: list[float]) -> bool:
    """Whether another stage, half as long again as the longest so far, would end after `QUICK_SECONDS`."""
    longest = max((after - before for before, after in itertools.pairwise(times)), default=0.0)
    return times[-1] - times[0] + 1.5 * longest > QUICK_SECONDS


def _said(bench: Bench) -> Iterator[Table | str]:
    yield load_line(bench.environment)
    yield from bench.run()
    yield from bench.remarks


def _show(what: Table | str) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no width, and 80 columns would break the rows
    with console.capture() as text:  # and not to the console: it exits when nobody reads any longer
        console.print(what, markup=False, highlight=False, soft_wrap=isinstance(what, str))
    print(text.get(), end="", flush=True)


def _lacking(part: str) -> str | None:
    """Why a part cannot be measured here, or None."""
    if part in NEED_MLX_LM and find_spec("mlx_lm") is None:
        return f"{part} needs mlx-lm; install it with pip install 'compiled-adam[lm]'"
    return None


def _problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with arguments that the parser has accepted, as a sentence; also resolves ``--model``."""
    for option, parts in OPTIONS.items():
        if getattr(arguments, option) is not None and arguments.what not in {"all", *parts}:
            return f"--{option} means nothing to {arguments.what}; it is for {', '.join(sorted(parts))}"
    if arguments.what != "all" and (sentence := _lacking(arguments.what)):
        return sentence
    if arguments.json and not arguments.json.parent.is_dir():
        return f"the folder of {arguments.json} does not exist; create it first"
    arguments.workloads_of_model = {}
    if arguments.model and (sentence := _problem_of_model(arguments)):
        return sentence
    try:  # now, and not when everything is measured; what a file has is kept until then
        if arguments.json:
            arguments.json.open("a").close()
    except OSError as error:
        return f"{error.filename} cannot be written: {error.strerror}"
    return None


def _problem_of_model(arguments: argparse.Namespace) -> str | None:
    folder = Path(arguments.model)
    try:
        arguments.workloads_of_model = models.of_model(folder.resolve().name, models.config_of(arguments.model))
        for shapes in arguments.workloads_of_model.values():
            shapes()  # now, or a model that mlx-lm does not know would be an error in the middle
    except (ValueError, ImportError) as error:
        return str(error)
    if arguments.what in ("step", "all") and folder.is_dir() and not [*folder.glob("*.safetensors")]:
        return f"{folder} has no weights (*.safetensors), which step needs"
    return None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError
    return seconds


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 1:
        raise ValueError
    return steps


_seconds.__name__, _steps.__name__ = "number of seconds", "number of steps"  # argparse says "invalid ... value"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage in front."""

    def error(self, message: str) -> Any:
        self.exit(2, f"bench: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m bench", description=QUESTIONS)
    add = parser.add_argument
    add("what", nargs="?", choices=[*PARTS, "all"], default="update", help="default: update")
    add("--quick", action="store_true", help="less of everything: each part ends within a minute")
    add("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    add("--workload", action="append", choices=list(WORKLOADS), help="for update and memory; repeatable")
    add(
        "--model",
        metavar="PATH_OR_ID",
        help="for update and memory: LoRA r=8 and full trees of this one; for step: this",
    )
    add("--dtype", action="append", choices=list(DTYPES), help="of the parameters; repeatable")
    add(
        "--contender",
        action="append",
        choices=[*CONTENDERS, "all"],
        metavar="NAME",
        help=f"for update and memory, beside stock MLX; repeatable: {', '.join(CONTENDERS)}, all",
    )
    add("--seconds", type=_seconds, help="for update, for each workload and dtype (default: 20, --quick: 2)")
    add("--steps", type=_steps, help="for quality, of training (default: 600, --quick: 60)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
