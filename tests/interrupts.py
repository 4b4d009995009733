"""Interrupts a call at the n-th bytecode of Python that it runs, as Ctrl-C could."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

OURS = "/compiled_adam/"


class Counter:
    """Counts bytecodes in frames of the package and of the tests; raises KeyboardInterrupt at the ``at``-th."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count, self.raised = at, 0, False

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if OURS not in name and "/mlx/" not in name and "nets.py" not in name:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                self.raised = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def bytecodes(call: Callable[[], object]) -> int:
    """How many bytecodes a call runs."""
    counter = Counter(None)
    before = sys.gettrace()
    sys.settrace(counter)
    try:
        call()
    finally:
        sys.settrace(before)
    return counter.count


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Runs a call and interrupts it at that bytecode; whether the interrupt came out of it."""
    counter = Counter(at)
    before = sys.gettrace()
    sys.settrace(counter)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    assert not counter.raised, "the interrupt was swallowed"
    return False
