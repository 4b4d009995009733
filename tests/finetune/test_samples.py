"""Samples of a model's answers, and the record of a run that has them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from compiled_adam.base import InputError, random_state
from compiled_adam.finetune import samples
from compiled_adam.finetune.record import Record, is_alive, read
from compiled_adam.finetune.rows import Located
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset
from trees import assert_identical

from tests.tiny_runs import losses_of, stop_after, train, weights


class Letters:
    """A tokenizer: a token is a letter, and a template puts a role before each message."""

    has_chat_template = True

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    def apply_chat_template(self, messages, tools=None, add_generation_prompt=False, return_dict=True):
        if not messages[0]["content"]:
            raise ValueError("nothing was said")
        said = "".join(f"<{message['role'][0]}>{message['content']}" for message in messages)
        return self.encode(said + "<a>" * add_generation_prompt)


def prompts(data, count: int = 9, longest: int = 999) -> list[tuple[str, str, str]]:
    found = samples.prompts(Located(data, "row {}".format), count, longest)
    return [(Letters().decode(each.tokens), each.text, each.expected) for each in found]


def test_the_prompt_of_each_kind_of_example() -> None:
    talk = [("system", "s"), ("user", "hi"), ("assistant", "yes"), ("user", "and?"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in talk]
    chat = [{"messages": messages[:stop]} for stop in (5, 4, 2)]
    assert prompts(ChatDataset(chat, Letters())) == [
        ("<s>s<u>hi<a>yes<u>and?<a>", "and?", "no"),
        ("<s>s<u>hi<a>", "hi", "yes"),
        ("<s>s<u>hi<a>", "hi", ""),  # nobody has answered
    ]
    completions = CompletionsDataset([{"prompt": "2+2", "completion": "4"}], Letters(), "prompt", "completion", False)
    assert prompts(completions) == [("<u>2+2<a>", "2+2", "4")]
    texts = TextDataset([{"text": text} for text in ("abcde", "x", "y" * 200)], Letters())
    most = samples.MOST
    assert prompts(texts) == [("ab", "ab", "cde"), ("x", "x", ""), ("y" * most,) * 3]
    assert [first for first, *_ in prompts(texts, longest=10)] == ["ab", "x", "y" * 10]


def test_examples_come_from_everywhere() -> None:
    texts = TextDataset([{"text": str(i) * 2} for i in range(10)], Letters())
    assert [text for _, text, _ in prompts(texts, 3)] == ["0", "3", "6"]


def test_a_template_that_refuses_an_example() -> None:
    with pytest.raises(ValueError, match="row 0 makes no prompt for"):
        prompts(ChatDataset([{"messages": [{"role": "user", "content": ""}]}], Letters()))


def answering(said: list[nn.Module]):
    """What `train` calls: it draws random numbers, which must not change the run."""

    def sample(model, stop):
        assert not model.training
        mx.eval(mx.random.uniform())
        said.append(model)
        return [{"prompt": "p", "expected": "e", "answer": str(len(said))}]

    return sample


def test_samples_change_no_bit_of_a_run_and_are_kept_when_it_is_resumed(tiny_model: Path, tmp_path: Path) -> None:
    said: list[nn.Module] = []
    states = []
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
        train(tiny_model, tmp_path / name, log=True, sample=answering(said) if name == "with" else None)
        states.append(random_state.get().tolist())
    assert states[0] == states[1] and said[-1].training
    assert_identical(*(weights(tmp_path / name / "adapters.safetensors") for name in ("without", "with")))
    assert len(said) == 2
    assert losses_of(tmp_path / "without") == losses_of(tmp_path / "with")
    folder = tmp_path / "parts"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, folder, log=True, sample=answering(said), training_callback=stop_after(6))
    assert [each["iteration"] for each in read(folder / "run.json")["samples"]] == [0]
    train(tiny_model, folder, log=True, sample=answering(said), resume="auto")
    record = read(folder / "run.json")
    assert [each["iteration"] for each in record["samples"]] == [0, 12] and len(said) == 4
    first, second = record["sessions"]
    assert first["because"].startswith("stopped by SIGINT after iteration 6") and first["iteration"] == 0
    assert second["because"] == "all 12 iterations are done" and second["iteration"] == 6
    # More iterations from an earlier checkpoint: what came after it is forgotten.
    train(tiny_model, folder, log=True, sample=answering(said), resume=folder / "checkpoints" / "0000008", iters=13)
    assert [each["iteration"] for each in read(folder / "run.json")["samples"]] == [0, 13]
    # A run from the beginning moves it aside with the log.
    train(tiny_model, folder, log=True, iters=1)
    assert read(folder / "run.json")["samples"] == [] and len(read(folder / "run.json")["sessions"]) == 1
    assert len(read(folder / "previous-2" / "run.json")["sessions"]) == 3


def test_samples_that_fail_do_not_end_the_run(tiny_model: Path, tmp_path: Path, capsys) -> None:
    def fails(model, stop):
        raise RuntimeError("no cache")

    train(tiny_model, tmp_path, log=True, iters=1, sample=fails)
    assert "warning: no samples of the model after iteration 0: RuntimeError('no cache')" in capsys.readouterr().out
    assert losses_of(tmp_path) and read(tmp_path / "run.json")["samples"] == []
    with pytest.raises(ValueError, match=r"sample is given, .* needs log=True"):
        train(tiny_model, tmp_path, sample=fails)


def test_answers_end_when_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [SimpleNamespace(text=text) for text in "abc"]
    monkeypatch.setattr(samples, "stream_generate", lambda model, tokenizer, prompt, max_tokens: iter(parts))
    chosen = [samples.Prompt(SimpleNamespace(tokenizer=None), [1], "p", "e")] * 2
    whole = {"prompt": "p", "expected": "e", "answer": "abc"}
    assert samples.answers(None, lambda: False, chosen) == [whole, whole]
    asked = iter([False] * 4 + [True])
    assert samples.answers(None, lambda: next(asked), chosen) == [whole]


def test_a_record_that_cannot_be_written_or_read_ends_no_run(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "run.json").mkdir()
    with Record(tmp_path / "run.json", 0, 1, said.append) as record:
        record.add(0, [])
    assert len(said) == 1 and "is a folder" in said[0] and "the run goes on without it" in said[0]
    os.rmdir(tmp_path / "run.json")
    (tmp_path / "run.json").write_text('{"sessions": 1}')
    with Record(tmp_path / "run.json", 5, 1, said.append):
        pass
    assert len(said) == 2 and "is not the record of a run" in said[1] and "a new one is begun" in said[1]
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) == 1
    with pytest.raises(RuntimeError), Record(tmp_path / "run.json", 5, 1, said.append):
        raise RuntimeError("out of luck")
    with pytest.raises(SystemExit), Record(tmp_path / "run.json", 5, 1, said.append):
        raise SystemExit(143)
    reasons = [session["because"] for session in read(tmp_path / "run.json")["sessions"]]
    assert reasons == ["", "out of luck", "stopped by a signal"]
    os.mkfifo(tmp_path / "pipe")  # which would be waited for
    with pytest.raises(InputError, match="pipe is no file; remove it"):
        read(tmp_path / "pipe")


def test_a_run_on_another_machine_may_be_alive() -> None:
    session = {"ended": "", "host": "elsewhere", "pid": 2**40}
    assert is_alive(session) and not is_alive({**session, "ended": "2026-01-01"})
    assert not is_alive({**session, "host": socket.gethostname()})
