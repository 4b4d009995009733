"""Adam and AdamW, `Compensated` for all others, and access to the state of any MLX optimizer."""

from . import any_optimizer, options
from .adam import Adam, ForSteps
from .adamw import AdamW
from .compensated import Compensated
from .options import check_number, check_schedules
from .shown import of_any
