"""Helpers that all other folders of the package use. This folder imports none of the others."""

from . import blas  # before MLX, which then uses it

# isort: split

from . import fingerprint, random_state
from .at_once import Assignments, call_all, undone_on_error
from .compiled import Compiled, is_evaluated
from .errors import InputError, TrainingStopped, did_you_mean, is_lost, while_handling
from .fingerprint import packages
from .mlx_graph import Written, kernels, operations, reached
from .peak import Graph, Operation, peak, strided, traced
from .streams import lenient, lenient_streams, say
from .text import Row, differences, shown, table
from .tree import Aligned, Places, Structure, along, below, filled, indexed, trainable_places
