"""``python -m bench``: what an update costs, ours against what else there is; and what the policies do to a loss."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import measure, memory, models, numerics, plots, tables, update
from .contenders import CONTENDERS, DEFAULT, NOT_MEASURED, named
from .environment import SCHEMA, blas_hint, environment
from .models import Shapes
from .workloads import DTYPES, QUICK, WORKLOADS, of_model

Outcome = tuple[Any, list[Table]]
# Which options mean something to which part; the others take all that any of them takes.
OPTIONS = {
    "workload": {"update", "memory"},
    "dtype": {"update", "memory", "quality"},
    "contender": {"update", "memory"},
    "model": {"update", "memory", "step"},
    "seconds": {"update", "distributed"},
    "scale": {"update"},
    "steps": {"quality"},
    "plot": {"update", "numerics", "quality"},
}
NEED_MLX_LM = ("step", "traces", "quality")


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
        self.interrupted = False

    def run(self) -> Iterator[Table]:
        """The tables of each part when it has been measured, and is in the record."""
        names = list(PARTS) if self.arguments.what == "all" else [self.arguments.what]
        printed: list[Table]
        for name in names:
            if why := _lacking(name):
                self.record[name], printed = [{NOT_MEASURED: why}], []
                self._remark(why)
            else:
                self.record[name], printed = PARTS[name](self)
            self.record["complete"] = name == names[-1] and not self.interrupted
            self.save()
            yield from printed
            if self.interrupted:
                return

    def save(self) -> None:
        """Writes what there is of the record to ``--json``."""
        if self.arguments.json:
            self.arguments.json.write_text(json.dumps(self.record, indent=1) + "\n")

    def _kept(self, name: str, rows: Iterator[update.Row]) -> list[update.Row]:
        """The rows, each in the record and on the disk when it is measured: what ends a run early loses none.

        Ctrl-C ends them, and there are tables of those until then.
        """
        found = self.record[name] = []
        try:
            for row in rows:
                found.append(row)
                self.save()
        except KeyboardInterrupt:
            self.interrupted = True
        return found

    def update(self) -> Outcome:
        bandwidth = self.record["bandwidth"] = measure.bandwidth()
        names, dtypes, seconds = named(self.arguments.contender), self._dtypes(DTYPES), self._seconds()
        found = self._kept("update", update.rows(self._workloads(), dtypes, names, seconds, bandwidth["best"]))
        printed = update.tables(found, self.environment, bandwidth)
        if self.arguments.scale and not self.interrupted:
            grown = self._kept("scale", update.scale(dtypes, names, seconds, bandwidth["best"]))
            printed.append(update.scale_table(grown, self.environment))
        self._remark(update.warning(found + self.record.get("scale", [])))
        return found, printed

    def step(self) -> Outcome:
        from . import step  # here, because it needs mlx-lm

        self._remark(blas_hint(self.environment["blas"]))
        figures = step.measure(self.arguments.model, rounds=2 if self.quick else 7, windows=3 if self.quick else 6)
        rows = [{"contender": name, **row} for name, row in figures.items()]
        self._remark(update.warning(rows))
        return rows, [tables.step(rows, step.REFERENCE, self.environment)]

    def traces(self) -> Outcome:
        from . import traces

        record = traces.measure(4 if self.quick else len(traces.LENGTHS))
        return record, [traces.table(record, self.environment)]

    def memory(self) -> Outcome:
        on_mlx = tuple(name for name, entry in CONTENDERS.items() if not entry.needs)
        names = named(self.arguments.contender, DEFAULT if self.quick else on_mlx)
        found = self._kept("memory", memory.rows(self._workloads(), self._dtypes(DTYPES), names))
        return found, [memory.table(found, self.environment)]

    def saving(self) -> Outcome:
        from . import saving

        record = saving.measure(millions=10 if self.quick else 100, rounds=5 if self.quick else 15)
        return record, [tables.saving(record, self.environment)]

    def numerics(self) -> Outcome:
        rows = self._kept("numerics", numerics.measure(numerics.RATES[: 2 if self.quick else None]))
        return rows, [tables.of_numerics(rows, self.environment)]

    def quality(self) -> Outcome:
        from . import quality

        self._remark(blas_hint(self.environment["blas"]))
        steps = self.arguments.steps or (60 if self.quick else quality.STEPS)

        def runs() -> Iterator[update.Row]:
            for dtype in self._dtypes(quality.DTYPES):
                for seed in quality.SEEDS[: 1 if self.quick else None]:
                    for policy in quality.POLICIES[dtype]:
                        row = quality.train(policy, seed, dtype, steps)
                        yield row
                        loss = row["eval_loss"]
                        print(f"trained {dtype} weights, {policy}, seed {seed}: eval loss {loss:.4f}", file=sys.stderr)

        rows = self._kept("quality", runs())
        return rows, [tables.quality(rows, self.environment)]

    def distributed(self) -> Outcome:
        from . import distributed

        record, table = distributed.compare(self._seconds())
        return record, [table]

    def _seconds(self) -> float:
        given: float | None = self.arguments.seconds
        return given if given is not None else 3.0 if self.quick else 20.0

    def _dtypes(self, default: dict[str, Any]) -> list[str]:
        return list(dict.fromkeys(self.arguments.dtype or default))

    def _workloads(self) -> dict[str, Callable[[], Shapes]]:
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


PARTS: dict[str, Callable[[Bench], Outcome]] = {
    "update": Bench.update,
    "step": Bench.step,
    "traces": Bench.traces,
    "memory": Bench.memory,
    "saving": Bench.saving,
    "numerics": Bench.numerics,
    "quality": Bench.quality,
    "distributed": Bench.distributed,
}


def main() -> int:
    arguments = _parser().parse_args()
    if problem := _problem(arguments):
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    bench = Bench(arguments)
    if bench.environment["load_average"] > 0.5 * bench.environment["cores"]:
        bench.remarks.append(f"the machine was busy when this began: load {bench.environment['load_average']:.1f}")
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no width, and 80 columns would break the rows

    def show(what: Table | str) -> None:
        with console.capture() as text:  # and not to the console: it exits when nobody reads any longer
            console.print(what, markup=False, highlight=False, soft_wrap=isinstance(what, str))
        print(text.get(), end="", flush=True)

    try:
        for table in bench.run():
            show(table)
        for remark in bench.remarks:
            show(remark)
        if arguments.plot:
            for file in plots.write(bench.record, arguments.plot):
                show(f"wrote {file}")
    except KeyboardInterrupt:
        bench.interrupted = True
    except BrokenPipeError:  # the reader (head, less) has left; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if bench.interrupted:
        print("bench: interrupted; what had been measured is kept", file=sys.stderr)
        return 130
    return 0


def _lacking(part: str) -> str | None:
    """Why a part cannot be measured here, or None."""
    if part in NEED_MLX_LM and find_spec("mlx_lm") is None:
        return f"{part} needs mlx-lm; install it with pip install 'compiled-adam[lm]'"
    return None


def _problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with arguments that the parser has accepted, as a sentence; also resolves ``--model``."""
    for option, parts in OPTIONS.items():
        given = getattr(arguments, option)
        if given is not None and given is not False and arguments.what != "all" and arguments.what not in parts:
            return f"--{option} means nothing to {arguments.what}; it is for {', '.join(sorted(parts))}"
    if arguments.what != "all" and (sentence := _lacking(arguments.what)):
        return sentence
    if arguments.json and not arguments.json.parent.is_dir():
        return f"the folder of {arguments.json} does not exist; create it first"
    if arguments.plot and arguments.plot.exists() and not arguments.plot.is_dir():
        return f"{arguments.plot} is not a folder; --plot writes several files"
    if arguments.plot and (sentence := plots.missing()):
        return sentence
    arguments.workloads_of_model = {}
    if arguments.model:
        try:
            config = models.config_of(arguments.model)
            arguments.workloads_of_model = of_model(Path(arguments.model).resolve().name, config)
            for shapes in arguments.workloads_of_model.values():
                shapes()  # now, or a model that mlx-lm does not know would be an error in the middle
        except (ValueError, ImportError) as error:
            return str(error)
    folder = Path(arguments.model or "")
    if (
        arguments.model
        and arguments.what in ("step", "all")
        and folder.is_dir()
        and not [*folder.glob("*.safetensors")]
    ):
        return f"{folder} has no weights (*.safetensors), which step needs"
    try:  # now, and not when everything is measured; what a file has is kept until then
        if arguments.json:
            arguments.json.open("a").close()
        if arguments.plot:
            arguments.plot.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{error.filename} cannot be written: {error.strerror}"
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("what", nargs="?", choices=[*PARTS, "all"], default="update", help="default: update")
    add("--quick", action="store_true", help="less of everything, and the smaller workloads")
    add("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    add(
        "--plot",
        type=Path,
        metavar="FOLDER",
        help="also draw update, scale, numerics and quality as SVG files in this folder",
    )
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
    add("--seconds", type=_seconds, help="for update, for each workload and dtype (default: 20, --quick: 3)")
    add("--scale", action="store_true", help="for update: also sweep over parameters and over tensors")
    add("--steps", type=_steps, help="for quality, of training (default: 600, --quick: 60)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
