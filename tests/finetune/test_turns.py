"""Training on every turn of the assistant: which tokens these are, for templates as models have them."""

from __future__ import annotations

import json
import re
import shutil
import types
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from compiled_adam import cli, losses
from compiled_adam.base import fingerprint
from compiled_adam.base.errors import InputError
from compiled_adam.finetune import data, turns
from compiled_adam.finetune.batches import Batches
from compiled_adam.finetune.rows import Located
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, ConcatenatedDataset, TextDataset
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.utils import load_tokenizer
from tokenizers.processors import TemplateProcessing

# Written for these tests, in the manner of the families that they are named after.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|end_head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}"
)
ADDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
NO_PROMPT = (  # the end of a question is the beginning of the answer
    "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% else %}[INST]"
    " {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS_TEXT = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
DROPS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGINS_REASONING = (  # in the prompt, and not in the turn that it becomes
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
THINKS = "{% if enable_thinking %}<|think|>{% endif %}" + MARKED
EMPTY_REASONING = (  # in the last turn only, also if there is none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n\n</think>\n\n' if loop.last }}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS_LAST = (  # before the last question, wherever it is
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in messages %}{% if m == last %}{{ tools }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


TALK = said(
    ("user", "Who are you?"), ("assistant", "A lamp 💡."), ("user", "ünd now?"), ("assistant", "Still\na lamp.")
)
SYSTEM = said(("system", "Be brief.")) + TALK
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WEATHER = [
    *said(("user", "Weather in Oslo?")),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    *said(("tool", "rain"), ("assistant", "It rains."), ("user", "Thanks"), ("assistant", "Bye.")),
]
OFFERED = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


@pytest.fixture
def chat(tiny_model: Path):
    return lambda template: load_tokenizer(tiny_model, {"chat_template": template})


def texts(tokenizer, found: tuple[list[int], list[tuple[int, int]]]) -> list[str]:
    tokens, spans = found
    return [tokenizer.decode(tokens[begin:end]) for begin, end in spans]


def make_slow(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers in Python do not say which characters a token has."""
    call = kind.__call__

    def slow(self, *args, return_offsets_mapping: bool = False, **options):
        assert not return_offsets_mapping
        return call(self, *args, **options)

    monkeypatch.setattr(kind, "is_fast", False)
    monkeypatch.setattr(kind, "__call__", slow)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "expected"),
    [
        (CHATML, TALK, None, ["A lamp 💡.<|im_end|>\n", "Still\na lamp.<|im_end|>\n"]),
        (CHATML, SYSTEM, None, ["A lamp 💡.<|im_end|>\n", "Still\na lamp.<|im_end|>\n"]),
        (CHATML, SYSTEM[:-1], None, ["A lamp 💡.<|im_end|>\n"]),  # ends with a question
        (CHATML, TALK[:2] + TALK[3:], None, ["A lamp 💡.<|im_end|>\n", "Still\na lamp.<|im_end|>\n"]),  # two in a row
        (LLAMA3, SYSTEM, None, ["A lamp 💡.<|eot|>", "Still\na lamp.<|eot|>"]),
        (ADDS_SYSTEM, TALK, None, ["A lamp 💡.<|im_end|>\n", "Still\na lamp.<|im_end|>\n"]),
        (NO_PROMPT, TALK, None, [" A lamp 💡.</s>", " Still\na lamp.</s>"]),
        (
            *(TOOLS, WEATHER, OFFERED),
            [
                '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>\n',
                *("It rains.<|im_end|>\n", "Bye.<|im_end|>\n"),
            ],
        ),
        (  # a template that fails where there is neither
            TOOLS.replace("m.content or ''", "(m.content or '') if m.tool_calls else m.content.strip()"),
            *(WEATHER[:2], None),
            ['<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>\n'],
        ),
        (MARKED, TALK, None, ["A lamp 💡.<|im_end|>", "Still\na lamp.<|im_end|>"]),
        (MARKS_TEXT.replace("{% gen", "{%- gen"), TALK, None, ["A lamp 💡.", "Still\na lamp."]),
        ("{{ tools }}" + MARKED, TALK, OFFERED, ["A lamp 💡.<|im_end|>", "Still\na lamp.<|im_end|>"]),
        (
            *(MARKED, said(("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e")), None),
            ["c<|im_end|>", "e<|im_end|>"],  # the template says where they are, though it drops reasoning
        ),
        (DROPS_REASONING, TALK, None, ["A lamp 💡.<|im_end|>\n", "Still\na lamp.<|im_end|>\n"]),  # there is none
        (TOOLS_LAST, TALK, None, None),
        (TOOLS_LAST, TALK[:2], OFFERED, ["A lamp 💡.<|im_end|>\n"]),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_the_tokens_of_every_turn(template, messages, tools, expected, fast, chat, monkeypatch) -> None:
    tokenizer = chat(template)
    if not fast and "generation %}" not in template:
        make_slow(type(tokenizer._tokenizer), monkeypatch)
    if expected is None:
        with pytest.raises(InputError, match=r"^the chat template writes messages 1 to 2 differently"):
            turns.tokenized(tokenizer, messages, tools)
        return
    found = turns.tokenized(tokenizer, messages, tools)
    assert found[0] == tokenizer.apply_chat_template(messages, tools=tools)
    assert texts(tokenizer, found) == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ADDS_SYSTEM, NO_PROMPT])
def test_a_single_turn_is_what_mask_prompt_trains(template: str, chat) -> None:
    tokenizer = chat(template)
    tokens, offset = ChatDataset([], tokenizer, mask_prompt=True).process({"messages": SYSTEM[:3]})
    assert turns.tokenized(tokenizer, SYSTEM[:3], None) == (tokens, [(offset, len(tokens))])


@pytest.mark.parametrize("fast", [True, False])
def test_a_token_with_characters_of_both_sides_is_not_trained(fast: bool, chat, monkeypatch) -> None:
    tokenizer = chat("{% for m in messages %}{{ m.content }}{% endfor %}")
    word = next(word for word in ("model", "data", "training") if len(tokenizer.encode(word)) == 1)
    messages = said(("user", "= " + word[:2]), ("assistant", word[2:] + " ="), ("user", "="))
    if not fast:
        make_slow(type(tokenizer._tokenizer), monkeypatch)
        with pytest.raises(InputError, match=r"^the tokens of a part of the conversation are not a part"):
            turns.tokenized(tokenizer, messages, None)
        return
    tokens, spans = turns.tokenized(tokenizer, messages, None)
    trained = [tokenizer.decode(tokens[begin:end]) for begin, end in spans]
    assert word in tokenizer.decode(tokens) and len(trained) == 1 and trained[0] in (" =", " ")


@pytest.mark.parametrize("fast", [True, False])
def test_a_tokenizer_that_adds_tokens_by_itself(fast: bool, chat, monkeypatch) -> None:
    """A template writes all special tokens. Those that a tokenizer puts before any text would shift the turns."""
    tokenizer = chat(CHATML)
    first = tokenizer.convert_ids_to_tokens(5)
    tokenizer._tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{first} $A", None, [(first, 5)])
    assert tokenizer.encode("a")[0] == 5
    if not fast:
        make_slow(type(tokenizer._tokenizer), monkeypatch)
    found = turns.tokenized(tokenizer, TALK, None)
    assert texts(tokenizer, found) == ["A lamp 💡.<|im_end|>\n", "Still\na lamp.<|im_end|>\n"]


def test_which_template_of_a_tokenizer_marks_turns(chat) -> None:
    with_end, without_end = (["A lamp 💡." + end, "Still\na lamp." + end] for end in ("<|im_end|>\n", "<|im_end|>"))
    both = chat(CHATML)
    both.chat_template = {"default": CHATML, "tool_use": MARKS_TEXT}
    assert texts(both, turns.tokenized(both, TALK, None)) == with_end
    assert texts(both, turns.tokenized(both, TALK, OFFERED)) == ["A lamp 💡.", "Still\na lamp."]
    # A function of mlx-lm takes the place of the template.
    own, chatml = chat(MARKED), chat(CHATML)
    own._chat_template = lambda *args, **options: chatml.apply_chat_template(*args, tokenize=False, **options)
    assert texts(own, turns.tokenized(own, TALK, None)) == with_end
    # mlx-lm lets models that can think do so.
    thinking = chat(THINKS)
    thinking._think_start = "<|think|>"
    tokens, spans = turns.tokenized(thinking, TALK, None)
    assert thinking.decode(tokens).startswith("<|think|>") and texts(thinking, (tokens, spans)) == without_end


class Adds:
    """A tokenizer that writes one more token after a conversation than its text has."""

    def __init__(self, tokenizer) -> None:
        self._own = tokenizer

    def __getattr__(self, name: str):
        return getattr(self._own, name)

    def apply_chat_template(self, *args, tokenize: bool = True, **options):
        found = self._own.apply_chat_template(*args, tokenize=tokenize, **options)
        return [*found, 5] if tokenize else found


@pytest.mark.parametrize(
    ("template", "message"),
    [(CHATML, "the tokens of a part of the"), (MARKED, "the tokens that the chat template marks")],
)
def test_tokens_that_are_not_those_of_the_text(template: str, message: str, chat) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        turns.tokenized(Adds(chat(template)), TALK, None)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            *(
                DROPS_REASONING,
                said(("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e")),
            ),
            r"line 2: the chat template writes messages 1 to 2 differently .* earlier reasoning, .*--mask-prompt\)",
        ),
        (BEGINS_REASONING, TALK, "line 2: the chat template writes messages 1 to 2 differently"),
        (EMPTY_REASONING, TALK, "line 2: the chat template writes messages 1 to 2 differently"),
        (CHATML, TALK[1:], r"line 2: message 1 is the assistant's; with assistant_only_loss \(--assistant-only-loss\)"),
        (CHATML, TALK[:1], r"line 2: no message has the role 'assistant', .*; the roles are 'user'$"),
        (
            *("{% if messages|length < 4 %}{{ raise_exception('too few') }}{% endif %}" + CHATML, TALK),
            r"line 2: the chat template refuses the messages up to number 2 alone \(too few\)",
        ),
        (
            *("{{ raise_exception('never') }}", TALK),
            "line 2: the model's chat template refuses it: never",
        ),
        (
            *("{% generation %}{% endgeneration %}" + CHATML, TALK),
            "line 2: the chat template marks no token as the assistant's; make an example of each turn",
        ),
        *(  # an answer of nothing would be trained
            (
                template,
                [WEATHER[0], {**WEATHER[1], "content": ""}, *WEATHER[2:]],
                "line 2: the chat template leaves out"
                r" the tool_calls of message 2, so assistant_only_loss \(.*\) would train an answer without them",
            )
            for template in (CHATML, MARKED)
        ),
    ],
)
def test_what_has_no_certain_place_is_refused(template, messages, message, chat, tmp_path: Path) -> None:
    good = said(("user", "a"), ("assistant", "b"))
    rows = [json.dumps({"messages": each}) for each in (good, messages)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    job = types.SimpleNamespace(data=str(tmp_path), train=True, test=False, mask_prompt=False, assistant_only_loss=True)
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}/train.jsonl {message}"):
        train, _, _ = data.load(job, chat(template))
        train.process(train[1])


def test_prompts_with_completions_have_a_turn_and_texts_have_none(chat, tmp_path: Path) -> None:
    job = types.SimpleNamespace(mask_prompt=False, assistant_only_loss=True)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "2 + 2", "completion": "4"}')
    tokenizer = chat(CHATML)
    rows = data.read(tmp_path / "pairs.jsonl", tokenizer, job)
    assert texts(tokenizer, rows.process(rows[0])) == ["4<|im_end|>\n"]
    (tmp_path / "texts.jsonl").write_text('{"text": "2 + 2"}')
    with pytest.raises(
        InputError, match=r"line 1 has only a text; assistant_only_loss \(--assistant-only-loss\) needs m"
    ):
        data.read(tmp_path / "texts.jsonl", tokenizer, job)


def test_sets_of_several_formats_from_hugging_face(chat) -> None:
    """They are one data set whose rows say which part they are of; these rows are checked when they are tokenized."""
    tokenizer = chat(CHATML)
    pairs = CompletionsDataset([{"q": "2 + 2", "a": "4"}], tokenizer, "q", "a", mask_prompt=False)
    parts = [pairs, ChatDataset([{"messages": TALK}], tokenizer), TextDataset([{"text": "2 + 2"}], tokenizer)]
    rows = Located(ConcatenatedDataset(parts), lambda index: f"row {index}", turns_only=True)
    assert texts(tokenizer, rows.process(rows[0])) == ["4<|im_end|>\n"]
    assert rows.process(rows[1]) == turns.tokenized(tokenizer, TALK, None)
    with pytest.raises(InputError, match=r"^row 2 has only a text; assistant_only_loss"):
        rows.process(rows[2])
    parts[2] = TextDataset([{"txt": "2 + 2"}], tokenizer)
    with pytest.raises(InputError, match=r"^row 2 has no 'text', .*; it has 'txt'$"):  # and not what mlx-lm adds
        rows.process(rows[2])


# Batches of such examples, and the loss.


@pytest.mark.filterwarnings("ignore:an example has")  # it is to be cut
def test_the_loss_is_on_the_spans_that_are_left() -> None:
    rows = [
        (list(range(1, 46)), [(0, 3), (10, 12), (38, 44)]),
        (list(range(1, 8)), [(5, 7)]),
        (list(range(1, 6)), []),  # nothing is left of its turns
    ]
    (batch,) = Batches(rows, 3, 40)
    tokens, _, mask = batch
    assert mask.dtype == mx.bool_ and mask.shape == tokens.shape == (3, 40)
    longest, short, none = ({1, 2, 10, 11, 38, 39}, {5, 6}, set())  # no token comes before token 0
    expected = [none, short, longest]  # sorted by length
    logits = mx.random.normal((3, 39, 50))

    def loss(logits: mx.array):
        return losses.next_token(lambda inputs: logits, *batch)

    (value, count), gradient = mx.value_and_grad(loss)(logits)
    assert count.item() == 8
    moved = [set((np.flatnonzero(row) + 1).tolist()) for row in np.abs(np.array(gradient)).sum(axis=-1)]
    assert moved == expected
    scores = np.array(logits, np.float64)
    each = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, np.array(tokens)[:, 1:, None], -1)[..., 0]
    mean = np.mean([each[row, at - 1] for row, places in enumerate(expected) for at in places])
    assert value.item() == pytest.approx(mean, rel=1e-6)  # float32


def test_one_span_to_the_end_is_an_offset_and_lengths_alone_stay_two_arrays() -> None:
    tokens = list(range(1, 20))
    batches = [next(Batches([(tokens, targets)], 1, 64)) for targets in (7, [(7, 19)])]
    assert [len(batch) for batch in batches] == [2, 3]
    logits = mx.random.normal((1, 32, 50))
    (one, count), (other, same) = (losses.next_token(lambda inputs: logits, *batch) for batch in batches)
    assert one.item() == other.item() and count.item() == same.item() == 12
    with pytest.raises(TypeError):  # a loss that cannot know the mask is not called without it
        default_loss(lambda inputs: logits, *batches[1])


def test_spans_are_a_part_of_what_a_run_is_resumed_with() -> None:
    tokens = [1, 2, 3, 4]
    kinds = (0, 1, [], [(0, 4)], [(1, 4)], [(1, 2)], [(1, 2), (3, 4)])
    assert len({fingerprint.of_rows([(tokens, targets)]) for targets in kinds}) == len(kinds)
    rows = list(Batches([(tokens, [(1, 2)])], 1, 64).rows())
    assert rows == [(tokens, [(1, 2)])]


# The command.


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path):
    """Runs the command on conversations, with a chat template."""

    def run(*more: str, template: str = CHATML, rows: list | None = None) -> int:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        for name in ("train", "valid", "test"):
            lines = [json.dumps({"messages": each}) for each in rows or [TALK, SYSTEM, TALK[:2], SYSTEM[:3]]]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        where = ("--model", str(folder), "--data", str(tmp_path), "--adapter-path", str(tmp_path / "out"))
        small = ("--num-layers", "1", "--iters", "4", "--steps-per-report", "1", "--val-batches", "1")
        sizes = ("--batch-size", "2", "--max-seq-length", "192")
        return cli.main(["lora", *where, *sizes, *(small if "--train" in more else ()), *more])

    return run


def test_the_command_trains_validates_and_tests_on_turns_alone(job, chat, tmp_path: Path, capsys) -> None:
    assert job("--train", "--test", "--assistant-only-loss") == 0
    capsys.readouterr()
    tokenizer = chat(CHATML)
    rows = [TALK, SYSTEM, TALK[:2], SYSTEM[:3]]
    expected = sum(end - begin for row in rows for begin, end in turns.tokenized(tokenizer, row, None)[1])
    entries = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    tokens = [entry["tokens"] for entry in entries if "loss" in entry]
    assert sum(tokens[:2]) == sum(tokens[2:]) == expected  # each epoch, of two batches
    assert any("val_loss" in entry for entry in entries)
    # Tested alone it is the same loss: of turns, and not of everything.
    found = []
    for more in (("--assistant-only-loss",), ()):
        assert job("--test", *more) == 0
        found.append(re.search(r"Test loss (\S+),", capsys.readouterr().out)[1])
    assert found[0] != found[1]


def test_a_resumed_run_trains_the_same_turns(job, capsys) -> None:
    assert job("--train", "--assistant-only-loss") == 0
    assert job("--train", "--resume", "--iters", "6") == 2
    assert re.search(r"--assistant-only-loss +None +True\n +data +rows", capsys.readouterr().err)
    assert job("--train", "--resume", "--iters", "6", "--assistant-only-loss") == 0


def test_the_command_refuses_with_a_remedy(job, capsys) -> None:
    def error() -> str:
        return capsys.readouterr().err.splitlines()[-1]

    assert job("--train", "--assistant-only-loss", "--mask-prompt") == 2
    assert error().endswith("only the last message; give one of them")
    row = said(("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e"))
    assert job("--train", "--assistant-only-loss", template=DROPS_REASONING, rows=[TALK, TALK, row, row]) == 2
    assert "train.jsonl line 3: the chat template writes messages 1 to 2 differently" in error()
