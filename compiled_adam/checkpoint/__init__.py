"""Checkpoint folders and result files, each written atomically: complete or not at all."""

from . import output
from .checkpoint import (
    COLUMNS,
    Contents,
    OtherRun,
    check_exists,
    check_finite,
    is_whole,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from .durable import locked, present, replace_arrays, replacing, save_arrays
from .series import latest_checkpoint, numbered, prune
