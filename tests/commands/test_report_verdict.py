"""The sentences that say whether a run worked, as a function of its log."""

from __future__ import annotations

import os

import pytest
from compiled_adam.commands.report_run import Run
from compiled_adam.commands.report_verdict import verdict


def run(
    losses: list[float | None], validations: dict[int, float | None], settings: dict | None = None, **more: object
) -> Run:
    """A run with these training losses, whose every third update is skipped if ``skipped`` is true."""
    steps = [
        {"iteration": i, "loss": loss, "tokens": 0 if more.get("targets") is False else 9}
        | {"skipped": i // 3 if more.get("skipped") else 0}
        for i, loss in enumerate(losses, start=1)
    ]
    vals = [{"iteration": i, "val_loss": loss} for i, loss in validations.items()]
    sessions = more.get("sessions", [])
    return Run("run", steps, vals, settings or {}, {"sessions": sessions, "samples": []})


FALLING = [4.0 - i / 20 for i in range(40)]
FLAT = [4.0] * 40


@pytest.mark.parametrize(
    ("losses", "validations", "tone", "headline"),
    [
        (
            FALLING,
            {1: 4.0, 20: 3.5, 40: 3.0},
            "good",
            "Improved: the validation loss fell by 25 %, from 4.0000 to 3.0000",
        ),
        (FALLING, {1: 4.0, 20: 3.0, 40: 3.02}, "good", "Improved: the validation loss fell by 25 %"),
        (FALLING, {1: 4.0, 40: 3.96}, "good", "Improved: the validation loss fell by 1.0 %"),
        (
            FALLING,
            {1: 4.0, 20: 3.0, 40: 3.1},
            "unclear",
            "Overfits after iteration 20: the validation loss fell by 25 %, from 4.0000 to 3.0000, then rose to 3.1000",
        ),
        (FLAT, {1: 4.0, 20: 3.0, 40: 3.1}, "unclear", "Improved until iteration 20: the validation loss fell by 25 %"),
        (
            FALLING,
            {1: 4.0, 40: 3.99},
            "unclear",
            "No clear change: the validation loss went from 4.0000 to 3.9900",
        ),
        (FALLING, {1: 4.0, 40: 4.2}, "bad", "Worse: the validation loss rose from 4.0000 to 4.2000"),
        (
            FALLING,
            {1: 4.0, 20: 3.0, 40: 8.0},
            "bad",
            "Diverged: the validation loss was 4.0000 at first and is 8.0000 at the end",
        ),
        (FALLING, {1: 4.0, 20: 3.0, 40: None}, "bad", "Diverged: the validation loss was 4.0000 at first and is not"),
        (
            [*FALLING[:25], *[None] * 15],
            {1: 4.0, 20: 3.0},
            "bad",
            "Diverged: since iteration 26 no loss was a finite number",
        ),
        (
            FALLING,
            {},
            "unclear",
            "Learned its training data: the training loss fell by 46 %, from 3.9250 to 2.1250; there were no two",
        ),
        (FALLING, {1: 4.0}, "unclear", "Learned its training data: the training loss fell by 46 %"),
        (FALLING[::-1], {1: 4.0}, "bad", "Diverged: the training loss rose from 2.1250 to 3.9250"),
        ([4.0, 4.1], {}, "bad", "Worse: the training loss rose from 4.0000 to 4.1000"),
        (FLAT, {}, "unclear", "No clear change: the training loss went from 4.0000 to 4.0000"),
        ([1.0], {}, "unclear", "No clear change"),
        ([0.0, 0.0], {1: 0.0, 2: 0.0}, "unclear", "No clear change"),
    ],
)
def test_the_headline(losses: list, validations: dict, tone: str, headline: str) -> None:
    found = verdict(run(losses, validations))
    assert found.tone == tone and found.headline.startswith(headline), found


def test_a_run_without_a_target() -> None:
    found = verdict(run([None] * 3, {}, targets=False))
    assert (found.tone, found.headline) == ("bad", "Nothing was trained: no step had a token to predict")


def test_what_was_skipped_and_what_was_not() -> None:
    skipped, _ = verdict(run([1.0, 1.0, None] * 6, {}, skipped=True)).notes
    assert skipped.startswith("6 of 18 updates were skipped, because loss or gradient was not a finite number")
    assert skipped.endswith(" (iterations 3, 6, 9, 12, 15, ...).")
    lost, _ = verdict(run([1.0, 1.0, None], {})).notes
    assert lost == "1 of 3 steps had a loss that was not a finite number, and were not skipped (iteration 3)."


def test_where_the_best_weights_are() -> None:
    rises = {1: 4.0, 20: 3.0, 40: 3.1}
    assert "--save-best" in verdict(run(FALLING, rises)).notes[0]
    assert "The folder best/ has" in verdict(run(FALLING, rises, {"save_best": True})).notes[0]
    assert len(verdict(run(FALLING, {1: 4.0, 40: 3.0})).notes) == 1


def test_how_it_ended() -> None:
    session = {"host": os.uname().nodename, "pid": os.getpid(), "ended": "", "because": "", "iteration": 0}
    validations, settings = {1: 4.0, 40: 3.0}, {"iters": 600}

    def told(**changes: object) -> tuple[str, str]:
        found = verdict(run(FALLING, validations, settings, sessions=[{**session, **changes}]))
        return found.headline.split(":")[0], found.notes[-1]

    assert told() == ("So far improved", "Still training: iteration 40 of 600.")
    assert told(host="elsewhere") == ("So far improved", "Still training: iteration 40 of 600.")
    assert told(pid=2**40) == (
        "Improved",
        "The run was killed after iteration 40 of 600; --resume goes on from its newest checkpoint.",
    )
    stopped = told(ended="2026-11-26T11:00:00+00:00", because="stopped early: 3 validations without a lower loss")
    assert stopped == (
        "Improved",
        "Ended at iteration 40 of 600: stopped early: 3 validations without a lower loss.",
    )
    assert verdict(run(FALLING, validations)).notes == ["The log ends at iteration 40."]
