"""What docs/ says: its code runs, its links and files exist, its tables are what the program has."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, python_blocks

from compiled_adam import cli
from compiled_adam.commands import lora_options
from compiled_adam.update import moments
from tests.update.test_moments import bytes_per_parameter
from tests.update.test_rule import per_leaf

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "README.md"]


@pytest.mark.parametrize(
    "block", [pytest.param(code, id=f"{page.stem}-{i}") for page in PAGES for i, code in enumerate(python_blocks(page))]
)
def test_code_runs(block: str, run) -> None:
    done = run("-c", block)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target, _, anchor in (link.partition("#") for link in links if not link.startswith("https://")):
        file = page if not target else (page.parent / target).resolve()
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_files_it_names_exist(page: Path) -> None:
    folders = ("", "compiled_adam/", "tests/", "docs/", "examples/")
    for name in re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|md|yml|toml))`", page.read_text()):
        assert any((ROOT / folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_commands_it_names_exist(page: Path) -> None:
    text = page.read_text()
    (commands,) = (action.choices for action in cli._parser()._actions if isinstance(action.choices, dict))
    # In code, not in prose: after a backtick or at the beginning of an indented line.
    code = r"(?:`|^    )(?:\.venv/bin/)?"
    for command in re.findall(code + r"compiled-adam +([a-z]\w*)", text, re.M):
        assert command in commands, command
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(code + r"make ([a-z][\w-]*)", text, re.M):
        assert target in targets, target
    for script in re.findall(r"python (examples/\w+\.py)", text):
        assert (ROOT / script).exists(), script


def test_every_flag_of_lora_is_there() -> None:
    text = (ROOT / "docs" / "from-mlx-lm.md").read_text()
    flags = {flag for action in lora_options.parser()._actions for flag in action.option_strings}
    assert len(flags) > 40
    rows = [line for line in text.splitlines() if line.startswith("| `-")]
    named = {flag for row in rows for flag in re.findall(r"`(--?[\w-]+)`", row.split("|")[1])}
    # mlx-lm 0.31, the last for Python 3.10, lacks one that is documented.
    assert flags <= named <= flags | {"--trust-remote-code"}
    assert all(key in text for key in ("optimizer_config", "lora_parameters", "lr_schedule"))


def test_the_table_of_costs_is_measured() -> None:
    text = (ROOT / "docs" / "numerics.md").read_text()
    table = text.split("<!-- costs -->")[1].split("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert [row[0] for row in rows] == [f'`"{policy}"`' for policy in moments.POLICIES]
    stores = [(mx.float32, True), (mx.bfloat16, True), (mx.bfloat16, False)]
    for (name, *numbers), policy in zip(rows, moments.POLICIES, strict=True):
        measured = [bytes_per_parameter(dtype, moments=policy, compensated=kept) for dtype, kept in stores]
        measured += [sum(per_leaf(dtype, moments=policy, compensated=kept).values()) for dtype, kept in stores]
        assert [float(number) for number in numbers] == measured, name
