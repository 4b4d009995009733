"""The update rule of Adam, and its arrangement so that MLX runs it in few kernels."""

from . import residual, window
from .groups import ALL_ALIKE, DecayFilter, Group, check_patterns, decay_matrices, group
from .kernels import LARGE, LOWERINGS, of_leaves
from .leaves import FLOATS, Constants, Form, Part, Shared, check_leaf, update, update_leaf
from .moments import POLICIES, STOCHASTIC, Stored
from .norm import global_norm
from .window import counted

__all__ = [
    "ALL_ALIKE",
    "FLOATS",
    "LARGE",
    "LOWERINGS",
    "POLICIES",
    "STOCHASTIC",
    "Constants",
    "DecayFilter",
    "Form",
    "Group",
    "Part",
    "Shared",
    "Stored",
    "check_leaf",
    "check_patterns",
    "counted",
    "decay_matrices",
    "global_norm",
    "group",
    "of_leaves",
    "residual",
    "update",
    "update_leaf",
    "window",
]
