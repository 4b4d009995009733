"""Runs the machine of `fuzz_machine`; FUZZ_EXAMPLES and FUZZ_STEPS say for how long, FUZZ_SEED with other examples."""

from __future__ import annotations

import os

import pytest
from fuzz_machine import INTERRUPTED, RAN, SKIPPED, TrainStepMachine
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

STEPS = int(os.environ.get("FUZZ_STEPS", "20"))


def run(examples: int, **options) -> int:
    """How many operations were compared with the reference."""
    RAN.clear()
    INTERRUPTED.clear()
    machine = TrainStepMachine
    if "FUZZ_SEED" in os.environ:
        machine = seed(int(os.environ["FUZZ_SEED"]))(machine)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        print_blob=True,
        **options,
    )
    run_state_machine_as_test(machine, settings=chosen)
    total = sum(RAN.values())
    print(
        f"{total} operations without a difference: {dict(RAN.most_common())};"
        f" an interrupt left the state before the call or after it: {dict(INTERRUPTED)}"
    )
    return total


@pytest.mark.slow
def test_a_minute_of_random_operations() -> None:
    assert run(40, derandomize=True) > 500
    # Every operation has had its turn.
    assert {
        "train",
        "flush",
        "interrupt",
        "checkpoint",
        "edit",
        "thread",
        "foreign",
        "state_dict",
    } - SKIPPED <= RAN.keys()


@pytest.mark.long
def test_random_operations_for_as_long_as_asked() -> None:
    derandomize = "FUZZ_SEED" not in os.environ
    run(int(os.environ.get("FUZZ_EXAMPLES", "1000")), derandomize=derandomize)
