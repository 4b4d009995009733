"""The HTML of a report: words and tables, and the charts as data beside the script that draws them."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report_charts import charts, short_names
from .report_run import Run
from .report_verdict import verdict

_ASSETS = Path(__file__).parent / "report_page"
# The browser itself refuses whatever the page does not bring along.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(runs: Sequence[Run], refresh: int | None = None) -> str:
    """The whole page; with ``refresh`` it loads itself again after so many seconds."""
    title = f"Training report: {', '.join(run.name for run in runs)}"
    found = charts(runs)
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    differing, alike = _settings(runs)
    parts = [*map(_headline, runs), _summaries(runs), differing, _figures(found), *map(_samples, runs), alike]
    # "</script>" in a name would end the data; JSON can write its first character in another way.
    data = json.dumps(found, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{again}'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme"'
        f' content="light dark"><title>{html.escape(title)}</title>'
        f"<style>{_asset('uPlot.min.css')}{_asset('page.css')}</style></head>"
        f"<body><main>{''.join(parts)}{''.join(map(_origin, runs))}</main>"
        f'<script type="application/json" id="charts">{data}</script>'
        f"<script>{_asset('uPlot.iife.min.js')}</script><script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _headline(run: Run) -> str:
    found = verdict(run)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in found.notes)
    return (
        f'<header class="{found.tone}"><p class="name">{html.escape(run.name)}</p>'
        f"<h1>{html.escape(found.headline)}</h1>{notes}</header>"
    )


def summary(run: Run) -> dict[str, str]:
    """The figures of a run, as text."""
    last, best = run.steps[-1], run.best
    seconds, tokens = sum(step["seconds"] for step in run.steps), sum(step["tokens"] for step in run.steps)
    return {
        "best validation loss": f"{best[1]:.4f}" if best else "-",
        "at iteration": f"{best[0]:,}" if best else "-",
        "last validation loss": f"{run.losses[-1][1]:.4f}" if run.losses else "-",
        "last training loss": _loss_of(last),
        "iterations": f"{last['iteration']:,}",
        "time in steps": f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s",
        "tokens": f"{tokens:,}",
        "tokens/s": f"{tokens / seconds:,.0f}" if seconds else "-",
        "peak memory": f"{max(step['memory'] for step in run.steps) / 1e9:.2f} GB",
        "updates skipped": f"{last['skipped']:,}",
        "gradient traces": f"{last['traces']:,}",
    }


def _loss_of(step: dict[str, Any]) -> str:
    if not step["tokens"]:
        return "no targets"
    return "not finite" if step["loss"] is None else f"{step['loss']:.4f}"


def _summaries(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return _table("Compared", runs, [summary(run) for run in runs])
    cards = (f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in summary(runs[0]).items())
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _figures(found: Sequence[Mapping[str, Any]]) -> str:
    figures = (
        f"<figure><figcaption><h2>{html.escape(chart['title'])}</h2>"
        '<button type="button" hidden>log scale</button></figcaption><div class="plot"></div></figure>'
        for chart in found
    )
    without = "<noscript><p>The charts need JavaScript.</p></noscript>"
    return f'{without}<section class="charts">{"".join(figures)}</section>'


def _samples(run: Run) -> str:
    """The model's answers in the first and in the last samples, side by side."""
    taken = [sample for sample in run.record["samples"] if sample["answers"]]
    if not taken:
        return ""
    shown = taken[:1] if len(taken) == 1 else [taken[0], taken[-1]]
    parts = []
    for number, first in enumerate(taken[0]["answers"]):
        answers = [
            (f"after iteration {sample['iteration']}" if sample["iteration"] else "before training", answer["answer"])
            for sample in shown
            for answer in sample["answers"][number : number + 1]
        ]
        said = [*answers, *([("in the data", first["expected"])] if first["expected"] else [])]
        columns = "".join(f"<div><h4>{name}</h4><pre>{html.escape(text)}</pre></div>" for name, text in said)
        parts.append(
            f'<article><h4>prompt</h4><pre>{html.escape(first["prompt"])}</pre><div class="answers">{columns}</div>'
            "</article>"
        )
    return f"<section><h2>Samples: {html.escape(run.name)}</h2>{''.join(parts)}</section>"


def _settings(runs: Sequence[Run]) -> tuple[str, str]:
    """The settings that differ, where there are several runs, and those that do not."""
    names = sorted({name for run in runs for name in run.settings})
    texts = [{name: _said(run.settings.get(name)) for name in names} for run in runs]
    differing = [
        {name: text for name, text in column.items() if any(other[name] != text for other in texts)} for column in texts
    ]
    alike = {name: text for name, text in texts[0].items() if name not in differing[0]}
    title = "Settings that are alike" if len(runs) > 1 else "Settings"
    return _table("Settings that differ", runs, differing), _table(title, runs[:1], [alike])


def _said(value: Any) -> str:
    """A setting as in YAML, but for null, which stands for nothing."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return json.dumps(value)


def _table(title: str, runs: Sequence[Run], columns: Sequence[Mapping[str, str]]) -> str:
    """A section with a row for each name in ``columns``; nothing if there are none."""
    rows = [["", *short_names([run.name for run in runs])]] if len(runs) > 1 else []
    rows += [[name, *(column[name] for column in columns)] for name in columns[0]]
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    table = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<section><h2>{title}</h2><div class="scroll"><table>{table}</table></div></section>' if columns[0] else ""


def _origin(run: Run) -> str:
    """Where, when and with which versions a run was made: a line for each of its sessions."""
    lines = []
    for session in run.record["sessions"]:
        versions = ", ".join(f"{name} {number}" for name, number in session["versions"].items())
        workers = f", {session['workers']} workers" if session["workers"] > 1 else ""
        since = f"resumed after iteration {session['iteration']}" if session["iteration"] else "started"
        until = f", ended {_date(session['ended'])}" if session["ended"] else ""
        lines.append(f"{since} {_date(session['started'])}{until}: {session['machine']}{workers}; {versions}")
    text = "".join(f"<p>{html.escape(f'{run.name}: {line}')}</p>" for line in lines)
    return f"<footer>{text}</footer>" if text else ""


def _date(text: str) -> str:
    return text.replace("T", " ").replace("+00:00", " UTC")
