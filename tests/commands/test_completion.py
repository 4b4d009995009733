from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What bash does when the tab key is pressed after these words.
TAB = """
source script.bash
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
$(complete -p compiled-adam | sed 's/.* -F \\([^ ]*\\).*/\\1/')
echo "${COMPREPLY[@]}"
"""


def test_bash_completes(command, tmp_path: Path) -> None:
    done = command("--print-completion", "bash")
    assert done.returncode == 0, done.stderr
    (tmp_path / "script.bash").write_text(done.stdout)
    (tmp_path / "tab.bash").write_text(TAB)
    (tmp_path / "job.yaml").touch()
    for words, completed in (
        ("l", "lora"),
        ("lora --batch-", "--batch-size --batch-tokens"),
        ("lora --train --moments b", "bfloat16"),
        ("lora --like", "--like-mlx-lm"),
        ("lora -c jo", "job.yaml"),
        ("plan model --mem", "--memory"),
        ("schedule cos", "cosine"),
        ("schedule cosine 1 10 --warm", "--warmup --warmup-init"),
    ):
        tab = ["bash", "tab.bash", "compiled-adam", *words.split()]
        found = subprocess.run(tab, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
        assert found.stdout.split() == completed.split(), (words, found.stderr)
    assert "--batch-tokens" in command("--print-completion", "zsh").stdout


def test_what_is_missing_or_wrong_is_one_sentence(command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--print-completion is 'fish'; it must be one of bash, zsh" in command("--print-completion", "fish").stderr
    monkeypatch.setitem(sys.modules, "shtab", None)
    monkeypatch.delitem(sys.modules, "compiled_adam.commands.completion", raising=False)
    monkeypatch.delattr("compiled_adam.commands.completion", raising=False)
    done = command("--print-completion", "bash")
    assert done.returncode == 2 and done.stderr.endswith("`pip install 'compiled-adam[completion]'`\n")
    assert done.stderr.startswith("compiled-adam: completion needs shtab (")
