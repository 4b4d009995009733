"""``python docs/screen.py``: runs `compiled-adam lora` in a terminal of its own, and draws that as docs/lora.svg.

The model has random weights; the data are one of mlx-lm's manuals, in pieces of 200 characters. Nothing is edited: the
picture has what a person sees who types the command.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "lora.svg"
COMMAND = "compiled-adam lora --model model --data data --train --iters 100 --num-layers 4 --learning-rate 1e-3"
COLUMNS, ROWS = 104, 40
PIECE = 200  # characters of an example


def prepare(folder: Path) -> None:
    """Makes ``folder``/model and ``folder``/data."""
    from compiled_adam.commands.small_model import make_model, texts

    make_model(folder / "model", texts()[1])
    write_data(folder / "data")


def write_data(folder: Path) -> None:
    """Makes the files that ``--data`` reads, of text that the model has not seen."""
    from compiled_adam.commands.small_model import texts

    text = texts()[1]
    pieces = [json.dumps({"text": text[i : i + PIECE]}) for i in range(0, len(text), PIECE)]
    folder.mkdir()
    for name, part in (("train", [piece for i, piece in enumerate(pieces) if i % 5]), ("valid", pieces[::5])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")


def shown(folder: Path) -> str:
    """What the command writes to a terminal in ``folder``, with all control sequences."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    words = [sys.executable, "-m", "compiled_adam.cli", *COMMAND.split()[1:]]
    command = subprocess.Popen(words, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while some := os.read(ours, 65536):
            written += some
    if command.wait() != 0:
        raise RuntimeError(f"{COMMAND} failed:\n{written.decode()}")
    return written.decode()


def lines(written: str) -> list[str]:
    """What is on a terminal's screen in the end, of what was written to it; colours stay.

    Of the control sequences those that rich uses: to clear a line, and to move up.

    >>> lines("one\\r\\n50 %\\r\\x1b[2K100 %\\r\\ngone\\r\\n\\x1b[1A\\x1b[2Ktwo\\r\\n")
    ['one', '100 %', 'two']
    """
    screen, row, begin = [""], 0, False
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\n":
            row, begin = row + 1, True
            screen += [""] * (row + 1 - len(screen))
        elif part == "\r":
            begin = True
        elif part.startswith("\x1b[") and part.endswith("K"):
            screen[row] = ""
        elif part.startswith("\x1b[") and part.endswith("A"):
            row = max(0, row - int(part[2:-1] or 1))
        elif not part.startswith("\x1b[") or part.endswith("m"):
            screen[row], begin = part if begin else screen[row] + part, False
    while screen and not screen[-1].strip():
        screen.pop()
    return screen


def picture(screen: list[str]) -> str:
    """The screen as SVG, below the command."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(f"[bold green]$[/] [bold]{COMMAND}[/]", highlight=False)
    for line in screen:
        console.print(Text.from_ansi(line), highlight=False)
    return console.export_svg(title="compiled-adam lora", unique_id="lora")


def words(svg: str) -> list[str]:
    """The lines of a picture, in which every number is 0: what must be the same at each run.

    Which losses are better or the best depends on the numbers, and what takes more than a second on the machine.
    """
    found: dict[float, str] = {}
    for y, text in re.findall(r'<text [^>]*\by="([\d.]+)"[^>]*>([^<]*)</text>', svg):
        found[float(y)] = found.get(float(y), "") + text.replace("&#160;", " ")
    shown = []
    for y in sorted(found):
        line = re.sub(r"[▲▼]|(?<=val  )best", "", found[y])
        line = re.sub(r"\d[\d.,:]*(e[-+]?\d+)?k?", "0", line).replace("0 min", "0 s")
        if not re.search(r"\D: 0 s$", line):
            shown.append(" ".join(line.split()))
    return shown


def draw() -> str:
    """The picture of a run that is made now."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        return picture(lines(shown(Path(folder))))


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(f"wrote {PICTURE}")
