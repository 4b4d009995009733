"""Data that cannot be used is named by file and line, before anything is trained."""

from __future__ import annotations

import json
import os
import shutil
import types
from pathlib import Path

import compiled_adam as ca
import pytest
from compiled_adam import cli
from compiled_adam.base.errors import InputError
from compiled_adam.finetune import data
from compiled_adam.finetune.batches import Batches
from compiled_adam.finetune.rows import located
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset, TextDataset
from mlx_lm.utils import load_tokenizer

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
ADDING = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return load_tokenizer(tiny_model)


@pytest.fixture
def chat(tiny_model: Path):
    """The tokenizer with a chat template."""
    return lambda template: load_tokenizer(tiny_model, {"chat_template": template})


def job(folder: Path, **changes) -> types.SimpleNamespace:
    options = {"data": str(folder), "train": True, "test": False, "mask_prompt": False, "batch_size": 1}
    return types.SimpleNamespace(**{**options, **changes})


def text(content: str) -> str:
    return json.dumps({"text": content})


def messages(*pairs: tuple[str, object], **more) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs], **more})


TALK = messages(("user", "hello"), ("assistant", "good day"))


@pytest.mark.parametrize(
    "content",
    [
        b"%b\n%b\n",
        b"%b\n%b",
        b"%b\n%b\n\n \n\t\n",
        b"\n%b\n\n\n%b\n",
        b"\xef\xbb\xbf%b\n%b\n",
        b"\xef\xbb\xbf\r\n%b\r\n%b\r\n",
        b"%b\r%b\r",
    ],
)
def test_files_as_editors_write_them(content: bytes, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(content % (text("one").encode(), text("zwei ü").encode()))
    train, valid, test = data.load(job(tmp_path), tokenizer)
    assert [train[i]["text"] for i in range(len(train))] == ["one", "zwei ü"]
    assert train.process(train[1]) == ([*tokenizer.encode("zwei ü"), tokenizer.eos_token_id], 0)
    assert (len(valid), len(test)) == (0, 0)


def test_separators_in_a_text_do_not_end_its_line(tokenizer, tmp_path: Path) -> None:
    row = json.dumps({"text": "a\u2028b\x85c\x0bd"}, ensure_ascii=False)
    (tmp_path / "train.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    train, _, _ = data.load(job(tmp_path), tokenizer)
    assert len(train) == 2 and train[0]["text"] == "a\u2028b\x85c\x0bd"


GOOD = text("good").encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", r"line 3 is not JSON \(Expecting value: .*\): 'not json'; each line must be one object"),
        (b'{"text": "x"', r"line 3 is not JSON"),
        (b'{"text": "caf\xe9"}', r"line 3 is not UTF-8 \(byte 0xe9 at position 13\); save the file"),
        (b"[" * 100_000, r"line 3 is not JSON \(.*recursion"),
        (b"5", r"line 3 is not an object such as .*: 5"),
        (b'["a", "b"]', r"line 3 is not an object such as .*: \[\"a\", \"b\"\]"),
        (b"null", r"line 3 is not an object such as .*: null"),
        (b'{"txt": "x"}', r"line 3 has no 'text', which the first row of its data set has; it has 'txt'"),
        (b"{}", r"line 3 has no 'text', .*; it has nothing"),
        (TALK.encode(), r"line 3 has no 'text', .*; it has 'messages'"),
        (b'{"text": null}', r"line 3: 'text' is null; it must be text"),
        (b'{"text": 5}', r"line 3: 'text' is a number"),
        (b'{"text": true}', r"line 3: 'text' is true or false"),
        (b'{"text": ["a"]}', r"line 3: 'text' is a list"),
        (b'{"text": {"a": 1}}', r"line 3: 'text' is an object"),
        (b'{"text": ""}', r"line 3: 'text' is empty; remove the row"),
        (
            b'{"text": "a\\ud800"}',
            r"line 3 has half of a character \('\\ud800'\), which cannot be tokenized; remove it",
        ),
        (b'{"text": "a", "tools": [{"name": "\\uDFFF"}]}', r"line 3 has half of a character \('\\udfff'\)"),
    ],
)
@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_a_line_that_cannot_be_used(line: bytes, message: str, name: str, tokenizer, tmp_path: Path) -> None:
    for each in ("train", "valid", "test"):
        bad = line if each == name else GOOD
        (tmp_path / f"{each}.jsonl").write_bytes(b"\n".join([GOOD, b"", bad, GOOD, b""]))
    with pytest.raises(InputError, match=f"^{tmp_path / name}.jsonl {message}"):
        data.load(job(tmp_path, test=True), tokenizer)


