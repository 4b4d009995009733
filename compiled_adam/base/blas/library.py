"""A BLAS (a library for matrix products): opened, tried, named, and given its number of threads."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import re
from pathlib import Path

_NEEDED = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # what MLX calls
_ROW_MAJOR, _PLAIN = 101, 111  # of the interface CBLAS
# Of OpenBLAS.
_OPENMP = 2  # of openblas_get_parallel
_OLDEST = "Prescott"  # which it takes for a processor that is newer than itself: 5 times as slow as SkylakeX on one
_CORES = {
    "SkylakeX": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "fma"},
    "Haswell": {"avx2", "fma"},
}
# Of MKL: layers, and the code branches that it takes on different processors.
_LP64, _INTEL_THREADS, _SEQUENTIAL, _AUTO, _STRICT = 0, 0, 1, 2, 0x10000
_BRANCHES = {9: "AVX", 10: "AVX2", 12: "AVX512", 14: "AVX512_E1"}
_MARKS = {"MKL": "MKL_Set_Threading_Layer", "OpenBLAS": "openblas_get_num_threads"}  # functions that only they have
_THREADS = {
    "OpenBLAS": ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"),
    "MKL": ("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
}


class Unusable(Exception):
    """A library is no BLAS that MLX could use. The message says why."""


class Library:
    """The library in the file ``path``, or the one of that name which the system finds. Nobody else sees it yet.

    Raises Unusable if it cannot be loaded or lacks a function. A library for another processor would end the process
    instead (SIGILL), in `check` or earlier. That is not tried in a second process, which would take time at every
    start: MKL and OpenBLAS choose their code by the processor.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._calls = _opened(path)
        if missing := [name for name in _NEEDED if not hasattr(self._calls, name)]:
            raise Unusable(f"{path} has no function {missing[0]}")
        known = (kind for kind, function in _MARKS.items() if hasattr(self._calls, function))
        self.kind = next(known, Path(path).name)

    def check(self) -> None:
        """Raises Unusable unless ``cblas_sgemm`` computes ``0.5 * a @ b + 2 * c`` as it must."""
        rows, inner, columns = 5, 9, 7
        a = [[(3 * i + 5 * k) % 11 - 5 for k in range(inner)] for i in range(rows)]
        b = [[(7 * k + 2 * j) % 13 - 6 for j in range(columns)] for k in range(inner)]
        c = _floats([[i - j for j in range(columns)] for i in range(rows)])
        half, two = ctypes.c_float(0.5), ctypes.c_float(2)
        order = (_ROW_MAJOR, _PLAIN, _PLAIN, rows, columns, inner)
        self._calls.cblas_sgemm(*order, half, _floats(a), inner, _floats(b), columns, two, c, columns)
        # Halves of small whole numbers: exact in float32, in whatever order a library adds them.
        exact = [
            0.5 * sum(a[i][k] * b[k][j] for k in range(inner)) + 2 * (i - j)
            for i in range(rows)
            for j in range(columns)
        ]
        if list(c) != exact:
            raise Unusable(f"{self.path} multiplies two matrices wrongly")

    def set_up(self, threads: int) -> None:
        """Makes results repeatable, and takes ``threads`` threads, unless an environment variable says how many."""
        if self.kind == "MKL":
            self._set_up_mkl()
        if self.kind == "OpenBLAS":
            self._mend_core()
        if self.kind not in _THREADS or any(os.environ.get(name) for name in _THREADS[self.kind]):
            return
        set_number = self._calls.MKL_Set_Num_Threads if self.kind == "MKL" else self._calls.openblas_set_num_threads
        set_number(threads)

    def _set_up_mkl(self) -> None:
        calls = self._calls
        calls.MKL_Set_Interface_Layer(_LP64)
        if "MKL_THREADING_LAYER" not in os.environ:
            # MKL ends the process if its layer for OpenMP is chosen and OpenMP's library is missing.
            parallel = (Path(self.path).parent / "libiomp5.so").exists()
            calls.MKL_Set_Threading_Layer(_INTEL_THREADS if parallel else _SEQUENTIAL)
        if "MKL_CBWR" not in os.environ:
            # Strict: the same bits for every alignment of the arrays and every number of threads.
            strict = calls.MKL_CBWR_Get_Auto_Branch() | _STRICT
            if calls.MKL_CBWR_Set(strict) != 0:  # an old processor
                calls.MKL_CBWR_Set(_AUTO)

    def check_threads(self) -> None:
        """Raises Unusable for OpenBLAS with OpenMP, which makes a pool of threads for each of MLX's streams."""
        if self.kind == "OpenBLAS" and self._calls.openblas_get_parallel() == _OPENMP:
            raise Unusable(f"{self.path} is OpenBLAS with OpenMP; MLX needs the one with pthread")

    def _mend_core(self) -> None:
        """Opens OpenBLAS again if it does not know the processor, and has taken its oldest code for x86 instead."""
        if "OPENBLAS_CORETYPE" in os.environ or self._text("openblas_get_corename") != _OLDEST:
            return
        if core := _core():
            _ctypes.dlclose(self._calls._handle)  # nobody else uses it yet
            os.environ["OPENBLAS_CORETYPE"] = core
            try:
                self._calls = _opened(self.path)
            finally:
                del os.environ["OPENBLAS_CORETYPE"]

    def share(self) -> None:
        """Lets libraries that are loaded from now on use this one, before what they bring along themselves."""
        ctypes.CDLL(self.path, mode=ctypes.RTLD_GLOBAL)

    def name(self) -> str:
        """The kind, the version and whatever the bits of results depend on."""
        if self.kind == "MKL":
            text = ctypes.create_string_buffer(200)
            self._calls.MKL_Get_Version_String(text, len(text))
            found = re.search(rb"Version (\d[\d.]*)", text.value)
            branch = self._calls.MKL_CBWR_Get_Auto_Branch()
            return f"MKL {found[1].decode() if found else '?'} ({_BRANCHES.get(branch, f'branch {branch}')})"
        if self.kind == "OpenBLAS":
            core, version = (self._text(name) for name in ("openblas_get_corename", "openblas_get_config"))
            threads = self._calls.openblas_get_num_threads()
            return f"OpenBLAS {version.split()[1]} ({core}, {threads} thread{'s' * (threads != 1)})"
        return self.kind

    def _text(self, name: str) -> str:
        function = getattr(self._calls, name)
        function.restype = ctypes.c_char_p
        return (function() or b"").decode()


def _opened(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        raise Unusable(str(error)) from None


def _core(information: Path = Path("/proc/cpuinfo")) -> str:
    """OpenBLAS's name of the newest code that this processor can run, as far as it matters; "" if that is old, too."""
    try:
        found = re.search(r"^flags\s*:(.*)$", information.read_text(), re.M)
    except OSError:
        return ""
    flags = set(found[1].split()) if found else set()
    return next((core for core, needed in _CORES.items() if needed <= flags), "")


def _floats(rows: list[list[int]]) -> ctypes.Array[ctypes.c_float]:
    flat = [float(value) for row in rows for value in row]
    return (ctypes.c_float * len(flat))(*flat)
