"""The loops of examples/loops: each runs, and so does the plain MLX loop that its lines after "MLX:" make of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

FILES = sorted((ROOT / "examples" / "loops").glob("*.py"))
MARK = re.compile(r"^( *)(.*?) *# MLX: ?(.*)$")


def plain(text: str) -> tuple[str, int]:
    """The loop without this package, and how many lines differ."""
    marked = [MARK.match(line) for line in text.splitlines()]
    lines = [found[1] + found[3] if found else line for found, line in zip(marked, text.splitlines(), strict=True)]
    return "\n".join(lines) + "\n", sum(found is not None for found in marked)


def test_what_is_replaced() -> None:
    assert plain("a\n  b  # MLX: c\n  # MLX: d\ne  # MLX:\n") == ("a\n  c\n  d\n\n", 3)


def shown(text: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, float]]:
    """The numbers in the lines that a loop prints, by the word before them."""
    exec(compile(text, "loop", "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    return [{word: float(n) for word, n in re.findall(r"(\w+) +(-?[\d.]+)", line)} for line in out.splitlines()]


# What the last line must say: less loss, and more of the others.
LAST = {
    "classifier": {"loss": 0.1, "accuracy": 0.95},
    "preference": {"loss": 0.1, "margin": 2.0, "accuracy": 0.95},
    "gan": {"radius": 0.6},  # of the generator's points around a ring of radius 1; 0.05 before
    "images": {"loss": 0.1, "accuracy": 0.95},
    "pretraining": {"loss": 1.0},  # of 2.8
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_runs_like_the_plain_loop_and_says_how_many_lines_differ(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = file.read_text()
    other, differ = plain(text)
    assert len(text.splitlines()) < 80
    assert f"{differ} lines differ from the plain MLX loop" in " ".join(text.split())
    assert not re.search(r"^[^#\n]*\bca\b", other.split('"""', 2)[2], re.M)
    ours, plainly = shown(text, capsys), shown(other, capsys)
    for word, limit in LAST[file.stem].items():
        assert (ours[-1][word] < limit) == (word == "loss"), (word, ours)
    # Float32 is rounded in another order, and 50 updates amplify that. The plain pretraining keeps moments and weights
    # in bfloat16, which loses small updates.
    assert ours[0] == pytest.approx(plainly[0], rel=0.2 if file.stem == "pretraining" else 0.02)
