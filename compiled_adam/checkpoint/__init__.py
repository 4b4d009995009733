"""Checkpoint folders and result files, each written atomically: complete or not at all."""

from . import output
from .checkpoint import (
    COLUMNS,
    Contents,
    OtherRun,
    check_checkpoint,  # this and `_sealed` are names of 0.1's checkpoint.py that others may have found
    check_exists,
    check_finite,
    is_whole,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from .durable import locked, present, replace_arrays, replacing, save_arrays
from .meta import sealed as _sealed
from .series import latest_checkpoint, numbered, prune
