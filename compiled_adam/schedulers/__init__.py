"""Learning-rate schedules: functions of the number of updates."""

from . import picture
from .config import check_values, from_config, last_update
from .picture import plot
from .schedules import (
    SCHEDULES,
    Schedule,
    Step,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    join,
    linear,
    one_cycle,
    polynomial,
    step_decay,
    warmup_stable_decay,
)

__all__ = [
    "Schedule",
    "Step",
    "check_values",
    "constant",
    "cosine",
    "exponential",
    "from_config",
    "inverse_sqrt",
    "join",
    "linear",
    "one_cycle",
    "picture",
    "plot",
    "polynomial",
    "step_decay",
    "warmup_stable_decay",
]