CHAT = [
    (messages(), "'messages' is empty"),
    ('{"messages": "hello"}', "'messages' is text; it must be a list of messages"),
    ('{"messages": null}', "'messages' is null"),
    ('{"messages": ["hello"]}', "message 1 is text; it must be an object with 'role' and 'content'"),
    ('{"messages": [{"content": "a"}]}', "message 1: it has no 'role'; it must be text such as 'user'"),
    ('{"messages": [{"role": 1, "content": "a"}]}', "message 1: its 'role' is a number"),
    (messages(("user", "a"), ("assistant", None)), "message 2: 'content' is null; it must be text"),
    ('{"messages": [{"role": "user"}]}', "message 1: there is no 'content'; it must be text"),
    (messages(("user", 5)), "message 1: 'content' is a number"),
    (messages(("user", {"a": 1})), "message 1: 'content' is an object"),
    (messages(("user", "a"), tools="weather"), "'tools' is text; it must be a list of objects"),
    (messages(("user", "a"), tools=["weather"]), "'tools' has text in it; it must be a list of objects"),
]


@pytest.mark.parametrize(("line", "message"), CHAT, ids=[message for _, message in CHAT])
def test_a_conversation_that_cannot_be_used(line: str, message: str, chat, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(f"{TALK}\n{line}\n")
    with pytest.raises(InputError, match=f"^{tmp_path}/train.jsonl line 2: {message}"):
        data.load(job(tmp_path), chat(PLAIN))


def test_conversations_that_templates_know(chat, tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        TALK,
        r'{"messages": [{"role": "user", "content": "\ud83d\ude00 \\ud800"}]}',  # two halves; and no escape
        json.dumps({"messages": [{"role": "user", "content": "a"}, call], "tools": None}),
        json.dumps({"messages": [{"role": "user", "content": "a"}, {**call, "content": None}], "tools": []}),
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
        json.dumps({"messages": [{"role": "user", "content": ""}], "id": 5}),
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    train, _, _ = data.load(job(tmp_path), chat(PLAIN))
    assert all(len(train.process(train[i])[0]) > 1 for i in range(len(rows)))


@pytest.mark.parametrize(
    ("template", "line", "message"),
    [
        (STRICT, messages(("system", "be brief"), ("user", "a")), "refuses it: System role not supported"),
        (ADDING, '{"messages": [{"role": "a", "content": ["b"]}]}', "refuses it: can only concatenate str"),
        ("{{ messages[3].content }}", TALK, "refuses it: .*no element 3"),
        ("{% if %}", TALK, "refuses it: Expected an expression"),
    ],
)
def test_a_conversation_that_the_template_refuses(template: str, line: str, message: str, chat, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(f"{TALK}\n\n{line}\n")
    train, _, _ = data.load(job(tmp_path), chat(template))
    with pytest.raises(InputError, match=f"train.jsonl line 3: the model's chat template {message}"):
        train.process(train[1])


def test_without_a_template_or_a_prompt(tokenizer, chat, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(f"{TALK}\n")
    with pytest.raises(
        InputError, match="line 1 is a conversation, but the tokenizer of the model has no chat template"
    ):
        data.load(job(tmp_path), tokenizer)
    file.write_text(f"{TALK}\n{messages(('user', 'a'))}\n")
    with pytest.raises(InputError, match=r"line 2: 'messages' has only one message, but mask_prompt \(--mask-prompt\)"):
        data.load(job(tmp_path, mask_prompt=True), chat(PLAIN))
    file.write_text(f"{text('a')}\n")
    with pytest.raises(InputError, match=r"line 1 has only a text; mask_prompt \(--mask-prompt\) needs a prompt"):
        data.load(job(tmp_path, mask_prompt=True), tokenizer)


@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_prompts_and_completions(key: str, chat, tmp_path: Path) -> None:
    good = {"prompt": "2 + 2", "completion": "4"}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps({**good, key: None})}\n")
    with pytest.raises(InputError, match=f"train.jsonl line 2: '{key}' is null; it must be text"):
        data.load(job(tmp_path), chat(PLAIN))
    del good[key]
    (tmp_path / "train.jsonl").write_text(f"{json.dumps({'prompt': 'a', 'completion': 'b'})}\n{json.dumps(good)}\n")
    with pytest.raises(InputError, match=f"train.jsonl line 2 has no '{key}'"):
        data.load(job(tmp_path), chat(PLAIN))


def test_a_format_that_is_none(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('\n{"instruction": "a", "output": "b"}\n')
    with pytest.raises(
        InputError, match=r"line 2 has the keys 'instruction', 'output'; an example has 'text', or 'messag"
    ):
        data.load(job(tmp_path), tokenizer)
    (tmp_path / "train.jsonl").write_text('{"content": "a"}\n{"content": ""}\n')
    with pytest.raises(InputError, match=r"line 2: 'content' is empty"):
        data.load(job(tmp_path, text_feature="content"), tokenizer)


def test_a_text_of_which_the_tokenizer_makes_nothing(tokenizer, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "train.jsonl").write_text(f"{text('a')}\n{text('*')}\n")
    train, _, _ = data.load(job(tmp_path), tokenizer)
    encode = tokenizer._tokenizer.encode
    monkeypatch.setattr(train.data.tokenizer._tokenizer, "encode", lambda text: encode(text.strip("*")))
    assert len(train.process(train[0])[0]) == 2
    with pytest.raises(InputError, match="line 2: the tokenizer makes no token of it"):
        train.process(train[1])


def test_what_nobody_expected_is_raised_as_it_is(tokenizer, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "train.jsonl").write_text(f"{text('a')}\n")
    train, _, _ = data.load(job(tmp_path), tokenizer)
    monkeypatch.setattr(train.data, "process", lambda row: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        train.process(train[0])
    with pytest.raises(KeyError, match="a bug"):
        next(Batches(CacheDataset(train), 1, 64))


def test_sets_that_are_missing(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Training set not found or empty: .* has no train.jsonl: it is empty"):
        data.load(job(tmp_path), tokenizer)
    (tmp_path / "valid.jsonl").write_text(text("a"))
    with pytest.raises(InputError, match=r"has no train.jsonl, but valid.jsonl\. Must provide"):
        data.load(job(tmp_path), tokenizer)
    with pytest.raises(InputError, match=r"Test set not found or empty: .* has no test.jsonl"):
        data.load(job(tmp_path, train=False, test=True), tokenizer)
    for content in ("", "\n \n"):
        (tmp_path / "train.jsonl").write_text(content)
        with pytest.raises(InputError, match=r"train.jsonl has no examples; give it some, or remove it"):
            data.load(job(tmp_path), tokenizer)
    with pytest.raises(InputError, match=r"data is '.*train.jsonl', which is a file; give the folder"):
        data.load(job(tmp_path / "train.jsonl"), tokenizer)


def test_files_that_a_job_does_not_read_may_be_anything(tokenizer, tmp_path: Path, capsys) -> None:
    (tmp_path / "elsewhere.jsonl").write_text(text("a"))
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    (tmp_path / "test.jsonl").write_bytes(b"\xff\xfe")
    assert len(data.load(job(tmp_path), tokenizer)[0]) == 1
    warning = "Warning: Validation set not found or empty. Training will proceed without validation.\n"
    assert capsys.readouterr().out == warning
    (tmp_path / "valid.jsonl").write_text(text("a"))
    data.load(job(tmp_path), tokenizer)
    assert capsys.readouterr().out == ""


def test_rows_that_are_given_in_python(tokenizer, tmp_path: Path) -> None:
    good, bad = ({"text": text} for text in ("a longer text", ""))
    for rows, name in (([good, bad], "train set"), ([bad, good], "validation set")):
        dataset = located(CacheDataset(TextDataset(rows, tokenizer)), name)
        index = rows.index(bad)
        with pytest.raises(InputError, match=rf"^example {index} \(counted from 0\) of the {name}: 'text' is empty"):
            dataset[index]
        assert dataset[1 - index][0][-1] == tokenizer.eos_token_id
    half = located(CacheDataset(TextDataset([{"text": "a\ud800"}], tokenizer)), "train set")
    with pytest.raises(InputError, match=r"'text' has half of a character \('\\ud800'\)"):
        half[0]
    with pytest.raises(
        InputError, match=r"^example 0 \(counted from 0\) of the train set is text; it must be an object"
    ):
        located(CacheDataset(TextDataset(["a text"], tokenizer)), "train set")[0]
    # What is no data set of mlx-lm's rows stays what it is; tokens that are there already are used.
    own = [([1, 2], 0)]
    assert located(own, "train set") is own and located(None, "train set") is None
    cached = CacheDataset(ChatDataset([{"messages": "nothing"}], tokenizer))
    cached._proc_data[0] = ([7, 8], 0)
    assert located(cached, "train set")[0] == ([7, 8], 0)


def test_training_names_the_set(tiny_model: Path, tokenizer, tmp_path: Path) -> None:
    from tests.finetune.test_stopping import arguments, lora

    sets = [CacheDataset(TextDataset([{"text": t} for t in texts], tokenizer)) for texts in (["a"] * 4, ["b", ""])]
    with pytest.raises(InputError, match=r"example 1 \(counted from 0\) of the validation set: 'text' is empty"):
        ca.train(lora(tiny_model), ca.Adam(1e-3), *sets, args=arguments(tmp_path))


# The command.


@pytest.fixture
def strict_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose chat template refuses system messages."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "strict"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": STRICT}))
    return folder


def lora(model: Path, folder: Path, *more: str) -> int:
    options = ["--iters", "2", "--num-layers", "1", "--batch-size", "2", "--max-seq-length", "64"]
    where = ("--model", str(model), "--data", str(folder / "data"), "--adapter-path", str(folder / "out"))
    return cli.main(["lora", *where, *(options if "--train" in more else options[4:]), *more])


def write(folder: Path, **sets: list[str]) -> None:
    (folder / "data").mkdir(exist_ok=True)
    for name, lines in sets.items():
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("bad", ['{"text": ""}', "not json"])
def test_the_test_set_is_looked_at_before_training(bad: str, tiny_model: Path, tmp_path: Path, capsys) -> None:
    write(tmp_path, train=[text("a text")] * 4, test=[text("good"), text("good"), bad])
    assert lora(tiny_model, tmp_path, "--train", "--test") == 2
    assert "test.jsonl line 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--train"], ["--train", "--bucket"], ["--train", "--test"], ["--test"]])
