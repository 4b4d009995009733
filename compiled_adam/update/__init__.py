"""The update rule, and how MLX is made to run it in few kernels."""

from . import residual, rule, window
from .groups import ALL_ALIKE, DecayFilter, Group, check_patterns, decay_matrices, group
from .kernels import LARGE, LOWERINGS, of_leaves
from .leaves import FLOATS, Constants, Form, Part, check_leaf, update, update_leaf
from .moments import POLICIES, STOCHASTIC, Stored
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
    "Stored",
    "check_leaf",
    "check_patterns",
    "counted",
    "decay_matrices",
    "group",
    "of_leaves",
    "residual",
    "rule",
    "update",
    "update_leaf",
    "window",
]
