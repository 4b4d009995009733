"""The answer to "did it work?": from the log of a run to sentences."""

from __future__ import annotations

from statistics import fmean
from typing import NamedTuple

from .report_run import Run

# A loss that changes by less, as a part of itself, is called the same.
_SAME = 0.005
# Validation losses that rise by more above the best, as a part of it, are a rise; by the next number, a divergence.
_RISE, _DIVERGED = 0.01, 0.1
_LOST = 10  # so many losses at the end that are not numbers mean that the weights are lost


class Verdict(NamedTuple):
    """The headline of a run, and further sentences; ``tone`` is good, unclear or bad."""

    tone: str
    headline: str
    notes: list[str]


def verdict(run: Run) -> Verdict:
    """Whether a run has improved the model, and what else somebody should know about it."""
    tone, headline = _outcome(run)
    running = run.session is not None and not run.is_over
    return Verdict(
        tone,
        f"So far {headline[0].lower()}{headline[1:]}" if running else headline,
        [*_failures(run), *_best(run), _end(run)],
    )


def _outcome(run: Run) -> tuple[str, str]:
    trained = [step for step in run.steps if step["tokens"]]
    if not trained:
        return "bad", "Nothing was trained: no step had a token to predict"
    tail = trained[-_LOST:]
    if all(step["loss"] is None for step in tail):
        since = next((step["iteration"] for step in reversed(trained) if step["loss"] is not None), 0) + 1
        return "bad", f"Diverged: since iteration {since} no loss was a finite number"
    return _of_validations(run) if len(run.losses) > 1 else _of_training(run)


def _of_validations(run: Run) -> tuple[str, str]:
    (_, first), (_, last) = run.losses[0], run.losses[-1]
    assert run.best is not None
    at, best = run.best
    if run.validations[-1]["val_loss"] is None or last - first > _DIVERGED * abs(first):
        end = "is not a finite number" if run.validations[-1]["val_loss"] is None else f"is {last:.4f}"
        return "bad", f"Diverged: the validation loss was {first:.4f} at first and {end} at the end"
    if _gain(first, best) < _SAME:
        said = f"from {first:.4f} to {last:.4f}"
        if abs(_gain(first, last)) < _SAME:
            return "unclear", f"No clear change: the validation loss went {said}"
        return "bad", f"Worse: the validation loss rose {said}"
    fell = f"the validation loss fell by {_percent(first, best)}, from {first:.4f} to {best:.4f}"
    if last - best > _RISE * abs(best):
        if _falls_after(run, at):
            return "unclear", f"Overfits after iteration {at}: {fell}, then rose to {last:.4f}"
        return "unclear", f"Improved until iteration {at}: {fell}, then rose to {last:.4f}"
    return "good", f"Improved: {fell}"


def _of_training(run: Run) -> tuple[str, str]:
    values, why = [value for _, value in run.column("loss")], "there were no two validations to compare"
    tenth = max(1, len(values) // 10)
    first, last = fmean(values[:tenth]), fmean(values[-tenth:])
    if last - first > _DIVERGED * abs(first):
        return "bad", f"Diverged: the training loss rose from {first:.4f} to {last:.4f}"
    if abs(_gain(first, last)) < _SAME:
        return "unclear", f"No clear change: the training loss went from {first:.4f} to {last:.4f}; {why}"
    if last > first:
        return "bad", f"Worse: the training loss rose from {first:.4f} to {last:.4f}; {why}"
    fell = f"the training loss fell by {_percent(first, last)}, from {first:.4f} to {last:.4f}"
    return "unclear", f"Learned its training data: {fell}; {why}"


def _falls_after(run: Run, iteration: int) -> bool:
    """Whether the training loss still fell after ``iteration``, as it does when a model learns its data by heart."""
    before = [value for i, value in run.column("loss") if i < iteration]
    after = [value for i, value in run.column("loss") if i >= iteration]
    return bool(before and after) and fmean(after) < fmean(before[-len(after) :])


def _gain(before: float, after: float) -> float:
    """The part of ``before`` by which a loss fell."""
    return (before - after) / abs(before) if before else 0.0


def _percent(before: float, after: float) -> str:
    share = 100 * _gain(before, after)
    return f"{share:.0f} %" if share >= 10 else f"{share:.1f} %"


def _failures(run: Run) -> list[str]:
    skipped, notes = run.skipped, []
    lost = [step["iteration"] for step in run.steps if step["loss"] is None and step["tokens"]]
    for where, what in (
        (skipped, "updates were skipped, because loss or gradient was not a finite number"),
        (sorted(set(lost) - set(skipped)), "steps had a loss that was not a finite number, and were not skipped"),
    ):
        if where:
            listed = ", ".join(map(str, where[:5])) + (", ..." if len(where) > 5 else "")
            plural = "s" if len(where) > 1 else ""
            notes.append(f"{len(where)} of {len(run.steps)} {what} (iteration{plural} {listed}).")
    return notes


def _best(run: Run) -> list[str]:
    if run.best is None or run.losses[-1][1] - run.best[1] <= _RISE * abs(run.best[1]):
        return []
    if run.settings.get("save_best"):
        return [f"The folder best/ has the weights with the lowest validation loss, of iteration {run.best[0]}."]
    return [
        "Give --save-best to keep the weights with the lowest validation loss, --early-stop-patience to stop there."
    ]


def _end(run: Run) -> str:
    session, wanted = run.session, run.settings.get("iters")
    of = f" of {wanted}" if isinstance(wanted, int) else ""
    if session is None:
        return f"The log ends at iteration {run.last}{of}."
    if not run.is_over:
        return f"Still training: iteration {run.last}{of}."
    if not session["ended"]:
        return f"The run was killed after iteration {run.last}{of}; --resume goes on from its newest checkpoint."
    return f"Ended at iteration {run.last}{of}: {session['because']}."
