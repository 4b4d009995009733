"""Packages that only a part of the program needs, and that may be missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def install(extra: str) -> str:
    """The command that installs an extra of this package."""
    return f"pip install 'compiled-adam[{extra}]'"


@contextmanager
def needed(purpose: str, package: str, extra: str) -> Iterator[None]:
    """A context for an import of ``package``; if the import fails, the error says which ``extra`` to install.

    Raises ImportError.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package} ({error}); install it with `{install(extra)}`") from error
