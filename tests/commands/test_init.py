from __future__ import annotations

import re
from pathlib import Path

from compiled_adam.commands import init, lora_options
from compiled_adam.commands.lora_yaml import YAML_ONLY

KEY = re.compile(r"^#(\w+): (.*)$", re.M)


def test_the_file_has_every_option_and_changes_nothing(command, tmp_path: Path) -> None:
    done = command("init")
    assert done.returncode == 0 and "compiled-adam lora -c lora.yaml --train" in done.stdout, done.stderr
    text = (tmp_path / "lora.yaml").read_text()
    assert [name for name, _ in KEY.findall(text)] == list(dict(KEY.findall(text)))  # each once
    assert dict(KEY.findall(text)).keys() == lora_options.effective_defaults().keys() - {"config"} | YAML_ONLY
    assert max(map(len, text.splitlines())) <= 110  # comments are narrower; a mapping is one line
    with_file, without = (vars(lora_options.settings(["--train", *more])) for more in (["-c", "lora.yaml"], []))
    changed = {name for name in with_file if with_file[name] != without[name]}
    assert changed == {"config", "given"} and with_file["in_file"] == []


def test_what_a_line_shows_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(KEY.sub(r"\1: \2", init.text("all.yaml")))
    found = vars(lora_options.settings(["-c", str(tmp_path / "all.yaml")]))
    defaults = lora_options.effective_defaults()
    assert {name: found[name] for name in defaults if name != "config"} == {
        name: value for name, value in defaults.items() if name != "config"
    }
    assert (found["moments"], found["bias_correction"], found["batch_tokens"]) == ("float32", True, None)
    assert (found["like_mlx_lm"], found["report"]) == (False, False)  # a switch is off, and not null


def test_the_examples_in_it_are_accepted(tmp_path: Path) -> None:
    text = " ".join(line.removeprefix("# ") for line in init.text("a.yaml").splitlines() if line.startswith("# "))
    schedule, config = (
        re.search(r"such as (\{name: .*?\})\.", text)[1],
        re.search(r"such as (\{adamw: .*?\}\})\.", text)[1],
    )
    (tmp_path / "a.yaml").write_text(f"lr_schedule: {schedule}\noptimizer_config: {config}\n")
    found = lora_options.settings(["-c", str(tmp_path / "a.yaml")])
    assert found.lr_schedule["name"] == "cosine" and found.optimizer_config["adamw"]["betas"] == [0.9, 0.95]


def test_no_file_is_replaced(command, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("iters: 3\n")
    done = command("init", "job.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "job.yaml exists, and is not replaced; give another name" in done.stderr
    assert (tmp_path / "job.yaml").read_text() == "iters: 3\n"
    assert "make it first" in command("init", "no/folder.yaml").stderr
