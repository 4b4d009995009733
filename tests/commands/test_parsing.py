"""What is typed wrong gets one line that names the remedy, and no page of usage."""

from __future__ import annotations

import pytest
from compiled_adam.commands import lora_options


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("lora --bach-size 4", "lora has no option --bach-size; did you mean --batch-size?"),
        ("lora --batch_size=4", "lora has no option --batch_size; did you mean --batch-size?"),
        ("lora --train --zzz", "lora has no option --zzz; `compiled-adam lora --help` lists them"),
        ("lora model", "lora does not know what 'model' is for; `compiled-adam lora --help` lists its options"),
        ("lora --iters many", "--iters is 'many'; it must be a whole number"),
        ("lora --learning-rate x", "--learning-rate is 'x'; it must be a number"),
        ("lora --iters", "--iters needs a value: a whole number"),
        ("lora -c", "--config needs a value"),
        ("lora --moments", "--moments needs a value: float32, bfloat16, 8bit, param"),
        ("lora --moments 9bit", "--moments is '9bit'; it must be one of float32, bfloat16, 8bit, param"),
        ("lora --train=yes", "--train is a switch; give it without a value"),
        ("lora", "there is nothing to do; give --train, --test or both, as in `compiled-adam lora --train --model"),
        ("plan", "plan needs MODEL: a folder with a config.json, the file itself, or the name of a cached model"),
        ("plan model --memry 4", "plan has no option --memry; did you mean --memory?"),
        ("report", "report needs FOLDER: a folder of adapters that `lora` wrote"),
        ("report run --oot a.html", "report has no option --oot; did you mean --out?"),
        ("report .", ". has no log.jsonl; give a folder that `compiled-adam lora` wrote its adapters to"),
        ("schedule cosin 1 10", "there is no schedule 'cosin'; did you mean cosine?"),
        ("schedule cosine 1 10 --warmpu 2", "schedule cosine has no option --warmpu; did you mean --warmup?"),
        ("demo --itres 3", "demo has no option --itres; did you mean --iters?"),
        ("doctor --jason", "doctor has no option --jason; did you mean --json?"),
        ("doctor now", "doctor does not know what 'now' is for; `compiled-adam doctor --help` lists its options"),
        ("lroa --train", "there is no command 'lroa'; did you mean lora?"),
        ("brew", "there is no command 'brew'; the commands are init, demo, lora, plan, report, schedule, doctor"),
        ("--verson", "there is no option --verson; did you mean --version?"),
    ],
)
def test_one_line_for_what_is_typed_wrong(typed: str, message: str, command) -> None:
    done = command(*typed.split())
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"compiled-adam: {message}")


def test_without_arguments_there_is_a_short_help(command) -> None:
    done = command()
    assert done.returncode == 2 and len(done.stderr.splitlines()) < 30
    assert all(f"\n    {name} " in done.stderr for name in ("init", "demo", "lora", "plan", "report", "doctor"))


@pytest.mark.parametrize("parser", [lora_options.parser, lora_options.plan_parser], ids=["lora", "plan"])
def test_help_has_groups_defaults_and_examples(parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    made = parser()
    text = made.format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\n  compiled-adam ") == 3 and "--batch-\n" not in text
    groups = [group for group in made._action_groups if group._group_actions]
    titles = [str(group.title).split(",")[0] for group in groups]
    assert {*titles} >= {"model", "data", "training", "optimizer", "saving", "workers"}
    for group in groups:
        for action in group._group_actions:
            assert "Default: " in action.help or action.dest in ("help", "planned"), action.dest
