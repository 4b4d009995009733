"""What holds for the package as a whole: how it is installed, imported and documented."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import compiled_adam as ca
import pytest
from conftest import ROOT, python_blocks

from bench import readme


def test_public_names_exist() -> None:
    for name in (*ca.__all__, "train"):
        assert getattr(ca, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Adamm'"):
        ca.Adamm  # noqa: B018


def test_dir_has_the_public_names_only(run) -> None:
    # With `train`, for which mlx-lm is not imported; but not if mlx-lm is missing, because `help` reads everything.
    code = "import sys, compiled_adam as ca\nprint(dir(ca) == sorted([*ca.__all__, 'train']), 'mlx_lm' in sys.modules)"
    assert run("-c", code).stdout == "True False\n"
    hide = "import importlib.machinery as m\nfind = m.PathFinder.find_spec\n"
    hide += "m.PathFinder.find_spec = lambda name, *rest: None if name == 'mlx_lm' else find(name, *rest)\n"
    code = f"{hide}import compiled_adam as ca, pydoc\nprint(dir(ca) == ca.__all__, 'make_step' in pydoc.render_doc(ca))"
    done = run("-c", code)
    assert done.stdout == "True True\n", done.stderr


# From the top: what stands here may import what stands below it.
FOLDERS = (
    *("cli", "commands", "finetune", "checkpoint", "step", "distributed", "schedulers", "optimizers", "update"),
    "base",
)


def imports() -> Iterator[tuple[str, str, str | None, list[str]]]:
    """Of every import of the package from itself: the file, the folder, the file in that folder, and the names."""
    package = ROOT / "compiled_adam"
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            target = [*path.parts[: len(path.parts) - node.level], *(node.module or "").split(".")]
            folder, *inner = [part for part in target if part] or [""]
            yield str(path), folder, inner[0] if inner else None, [alias.name for alias in node.names]


def test_imports_point_down() -> None:
    assert sorted(FOLDERS) == sorted(
        file.stem for file in (ROOT / "compiled_adam").iterdir() if file.stem not in ("__init__", "__pycache__", "py")
    )
    seen = set()
    for file, folder, _, names in imports():
        here = file.split("/")[0].removesuffix(".py")
        for target in [folder] if folder else names:
            if here in FOLDERS and target in FOLDERS and target != here:
                seen.add((here, target))
                assert FOLDERS.index(here) < FOLDERS.index(target), f"{file} imports {target}"
    assert ("step", "update") in seen


def test_a_folder_says_what_others_may_use() -> None:
    """Only `finetune`, most of which needs mlx-lm, and the commands are imported file by file."""
    count = 0
    handed_on: dict[str, set[str]] = {}
    for file, folder, _, names in imports():
        if file == f"{folder}/__init__.py":
            handed_on.setdefault(folder, set()).update(names)
    for file, folder, inner, names in imports():
        if file.split("/")[0] == folder or folder not in FOLDERS or folder in ("finetune", "commands"):
            continue
        assert inner is None, f"{file} imports from {folder}/{inner}.py"
        assert set(names) <= handed_on[folder], (file, folder)
        count += 1
    assert count > 50


def test_files_and_functions_are_short() -> None:
    for file in [*(ROOT / "compiled_adam").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        text = file.read_text()
        assert text.count("\n") <= 350, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, (file, node.name)


def test_mlx_without_a_backend_says_what_to_install(run, tmp_path: Path) -> None:
    # What plain `pip install mlx` does on Linux.
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    done = run("-c", "import compiled_adam", PYTHONPATH=f"{tmp_path}:{ROOT}")
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: MLX cannot be loaded (libmlx.so")
    assert "pip install 'compiled-adam[cpu]'" in message


def test_import_does_not_need_mlx_lm(run, tmp_path: Path) -> None:
    (tmp_path / "mlx_lm").mkdir()
    (tmp_path / "mlx_lm" / "__init__.py").write_text("raise ImportError('not installed')")
    code = (
        "from compiled_adam import *\nimport compiled_adam as ca\nmake_step\n"
        "try: ca.train\nexcept ImportError as error: print(error)"
    )
    done = run("-c", code, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "pip install 'compiled-adam[lm]'" in done.stdout, done.stderr


def test_without_a_compiler_on_the_path_the_numbers_are_the_same(run) -> None:
    code = """
import mlx.core as mx, mlx.nn as nn, compiled_adam as ca
mx.set_default_device(mx.cpu)  # a GPU needs no compiler
mx.random.seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
step = ca.make_step(model, lambda model, x: mx.square(model(x) - 1).mean(), ca.AdamW(1e-2))
print(*(step(mx.random.normal((8, 4), key=mx.random.key(i))).loss.item() for i in range(5)))
print(step.traces["update"])
"""
    compiled, uncompiled = run("-c", code).stdout, run("-c", code, PATH="/nonexistent").stdout
    losses, others = ([float(word) for word in out.splitlines()[0].split()] for out in (compiled, uncompiled))
    assert len(losses) == 5
    assert others == pytest.approx(losses, rel=1e-5)  # float32 rounding of differently fused graphs
    assert (compiled.splitlines()[1], uncompiled.splitlines()[1]) == ("1", "5")


BLOCKS = python_blocks(ROOT / "README.md")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_code_runs(number: int, run) -> None:
    done = run("-c", BLOCKS[number])
    assert done.returncode == 0, done.stderr


def test_tables_are_the_records() -> None:
    for page, names in readme.PAGES.items():
        text = page.read_text()
        assert readme.rendered(text, names) == text, "run python -m bench.readme"
    assert "| 95 M GPT-2 | bfloat16 |" in readme.PAGE.read_text()


def test_an_empty_place_for_a_table_ends_at_its_own_end() -> None:
    page = "<!-- others table -->\n<!-- end -->\nkept\n<!-- step table -->\nold\n<!-- end -->\n"
    assert "\nkept\n<!-- step table -->\nold\n" in readme.rendered(page, ("others",))


def test_picture_is_of_the_record() -> None:
    # Matplotlib's versions draw a little differently, so only what is said is compared.
    def said(svg: str) -> list[str]:
        return re.findall(r">([^<>]*[a-zA-Z0-9%][^<>]*)</text>", svg)

    drawn = (ROOT / "docs" / "numerics.svg").read_text()
    assert said(drawn) == said(readme.picture()), "run python -m bench.readme"
    assert "compiled_adam.AdamW" in said(drawn)


def test_a_step_needs_neither_numpy_nor_mlx_lm_nor_matplotlib(run) -> None:
    code = (
        "import sys\n"
        "for name in ('numpy', 'mlx_lm', 'matplotlib', 'yaml'): sys.modules[name] = None\n"
        "import mlx.core as mx, mlx.nn as nn, compiled_adam as ca\n"
        "step = ca.make_step(nn.Linear(4, 1), lambda model, x: mx.square(model(x) - 1).mean(), ca.AdamW(1e-2))\n"
        "step(mx.ones((8, 4)))\n"
        "ca.save_checkpoint('0001', step, {'a': 1}); print(ca.load_checkpoint('0001', step))\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (0, "{'a': 1}\n"), done.stderr
