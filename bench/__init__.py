"""Benchmarks of the update: ``python -m bench --help``."""
