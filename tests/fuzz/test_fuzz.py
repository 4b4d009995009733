"""Random operations on a train step, compared with a reference in float64: the machine of `machine.py`.

The environment says more: FUZZ_EXAMPLES, how many sequences of operations `make test-long` tries (default 1000);
FUZZ_STEPS, how long they are (20); FUZZ_SEED, a number for others than those that are tried every time; FUZZ_SKIP,
names of operations to leave out, with commas between them. The names are the keys of what is printed at the end.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.machine import INTERRUPTED, RAN, SKIPPED, TrainStepMachine

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
    assert run(60, derandomize=True) > 1200
    # Every operation has had its turn.
    assert {
        *("begin with ours", "begin with groups", "begin with theirs", "begin with Compensated"),
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
    sequences = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
    assert run(sequences, derandomize=derandomize) > sequences
