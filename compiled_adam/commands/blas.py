"""Which library multiplies matrices on the CPU: MLX's wheel for Linux brings a slow one along."""

from __future__ import annotations

from pathlib import Path

REFERENCE_BLAS = "reference BLAS"


def blas() -> str:
    """Which library multiplies matrices on the CPU of Linux; elsewhere "as MLX was built".

    MLX's wheel for Linux brings the reference BLAS along; a library that was preloaded takes its place. What other
    packages bring (NumPy's OpenBLAS, say) is loaded too but serves only them.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "as MLX was built"
    paths = {Path(line.split()[-1]) for line in maps.splitlines() if "/" in line}
    return blas_of([path for path in paths if "blas" in path.name.lower() or "mkl" in path.name.lower()])


def blas_of(loaded: list[Path]) -> str:
    """`blas`, of the libraries of that kind that a process has loaded."""
    foreign = [path for path in loaded if "site-packages" not in path.parts]
    if foreign:
        return ", ".join(sorted(path.name for path in foreign))
    own = [path.name for path in loaded if any(part.startswith("mlx") for part in path.parts)]
    return f"{REFERENCE_BLAS} ({', '.join(sorted(own))})" if own else "as MLX was built"