def test_a_template_that_refuses_is_one_sentence(more: list[str], strict_model: Path, tmp_path: Path, capsys) -> None:
    refused = [TALK, TALK, messages(("system", "be brief"), ("user", "a")), TALK]  # two batches, of two iterations
    sets = {"train": refused, "test": [TALK] * 4} if "--test" not in more else {"train": [TALK] * 4, "test": refused}
    write(tmp_path, **sets, valid=[TALK] * 4)
    tested = ["--adapter-path", ""] if "--train" not in more else []
    code = lora(strict_model, tmp_path, *more, *tested)
    file = "test" if "--test" in more else "train"
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and f"{file}.jsonl line 3: the model's chat template refuses it: System role" in error, error


@pytest.mark.filterwarnings("ignore:an example has")  # it is to be cut
def test_prompts_that_fill_the_length(strict_model: Path, tmp_path: Path, capsys) -> None:
    rows = [json.dumps({"prompt": "much " * 80, "completion": "yes"})] * 4
    write(tmp_path, train=rows, valid=rows, test=rows)
    assert lora(strict_model, tmp_path, "--train", "--test", "--mask-prompt", "--steps-per-report", "1") == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith(
        "compiled-adam: there is no test loss: no example has a token to predict"
    )
    assert said.out.count("warning: no token has been trained yet") == 1
    assert "no validation loss: no example" in said.out and "no targets" in said.out and "nan" not in said.out


