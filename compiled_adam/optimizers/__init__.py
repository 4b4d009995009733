"""Adam and AdamW, and any optimizer of MLX as a function of arrays."""

from . import any_optimizer, options
from .adam import Adam, ForSteps
from .adamw import AdamW
from .options import check_number, check_schedules
