"""``python -m bench``: what an update costs, ours against what else there is; and what the policies do to a loss."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import measure, memory, models, numerics, plots, tables, update
from .contenders import CONTENDERS, DEFAULT, named
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
    "plot": {"update", "quality"},
}


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
        }
        self.remarks: list[str] = []

    def run(self) -> list[Table]:
        parts = PARTS if self.arguments.what == "all" else {self.arguments.what: PARTS[self.arguments.what]}
        printed = []
        for name, part in parts.items():
            self.record[name], its_tables = part(self)
            printed += its_tables
        return printed

    def update(self) -> Outcome:
        bandwidth = self.record["bandwidth"] = measure.bandwidth()
        seconds = self.arguments.seconds
        if seconds is None:
            seconds = 3.0 if self.quick else 20.0
        names, dtypes = named(self.arguments.contender), self.arguments.dtype or list(DTYPES)
        found = update.rows(self._workloads(), dtypes, names, seconds, bandwidth["best"])
        printed = update.tables(found, self.environment, bandwidth)
        if self.arguments.scale:
            self.record["scale"] = update.scale(dtypes, names, seconds, bandwidth["best"])
            printed.append(update.scale_table(self.record["scale"], self.environment))
        self._remark(update.warning(found + self.record.get("scale", [])))
        return found, printed

    def step(self) -> Outcome:
        from . import step  # here, because it needs mlx-lm

        self._remark(blas_hint(self.environment["blas"]))
        figures = step.measure(self.arguments.model, rounds=2 if self.quick else 7, windows=3 if self.quick else 6)
        rows = [{"contender": name, **row} for name, row in figures.items()]
        return rows, [tables.step(rows, step.REFERENCE, self.environment)]

    def traces(self) -> Outcome:
        from . import traces

        record = traces.measure(4 if self.quick else len(traces.LENGTHS))
        return record, [traces.table(record, self.environment)]

    def memory(self) -> Outcome:
        on_mlx = tuple(name for name, entry in CONTENDERS.items() if not entry.needs)
        names = named(self.arguments.contender, DEFAULT if self.quick else on_mlx)
        found = memory.rows(self._workloads(), self.arguments.dtype or list(DTYPES), names)
        return found, [memory.table(found, self.environment)]

    def saving(self) -> Outcome:
        from . import saving

        record = saving.measure(millions=10 if self.quick else 100, rounds=5 if self.quick else 15)
        return record, [tables.saving(record, self.environment)]

    def numerics(self) -> Outcome:
        rows = numerics.measure()
        return rows, [tables.of_numerics(rows, self.environment)]

    def quality(self) -> Outcome:
        from . import quality

        self._remark(blas_hint(self.environment["blas"]))
        steps = self.arguments.steps or (60 if self.quick else quality.STEPS)
        rows = []
        for dtype in self.arguments.dtype or list(quality.DTYPES):
            for seed in quality.SEEDS[: 1 if self.quick else None]:
                for policy in quality.POLICIES[dtype]:
                    rows.append(quality.train(policy, seed, dtype, steps))
                    loss = rows[-1]["eval_loss"]
                    print(f"trained {dtype} weights, {policy}, seed {seed}: eval loss {loss:.4f}", file=sys.stderr)
        return rows, [tables.quality(rows, self.environment)]

    def distributed(self) -> Outcome:
        from . import distributed

        record, table = distributed.compare(self.arguments.seconds or (3.0 if self.quick else 20.0))
        return record, [table]

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
    if arguments.plot:
        arguments.plot.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    busy = bench.environment["load_average"] > 0.5 * (os.cpu_count() or 1)
    if busy:
        bench.remarks.append(f"the machine was busy when this began: load {bench.environment['load_average']:.1f}")
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no width, and 80 columns would break the rows
    for table in bench.run():
        console.print(table)
    for remark in bench.remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(bench.record, indent=1) + "\n")
    if arguments.plot:
        for file in plots.write(bench.record, arguments.plot):
            console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with arguments that the parser has accepted, as a sentence; also resolves ``--model``."""
    for option, parts in OPTIONS.items():
        if getattr(arguments, option) and arguments.what != "all" and arguments.what not in parts:
            return f"--{option} means nothing to {arguments.what}; it is for {', '.join(sorted(parts))}"
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
        except (ValueError, ImportError) as error:
            return str(error)
        arguments.workloads_of_model = of_model(Path(arguments.model).name, config)
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
    add("--plot", type=Path, metavar="FOLDER", help="also draw update, scale and quality as SVG files in this folder")
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
