"""The update rule of Adam, and its arrangement so that MLX runs it in few kernels."""

from . import residual, window
from .groups import ALL_ALIKE, DecayFilter, Group, Patterns, check_patterns, decay_matrices, group
from .kernels import LARGE, LOWERINGS, of_leaves, row_major, unfused
from .leaves import FLOATS, Constants, Form, Part, Shared, check_leaf, guard, update, update_leaf
from .moments import POLICIES, STOCHASTIC, Stored
from .norm import clip_factor, global_norm, norm_of, sum_of_squares
from .packing import SMALL, TINY, Leaf, apart, flat, packs
from .residual import Keep
from .window import counted
