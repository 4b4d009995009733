"""`make_step`: a compiled train step."""

from . import losses
from .cross_entropy import kept, kept_gradient
from .held import trainable_of
from .linear_cross_entropy import chunk_rows
from .planned import update_of
from .result import StepResult
from .train_step import TrainStep, make_step
