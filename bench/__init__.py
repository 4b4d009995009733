"""Benchmarks of the update: ``python -m bench --help``."""

import compiled_adam  # noqa: F401  # before MLX, which then has a fast BLAS
