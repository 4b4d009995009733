"""Helpers that all other folders of the package use. This folder imports none of the others."""

from . import fingerprint, random_state
from .at_once import Assignments, call_all, undone_on_error
from .compare import Row, differences, table
from .compiled import Compiled, is_evaluated
from .errors import InputError, TrainingStopped, while_handling
from .fingerprint import packages
from .mlx_graph import Written, kernels, operations
from .streams import lenient, lenient_streams, say
from .tree import Aligned, Places, Structure, along, below, indexed, trainable_places

__all__ = [
    "Aligned",
    "Assignments",
    "Compiled",
    "InputError",
    "Places",
    "Row",
    "Structure",
    "TrainingStopped",
    "Written",
    "along",
    "below",
    "call_all",
    "differences",
    "fingerprint",
    "indexed",
    "is_evaluated",
    "kernels",
    "lenient",
    "lenient_streams",
    "operations",
    "packages",
    "random_state",
    "say",
    "table",
    "trainable_places",
    "undone_on_error",
    "while_handling",
]
