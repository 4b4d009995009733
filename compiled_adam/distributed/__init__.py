"""Training with several workers (processes): start, sums of gradients, sharded state, and detection of lost workers."""

from . import reduce, shard, workers
from .joining import check_timeout, join
from .reduce import DTYPES
from .shard import Shard
from .workers import Workers
