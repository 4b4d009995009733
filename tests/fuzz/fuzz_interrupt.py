"""Ctrl-C at one bytecode: deterministic, where a signal from a timer is not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interrupted_at(count: int, of_file: Callable[[str], bool]) -> Iterator[list[int]]:
    """Raises KeyboardInterrupt before the ``count``-th bytecode of the files; yields how many have run so far."""
    ran = [0]
    before = sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not of_file(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            ran[0] += 1
            if ran[0] == count:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield ran
    finally:
        sys.settrace(before)