def test_sets_of_hugging_face(tiny_model: Path, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path, train=[text("good")] * 3 + [text("")])
    files = {"data_files": {"train": str(tmp_path / "data" / "train.jsonl")}}
    described = {"path": "json", "train_split": "train", "valid_split": "train[:2]", "config": files}
    train, valid, _ = data.load(job(tmp_path, hf_dataset=described), tokenizer)
    assert len(train) == 4 and len(valid) == 2 and train.process(train[0])[0]
    with pytest.raises(InputError, match=r"^example 3 \(counted from 0\) of the train set: 'text' is empty"):
        train.process(train[3])
    with pytest.raises(InputError, match=r"hf_dataset json cannot be used: .*tain"):
        data.load(job(tmp_path, hf_dataset={**described, "train_split": "tain"}), tokenizer)
    # Of several sets each row is checked by its own format.
    train, _, _ = data.load(job(tmp_path, hf_dataset=[described, described]), tokenizer)
    with pytest.raises(InputError, match=r"^example 7 .* of the train set: 'text' is empty"):
        train.process(train[7])
    monkeypatch.setattr(data, "load_dataset", lambda *_: ([], [], []))  # as of a name that has no such splits
    with pytest.raises(InputError, match=r"^Training set not found or empty\. Must provide"):
        data.load(job(tmp_path / "none"), tokenizer)


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_what_is_no_file_is_named(name: str, tmp_path: Path, tokenizer) -> None:
    """A link into nowhere is no set that is missing: training would go on without validation."""
    for each in ("train", "valid", "test"):
        (tmp_path / f"{each}.jsonl").write_text(text("good") + "\n")
    file = tmp_path / f"{name}.jsonl"
    file.unlink()
    file.symlink_to(tmp_path / "moved.jsonl")
    with pytest.raises(InputError, match=rf"{name}.jsonl is a link to .*moved.jsonl, which does not exist"):
        data.load(job(tmp_path, test=True), tokenizer)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match=rf"{name}.jsonl is no regular file; it must be a file of JSON lines"):
        data.load(job(tmp_path, test=True), tokenizer)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=rf"{name}.jsonl is a folder; it must be a file of JSON lines"):
        data.load(job(tmp_path, test=True), tokenizer)


def test_a_number_too_long_for_python_is_a_line_that_cannot_be_used(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "train.jsonl").write_text(f'{text("good")}\n{{"text": "a", "id": {"1" * 5000}}}\n')
    with pytest.raises(InputError, match=r"train.jsonl line 2 is not JSON \(Exceeds the limit"):
        data.load(job(tmp_path), tokenizer)
