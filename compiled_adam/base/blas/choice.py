"""The choice of a fast BLAS in place of the one in MLX's wheel for Linux's CPU, which is the slow reference BLAS.

A library whose functions are visible to all (`RTLD_GLOBAL`) before MLX is loaded serves MLX, as with LD_PRELOAD. Where
one is visible already, nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .cores import cores
from .library import Library, Unusable

VARIABLE = "COMPILED_ADAM_BLAS"
# By the names in Fedora and in Debian, of the variant with pthread; Debian's own links lead to one of the variants.
_OPENBLAS = ("libopenblasp.so.0", "libopenblas.so.0")
_REFERENCE = "reference BLAS"
_BUILT_IN = "as MLX was built"


class BlasError(ImportError):
    """The library that `COMPILED_ADAM_BLAS` names cannot be used. The message says why, and what to do."""


class _Choice(NamedTuple):
    name: str
    refused: tuple[str, ...] = ()


_choice = _Choice(_BUILT_IN)


def load() -> None:
    """Loads a fast BLAS if MLX would use the reference BLAS, MLX is not imported yet, and there is one.

    The environment variable `COMPILED_ADAM_BLAS` names another library (a path, or a name that the system finds), or
    turns this off with ``off``. Default: MKL if pip installed it, else the system's OpenBLAS.

    Raises:
        BlasError: the library that was named cannot be used.
    """
    global _choice
    _choice = _chosen(os.environ.get(VARIABLE, ""))


def used() -> str:
    """The BLAS that serves MLX on the CPU, with what its results depend on, such as "OpenBLAS 0.3.21 (Zen, 2 threads)".

    "reference BLAS" is the slow one in MLX's wheel for Linux; "as MLX was built" is any other that belongs to MLX.
    """
    return _choice.name


def is_slow() -> bool:
    """Whether MLX has the reference BLAS."""
    return _choice.name == _REFERENCE


def refused() -> tuple[str, ...]:
    """The reasons why libraries that were found are not used."""
    return _choice.refused


def _chosen(wanted: str) -> _Choice:
    own = _REFERENCE if _has_reference_blas() else _BUILT_IN
    named = wanted if wanted != "off" else ""
    if (there := _visible()) is not None:
        if named and not (os.path.exists(named) and os.path.samefile(named, there)):
            raise BlasError(f"{VARIABLE}={named} comes too late, {there} is loaded already; unset one of the two")
        return _Choice(_named(there))
    if own == _BUILT_IN:
        if named:
            raise BlasError(f"{VARIABLE}={named} is for MLX's package mlx-cpu only, which is not in use; unset it")
        return _Choice(own)
    if "mlx.core" in sys.modules:
        if named:
            warnings.warn(f"{VARIABLE}={named} is not used: import compiled_adam before mlx", stacklevel=4)
        return _Choice(own)
    if named:
        try:
            return _Choice(_taken(named))
        except Unusable as error:
            raise BlasError(
                f"{VARIABLE}={named} cannot be used: {error}; name a BLAS with the interface CBLAS, such as"
                f" libopenblas.so.0, or unset {VARIABLE}"
            ) from None
    return _Choice(own) if wanted == "off" else _first_that_works(own)


def _first_that_works(own: str) -> _Choice:
    refusals: list[str] = []
    for path in _candidates():
        try:
            return _Choice(_taken(path, only_pthread=True), tuple(refusals))
        except Unusable as error:
            if "cannot open shared object file: No such file" not in str(error):
                refusals.append(str(error))
    return _Choice(own, tuple(refusals))


def _taken(path: str, only_pthread: bool = False) -> str:
    """The name of the library, which from now on serves whatever is loaded. Raises Unusable."""
    library = Library(path)
    if only_pthread:
        library.check_threads()
    library.set_up(cores())
    library.check()
    library.share()
    return library.name()


def _candidates() -> Iterator[str]:
    from importlib.metadata import PackageNotFoundError, files

    try:
        for file in files("mkl") or ():
            if file.name.startswith("libmkl_rt.so"):
                yield str(Path(str(file.locate())).resolve())
    except PackageNotFoundError:
        pass
    yield from _OPENBLAS


def _has_reference_blas() -> bool:
    """Whether MLX is the wheel mlx-cpu, which brings the reference BLAS along. MLX itself is not imported."""
    spec = find_spec("mlx")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        packages = Path(folder).parent
        if any(packages.glob("mlx_cpu.libs/libblas*")) and not any(packages.glob("mlx_cuda*")):
            return True
    return False


def _visible() -> str | None:
    """The file of the BLAS that all libraries see, such as a preloaded one."""
    try:
        function = ctypes.CDLL(None).cblas_sgemm
    except (AttributeError, TypeError, OSError):  # TypeError: Windows
        return None
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # macOS, whose BLAS is part of the system
        return None
    for line in maps.splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return line.split(maxsplit=5)[-1]
    return None


def _named(path: str) -> str:
    try:
        return Library(path).name()
    except Unusable:  # a program of its own that has the functions
        return Path(path).name
