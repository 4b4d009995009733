"""A g++ that compiles every source of MLX's CPU kernels once on this machine, and copies the result from then on.

With a temporary folder of its own a process seems to compile all its kernels, which can be counted; but it takes no
time.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import mlx.core as mx

from tests.kernels import HOME

STORE = HOME / "compiled"
COUNTS = sys.platform == "linux" and mx.default_device() == mx.cpu  # whether g++ compiles MLX's kernels here
_SCRIPT = """#!/bin/sh
# MLX's arguments: options, source, -o, output.
for word; do
  case $before in -o) output=$word ;; esac
  case $word in -o) source=$before ;; esac
  before=$word
done
[ -n "$output" ] || exec {compiler} "$@"
kept={store}/$(sha256sum < "$source" | cut -c 1-64).so
if [ ! -e "$kept" ]; then
  {compiler} "$@" || exit
  cp "$output" "$kept.$$" && mv "$kept.$$" "$kept"
fi
cp "$kept" "$output"
"""


def put_into(folder: Path) -> None:
    """Makes ``folder``/g++, for the front of PATH."""
    STORE.mkdir(parents=True, exist_ok=True)
    program = folder / "g++"
    program.write_text(_SCRIPT.format(compiler=shutil.which("g++"), store=STORE))
    program.chmod(0o755)


def compiled(temporary: Path) -> int:
    """The number of kernels that processes have compiled whose temporary folder this is."""
    return len(list(temporary.glob("mlx/*/cpu/*.so")))
