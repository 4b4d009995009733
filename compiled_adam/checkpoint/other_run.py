"""The error about a checkpoint that another run has saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base import InputError, Row, table

COLUMNS = ("what", "here", "checkpoint")


class OtherRun(InputError):
    """A checkpoint has other settings than this run, or arrays of other names, shapes or dtypes.

    Attributes:
        folder: the checkpoint.
        settings: a row for each setting that differs and is not allowed to: its name, the value here, and there.
        arrays: the same for arrays, as they are after a change of these settings was allowed.
        there: the checkpoint's values of all settings.
    """

    def __init__(
        self, folder: str | Path, settings: Sequence[Row], arrays: Sequence[Row], there: Mapping[str, Any]
    ) -> None:
        self.folder, self.settings, self.arrays, self.there = folder, settings, arrays, there
        super().__init__(
            f"{folder} was saved by another run:\n{table(COLUMNS, [*settings, *arrays])}\n"
            "use the same values, or allow the change of a setting by name (allow=..., --allow-change)"
        )
