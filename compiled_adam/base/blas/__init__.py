"""Which library multiplies matrices on the CPU of Linux. It must be loaded before MLX, so this folder imports none."""

from .choice import VARIABLE, is_slow, load, refused, used

load()
