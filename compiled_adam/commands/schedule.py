"""``compiled-adam schedule``: a learning rate drawn in the terminal, printed at some steps, and saved as a picture."""

from __future__ import annotations

import argparse
import inspect
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .. import schedulers
from ..base import InputError, did_you_mean
from ..checkpoint import output
from ..finetune.packages import needed
from ..schedulers import SCHEDULES, picture
from .parsing import Parser

UPDATES = 1000  # what is drawn of a schedule that has no end
Drawn = tuple[schedulers.Schedule, str, int]  # a schedule to draw, its title, and the last update


def main(argv: Sequence[str]) -> None:
    """Draws the schedule of the command line ``argv``; raises ValueError if its values make no schedule."""
    if not argv:
        raise InputError(
            "schedule needs a name and its arguments, such as `compiled-adam schedule cosine 1e-4 1000`, or --config"
            f" FILE; the names are {', '.join(SCHEDULES)}"
        )
    name = argv[0]
    if name.startswith("-"):
        arguments = parser().parse_args(argv)
        schedule, label, end = _from_file(arguments.config)
    elif name in SCHEDULES:
        arguments = parser(name).parse_args(argv[1:])
        schedule, label, end = _from_arguments(name, vars(arguments))
    else:
        near = did_you_mean(name, SCHEDULES) or f"; there are {', '.join(SCHEDULES)}"
        raise InputError(f"there is no schedule {name!r}{near}")
    until = end if arguments.until is None else arguments.until
    if until < 1:
        raise InputError(f"until is {until}; it must be at least 1")
    out: Path | None = arguments.out
    if out is not None and out.suffix not in (".svg", ".png"):
        raise InputError(f"out is {str(out)!r}; its name must end in .svg or .png")
    steps, rates = picture.curve(schedule, until)
    peak = steps[rates.index(max(rates))]  # the first of the highest rates, where the warmup ends
    marks = arguments.at or sorted({0, peak, (peak + until) // 2, until})
    if out is not None:  # first, because it may say that matplotlib is missing
        figure = picture.plot({label: schedule}, until, at=[mark for mark in marks if mark <= until])
        drawing, form = io.BytesIO(), out.suffix.removeprefix(".")
        figure.savefig(drawing, format=form, metadata={"Date": None} if form == "svg" else None)
        output.write(out, drawing.getvalue())
    print(label)
    print("\n".join(picture.text(rates, until, blocks=_blocks())))
    print(f"{'update':>10}  learning rate")
    for mark, rate in zip(marks, picture.rates_at(schedule, marks), strict=True):
        print(f"{mark:>10}  {rate:.6g}")
    if out is not None:
        print(f"wrote {out}")


def parser(name: str | None = None) -> Parser:
    """The options of one schedule, which are the parameters of its function; without a name, those of ``--config``."""
    if name is None:
        made = Parser(
            prog="compiled-adam schedule",
            description="Draws the learning rate of a schedule, or of the lr_schedule in a YAML file for lora.",
            usage="compiled-adam schedule [-h] (NAME ARGUMENTS... | --config FILE) [options]",
            epilog=f"NAME is one of {', '.join(SCHEDULES)}; compiled-adam schedule NAME --help lists its arguments.",
        )
        made.add_argument("--config", type=Path, required=True, metavar="FILE", help="a YAML file with an lr_schedule")
    else:
        description = (inspect.getdoc(SCHEDULES[name]) or "").split("\n\n")[0].replace("``", "")
        made = Parser(prog=f"compiled-adam schedule {name}", description=description)
        hints = get_type_hints(SCHEDULES[name])
        for parameter in inspect.signature(SCHEDULES[name]).parameters.values():
            kind = int if int in (hints[parameter.name], *get_args(hints[parameter.name])) else float
            if parameter.default is parameter.empty:
                made.add_argument(parameter.name, type=kind)
            else:
                default = "" if parameter.default is None else f"default: {parameter.default}"
                option = f"--{parameter.name.replace('_', '-')}"
                made.add_argument(option, type=kind, default=parameter.default, metavar=kind.__name__, help=default)
    made.add_argument("--at", type=_steps, metavar="N,N,...", help="print the learning rate at these updates")
    made.add_argument("--until", type=int, metavar="N", help=f"draw to this update (default: the end, or {UPDATES})")
    made.add_argument("--out", type=Path, metavar="FILE", help="also draw a picture, FILE.svg or FILE.png")
    return made


def _steps(value: str) -> list[int]:
    try:
        steps = [int(word) for word in value.split(",")]
    except ValueError:
        steps = [-1]
    if min(steps) < 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a list of updates such as 0,10,100")
    return steps


def _from_arguments(name: str, arguments: dict[str, Any]) -> Drawn:
    function = SCHEDULES[name]
    parameters = inspect.signature(function).parameters
    given = {key: arguments[key] for key in parameters}
    label = ", ".join(f"{key}={value:g}" for key, value in given.items() if value != parameters[key].default)
    warmup = given["warmup"] or 0
    return function(**given), f"{name}({label})", given.get("steps") or max(UPDATES, 4 * warmup)


def _from_file(file: Path) -> Drawn:
    with needed("YAML of mlx-lm", "mlx-lm", "lm"):
        from .lora_options import settings
    found = settings(["--config", str(file)])
    if not found.lr_schedule:
        raise InputError(f"{file} has no lr_schedule; its learning rate is {found.learning_rate:g} throughout")
    schedule = schedulers.from_config(found.lr_schedule)
    words = [f"{key}={value}" for key, value in found.lr_schedule.items() if key != "name"]
    # Schedules count updates, mlx-lm's iterations are micro-batches.
    updates = -(-found.iters // found.grad_accumulation_steps)
    return schedule, f"{found.lr_schedule['name']}({', '.join(words)}) of {file}, {updates} updates", updates


def _blocks() -> str:
    try:
        picture.BLOCKS.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return picture.ASCII
    return picture.BLOCKS
