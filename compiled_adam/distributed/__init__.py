"""Several workers: sums, sharded state, start and end."""

from . import reduce, shard, workers
from .joining import check_timeout, join
from .reduce import DTYPES
from .shard import Shard
from .workers import Workers, is_lost
