"""What README and docs/ say: their code and commands run, links and files exist, tables are what the program has."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import mlx.core as mx
import pytest
from compiled_adam import InputError, cli
from compiled_adam.commands import doctor, lora, lora_options
from compiled_adam.finetune import data as data_files
from compiled_adam.update import moments
from conftest import ROOT, python_blocks

from bench import __main__ as bench_command
from bench import readme
from tests.update.test_moments import bytes_per_parameter
from tests.update.test_rule import per_leaf

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
FINE_TUNING = ROOT / "docs" / "fine-tuning.md"
LAUNCH = Path(sys.executable).with_name("mlx.launch")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[str]:
    """The lines of a page that are to be typed into a shell."""
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]


# Code.


@pytest.mark.parametrize(
    "block", [pytest.param(code, id=f"{page.stem}-{i}") for page in PAGES for i, code in enumerate(python_blocks(page))]
)
def test_code_runs(block: str, run) -> None:
    done = run("-c", block)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), re.M)
    assert set(fences[::2]) <= {"python", "sh", "json", "yaml"} and set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_yaml_is_accepted(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "job.yaml").write_text(block)
        lora.make_optimizer(lora_options.settings(["-c", str(tmp_path / "job.yaml")]))


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_examples_of_data_are_accepted(page: Path, tiny_model: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_tokenizer

    every = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    template = every + "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer = load_tokenizer(tiny_model, {"chat_template": template})
    for block in blocks(page, "json"):
        (tmp_path / "train.jsonl").write_text(block)
        masks = (False,) if '"text"' in block else (False, True)
        for mask in masks:
            rows = data_files.read(tmp_path / "train.jsonl", tokenizer, types.SimpleNamespace(mask_prompt=mask))
            tokens, offset = rows.process(rows[0])
            assert len(rows) == 1 and len(tokens) > offset and (offset > 0) == mask


# Commands. Those that need nothing from outside are run; the parsers of the programs read all others.


def is_run(command: str) -> bool:
    words = command.split()
    if words[0] == "echo":
        return True
    outside = any(name in command for name in ("mlx-community/", "my_data"))
    return words[0] == "compiled-adam" and words[1] != "demo" and not outside


def understood(command: str) -> None:
    """Raises unless the program that a command starts accepts its words."""
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "compiled-adam":
        _, rest = cli._parser().parse_known_args(words[1:])
        if words[1] == "lora":
            lora_options.settings(rest)
        else:
            assert not rest, command
    elif words[0] == "mlx.launch":
        from mlx._distributed_utils import launch

        end = words.index("--")
        flags = [word for word in words[1:end] if word.startswith("-")]
        assert flags and all(f'"{flag}"' in inspect.getsource(launch.main) for flag in flags), command
        program = ["compiled-adam"] if words[end + 1] == "compiled-adam" else ["-m", "compiled_adam.cli"]
        assert words[end + 1 : end + 1 + len(program)] == program, command
        understood(shlex.join(["compiled-adam", *words[end + 1 + len(program) :]]))
    elif words[:3] == ["python", "-m", "bench"]:
        bench_command._parser().parse_args(words[3:])
    elif words[:2] == ["pip", "install"]:
        extras = re.search(
            r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
        )
        known = re.findall(r"^(\w+) = ", extras[1], re.M)
        assert len(words) == 3 and set(re.fullmatch(r"\.\[([\w,]+)\]", words[2])[1].split(",")) <= set(known), command
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), command
    else:
        assert words[:3] == ["sudo", "apt-get", "install"] and words[3] in ("g++", doctor.OPENBLAS), command


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_commands_are_understood(page: Path) -> None:
    for command in commands(page):
        if not is_run(command):
            understood(command)


def test_what_is_not_understood_is_noticed() -> None:
    for command in ("compiled-adam lora --model m --itres 3", "pip install '.[gpu]'", "make coffee", "rm -rf /"):
        with pytest.raises((AssertionError, InputError)):
            understood(command)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in DOCUMENTS if any(map(is_run, commands(page)))], ids=lambda p: p.stem)
def test_commands_run(page: Path, tmp_path: Path, tiny_model: Path, data: Path, command) -> None:
    """All of a page in its order, in a folder that has what the pages call ``model`` and ``data``."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(data, tmp_path / "data")
    for line in filter(is_run, commands(page)):
        words = shlex.split(line, comments=True)
        if words[0] == "compiled-adam":
            done = command(*shorter(words[1:]))
        else:
            done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def shorter(words: list[str]) -> list[str]:
    """The same command with a fiftieth of its iterations, unless others go on from what it saves."""
    if "--train" not in words or "--save-every" in words:
        return words
    place = words.index("--iters") + 1 if "--iters" in words else None
    iterations = 1000 if place is None else int(words[place])  # mlx-lm's default
    return [*words, "--iters", str(max(2, iterations // 50))]  # of two, the last counts


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_commands_it_names_exist(page: Path) -> None:
    text = page.read_text()
    (known,) = (action.choices for action in cli._parser()._actions if isinstance(action.choices, dict))
    # In code, not in prose: after a backtick or at the beginning of an indented line.
    code = r"(?:`|^    )(?:\.venv/bin/)?"
    for command in re.findall(code + r"compiled-adam +([a-z]\w*)", text, re.M):
        assert command in known, command
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(code + r"make ([a-z][\w-]*)", text, re.M):
        assert target in targets, target


# Links, files and functions.


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


def test_the_site_has_every_page() -> None:
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == sorted(page.name for page in PAGES)


def defined(tree: ast.Module) -> set[str]:
    """The functions, classes and methods of a file, as ``name`` and ``Class.name``."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_the_walks_name_functions_that_exist() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    steps = re.findall(r"^\d+\. `([\w/]+\.py): ([\w.]+)`", text, re.M)
    assert len(steps) > 30 and {"step/gradient.py", "update/rule.py", "checkpoint/durable.py"} <= dict(steps).keys()
    for file, name in steps:
        assert name in defined(ast.parse((ROOT / "compiled_adam" / file).read_text())), f"{file}: {name}"


def test_the_folders_are_all_there() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text().split("## Two graphs")[0]
    folders = {path.name for path in (ROOT / "compiled_adam").iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"^\| `(\w+)/` \|", text, re.M)) == folders


# Tables and figures.


def rows(text: str) -> list[list[str]]:
    """The cells of the table rows that begin with a flag."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `-")]


def test_every_flag_of_lora_is_there() -> None:
    text = FINE_TUNING.read_text()
    flags = {flag for action in lora_options.parser()._actions for flag in action.option_strings}
    assert len(flags) > 40
    named = {flag for row in rows(text) for flag in re.findall(r"`(--?[\w-]+)`", row[0])}
    # mlx-lm 0.31, the last for Python 3.10, lacks one that is documented.
    assert flags <= named <= flags | {"--trust-remote-code"}
    assert all(key in text for key in ("optimizer_config", "lora_parameters", "lr_schedule"))


def test_the_defaults_are_the_programs() -> None:
    args = vars(lora_options.settings(["--optimizer", "adamw"]))
    optimizer = lora.make_optimizer(types.SimpleNamespace(**args))
    settled = {  # what None in the settings becomes
        "moments": optimizer.options["moments"],
        "weight_decay": optimizer.weight_decay,
        "bias_correction": optimizer.bias_correction,
        "skip_nonfinite": optimizer.options["skip_nonfinite"],
        "keep_checkpoints": lora_options.KEPT,
    }
    defaults = {**args, **settled, "optimizer": vars(lora_options.settings([]))["optimizer"], "help": False}
    actions = {flag: action.dest for action in lora_options.parser()._actions for flag in action.option_strings}
    actions["--trust-remote-code"] = "trust_remote_code"
    for flags, default, _ in rows(FINE_TUNING.read_text()):
        name = actions[re.findall(r"`(--[\w-]+)`", flags)[0]]
        value = defaults.get(name)
        expected = {"off", "none"} if value is None or value is False else {"on"} if value is True else {f"`{value}`"}
        assert default in expected, flags


def test_the_table_of_costs_is_measured() -> None:
    text = (ROOT / "docs" / "numerics.md").read_text()
    table = text.split("<!-- costs -->")[1].split("<!-- end -->")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert [row[0] for row in cells] == [f'`"{policy}"`' for policy in moments.POLICIES]
    stores = [(mx.float32, True), (mx.bfloat16, True), (mx.bfloat16, False)]
    for (name, *numbers), policy in zip(cells, moments.POLICIES, strict=True):
        measured = [bytes_per_parameter(dtype, moments=policy, compensated=kept) for dtype, kept in stores]
        measured += [
            sum(per_leaf(dtype, moments=policy, compensated=kept, lowering="fused").values()) for dtype, kept in stores
        ]
        assert [float(number) for number in numbers] == measured, name


def test_figures_of_the_readme_are_of_the_tables() -> None:
    def cells(*begin: str) -> list[str]:
        (row,) = re.findall(rf"^\| {re.escape(' | '.join(begin))} \|(.*)\|$", readme.PAGE.read_text(), re.M)
        return [cell.strip() for cell in row.split("|")]

    text = " ".join((ROOT / "README.md").read_text().split())
    eager, compiled, torch, _, step, *_ = (
        f"{float(cell.split()[0]):.0f} ms" for cell in cells("95 M GPT-2", "float32")[:5]
    )
    assert f"takes {step} inside a step, {compiled} with stock AdamW under `mx.compile`, {eager} with stock" in text
    assert f"and {torch} with PyTorch's fused AdamW" in text
    stock, ours = cells("bfloat16", "mlx")[2], cells("bfloat16", "compiled_adam")[2]  # of 1e-5
    assert f"at a learning rate of 1e-5, bfloat16 weights move {stock}" in text and f"they move {ours}" in text


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_commands_of_the_benchmarks_are_those_of_the_records() -> None:
    typed = [shlex.split(command) for command in commands(readme.PAGE)]
    for record in ("update", "quality", "step"):
        words = json.loads((ROOT / "bench" / "results" / f"{record}-linux-cpu.json").read_text())["command"]
        place = words.index("--json")
        command = shlex.join([*words[:place], *words[place + 2 :]])
        for gone in (" --contender 'torch fused 1 thread'", " --scale"):  # which bench had when the record was made
            command = command.replace(gone, "")
        assert shlex.split(command) in typed, record


# The picture of a run.


def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("screen", ROOT / "docs" / "screen.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_screen_is_read_as_a_terminal_does() -> None:
    assert doctest.testmod(script()) == doctest.TestResults(failed=0, attempted=1)


@pytest.mark.long
def test_the_picture_shows_what_the_command_prints(tmp_path: Path, tiny_model: Path) -> None:
    # Another model of the same shape, so that all but the numbers must be the same.
    screen = script()
    shutil.copytree(tiny_model, tmp_path / "model")
    screen.write_data(tmp_path / "data")
    now = screen.picture(screen.lines(screen.shown(tmp_path)))
    assert screen.words(screen.PICTURE.read_text()) == screen.words(now), "run python docs/screen.py"
    assert screen.COMMAND in screen.PICTURE.read_text().replace("&#160;", " ")
