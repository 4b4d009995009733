"""`make_step`: a compiled train step."""

from . import losses
from .train_step import StepResult, TrainStep, make_step
