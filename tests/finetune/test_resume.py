"""What `--resume` goes on from: nothing yet, other data, another place in them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from compiled_adam.base import fingerprint
from compiled_adam.base.errors import InputError
from compiled_adam.commands import lora as lora_command
from trees import assert_identical

from tests import tiny_runs
from tests.tiny_runs import weights

Lora = Callable[..., Path]


@pytest.fixture
def lora(tiny_model: Path, data: Path, tmp_path: Path) -> Lora:
    """Runs a small job of the command in this process; options given here come later, and so win."""

    def run(*more: object, model: Path = tiny_model, data: Path = data) -> Path:
        out = tmp_path / "out"
        line = f"--train --model {model} --data {data} --adapter-path {out} --num-layers 1 --batch-size 2 --iters 4"
        line += " --val-batches 1 --steps-per-report 4 --max-seq-length 96"
        lora_command.main([*line.split(), *map(str, more)])
        return out

    return run


def saved(out: Path) -> dict[str, mx.array]:
    return weights(out / "adapters.safetensors")


def test_one_command_line_for_all_starts(lora: Lora, tmp_path: Path, capsys) -> None:
    out = lora("--resume")
    assert (
        f"there is no checkpoint in {out / 'checkpoints'} yet: the run starts from the beginning"
        in capsys.readouterr().out
    )
    lora("--resume")  # it is through, and stays as it is
    again = capsys.readouterr().out
    assert "iter     4  resumed from" in again and "iter     4  all 4 iterations are done" in again
    lora("--resume", "--iters", 8)
    assert "resumed from" in capsys.readouterr().out
    stopped = saved(out)
    shutil.rmtree(out)
    lora("--iters", 8)
    assert_identical(stopped, saved(out))


def test_checkpoints_that_are_all_damaged_are_no_new_beginning(lora: Lora, tmp_path: Path) -> None:
    out = lora()
    (checkpoint,) = (out / "checkpoints").iterdir()
    (checkpoint / "weights.safetensors").write_bytes(b"")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(InputError, match="there is no whole checkpoint in"):
        lora("--resume")
    with pytest.raises(InputError, match="is not a checkpoint"):
        lora("--resume", out / "checkpoints" / "0000099")
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    # All that a replacement left that was killed between its two renamings.
    checkpoint.rename(out / "checkpoints" / ".0000004.old")
    with pytest.raises(InputError):
        lora("--resume")


def test_old_weights_are_for_the_first_start(lora: Lora, tmp_path: Path, capsys) -> None:
    old = tmp_path / "old.safetensors"
    mx.save_safetensors(str(old), {path: array + 0.5 for path, array in saved(lora()).items()})
    shutil.rmtree(tmp_path / "out")
    options = ("--resume", "--resume-adapter-file", old, "--learning-rate", 0)
    out = lora(*options)
    assert f"{old}: used all 14 arrays" in capsys.readouterr().out
    assert_identical(saved(out), mx.load(str(old)))  # no rate, no change
    old.unlink()
    lora(*options, "--iters", 6)
    assert "resume_adapter_file is not used: the run goes on from a checkpoint" in capsys.readouterr().out


# Other data.


def edited(folder: Path, data: Path, edit: Callable[[list[dict]], object], *names: str) -> Path:
    shutil.copytree(data, folder)
    for name in names or ("train", "valid"):
        file = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        edit(rows)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def chat(tmp_path: Path, data: Path) -> Path:
    def to_chat(rows: list[dict]) -> None:
        rows[:] = [{"messages": [{"role": "user", "content": row["text"][:40]}]} for row in rows]

    return edited(tmp_path / "chat", data, to_chat)


def with_template(folder: Path, tiny_model: Path, template: str) -> Path:
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def test_a_changed_chat_template(lora: Lora, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<u>{{ m.content }}{% endfor %}"
    one = with_template(tmp_path / "one", tiny_model, template)
    other = with_template(tmp_path / "other", tiny_model, template.replace("<u>", "<v>"))
    rows = chat(tmp_path, data)
    lora(model=one, data=rows)
    with pytest.raises(InputError, match=r"(?m)^  data +rows \w+ +rows \w+\n  validation data +rows \w+ +rows \w+$"):
        lora("--resume", model=other, data=rows)
    lora("--resume", "--allow-change", "data", "--allow-change", "validation data", model=other, data=rows)


def test_one_word_of_the_validation_set_and_the_order_of_the_rows(lora: Lora, data: Path, tmp_path: Path) -> None:
    lora()
    word = edited(tmp_path / "word", data, lambda rows: rows[-1].update(text=rows[-1]["text"] + "!"), "valid")
    with pytest.raises(InputError, match=r"another run:\n  what.*\n  validation data +rows .*\nto go on all the same"):
        lora("--resume", data=word)
    order = edited(tmp_path / "order", data, list.reverse, "train")
    with pytest.raises(InputError, match=r"another run:\n  what.*\n  data +rows .*\nto go on all the same"):
        lora("--resume", data=order)
    same = edited(tmp_path / "same", data, lambda rows: [row.update(source="here") for row in rows])
    lora("--resume", data=same)  # another file with what is trained on


def test_where_the_loss_begins_is_a_part_of_the_data() -> None:
    rows = [([1, 2, 3], 0), ([4, 5], 1)]
    others = [[([1, 2, 3], 0), ([4, 5], 0)], [([1, 2, 3, 4], 0), ([5], 1)], rows[::-1], rows[:1], [*rows, ([], 0)]]
    assert len({fingerprint.of_rows(each) for each in (rows, *others)}) == 6
    for convert in (tuple, np.array, mx.array):
        assert fingerprint.of_rows((convert(tokens), offset) for tokens, offset in rows) == fingerprint.of_rows(rows)


# Another place in them.


def test_a_smaller_number_of_batches_begins_a_new_epoch(lora: Lora, tmp_path: Path) -> None:
    lora("--iters", 10)  # batch 10 of 12
    options = ("--resume", "--iters", 14, "--batch-size", 4, "--allow-change", "batch_size")
    with pytest.warns(
        UserWarning, match="at batch 10 of an epoch of 12 batches, and an epoch has 6 now: a new epoch begins"
    ):
        out = lora(*options)
    assert len((out / "log.jsonl").read_text().splitlines()) == 14 + 3  # validations in iterations 1, 10 and 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and from there it goes on in its place
        lora("--resume", "--iters", 16, "--batch-size", 4)


def test_the_same_from_python(tiny_model: Path, tmp_path: Path, capsys) -> None:
    examples = [(list(range(3 + i, 13 + i)), 0) for i in range(12)]

    def train(rows: list, **options) -> None:
        tiny_runs.train(tiny_model, tmp_path, rows=rows, iters=4, keep_checkpoints=1, **options)

    for wrong in (True, "", 3):
        with pytest.raises(InputError, match="it must be a checkpoint's folder, 'auto' or None"):
            train(examples, resume=wrong)
    train(examples, resume="auto")
    assert "yet: the run starts from the beginning" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"(?m)^  data +rows "):
        train([*examples[1:], examples[0]], resume="auto")
    with pytest.raises(InputError, match=r"(?m)^  examples +10 +12"):
        train(examples[:10], resume="auto", allow=["data"])
    with pytest.warns(UserWarning, match="at batch 4 of an epoch of 6 batches, and an epoch has 5 now"):
        train(examples[:10], resume="auto", allow=["data", "examples"])
