"""A meta.json that is damaged, or that somebody has made up: one sentence, and the checkpoint before it is used."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import pytest
from compiled_adam.base.errors import InputError
from compiled_adam.checkpoint import meta
from compiled_adam.checkpoint.durable import record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.nets import linear_net, squared_error

Two = tuple[Path, ca.TrainStep, dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """A folder with the checkpoints "1" and "2", a step that they fit, and what the second one's meta.json has."""
    folder = tmp_path_factory.mktemp("two")
    step = ca.make_step(linear_net(), squared_error, ca.AdamW(1e-3, moments="bfloat16"))
    for name in "12":
        ca.save_checkpoint(folder / name, step, {"name": name}, settings={"data": "x"})
    content = json.loads((folder / "2" / "meta.json").read_text())
    del content["sha256"]
    return folder, step, content


def loaded(two: Two, text: str | bytes) -> dict[str, Any] | str:
    """What loading gives for a ``text`` of the second meta.json: the extra, or the error, after which "1" is found."""
    folder, step, _ = two
    file = folder / "2" / "meta.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said: list[str] = []
    try:
        extra = ca.load_checkpoint(folder / "2", step, settings={"data": "x"}, warn=said.append)
    except InputError as error:  # every other error fails the test
        assert str(folder / "2") in str(error)
        if "was saved by another run" not in str(error):
            assert ca.latest_checkpoint(folder, warn=said.append) == folder / "1"
            assert str(folder / "2") in said[0] and said[0].endswith("trying the checkpoint before it")
        return str(error)
    assert ca.latest_checkpoint(folder, warn=said.append) == folder / "2"
    return extra


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_texts_that_are_no_meta(two: Two) -> None:
    good = meta.sealed(two[2])
    assert loaded(two, good) == {"name": "2"}
    for text in (
        b"",
        b"\xff\xfe" + good.encode("utf-16-le"),
        good.encode().replace(b'"x"', b'"\xe9"'),  # Latin-1
        "\ufeff" + good,
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 100_000 + "]" * 100_000,
        "null",
        "[1]",
        '"x"',
        "1",
        "NaN",
        "9" * 100_000,
        good[:-1],
        good + " ",
        good + good,
        good.replace("2", "3", 1),
    ):
        assert "meta.json is damaged: " in loaded(two, text)


def test_a_key_twice(two: Two) -> None:
    body = json.dumps(two[2], indent=1).removesuffix("\n}")
    for name, twice in (("format", ',\n "format": 1'), ("b", ',\n "more": [{"b": 1, "b": 2}]')):
        assert f"meta.json is damaged: the key '{name}' occurs twice" in loaded(two, meta._seal(body + twice))


def test_an_enormous_file(two: Two) -> None:
    folder, step, content = two
    file = folder / "2" / "meta.json"
    file.unlink()
    with open(file, "wb") as stream:
        stream.truncate(1 << 40)  # a hole, as a file system leaves after a power failure
    with pytest.raises(InputError, match=r"meta\.json is damaged: it has more than 67108864 bytes"):
        ca.load_checkpoint(folder / "2", step)
    file.unlink()
    loaded(two, meta.sealed(content))


WRONG: dict[str, list[Any]] = {
    "format": [0, -1, True, 1.0, "1", None, [1], 1e999, 2],
    "packages": [None, [], "x", {"mlx": 1}, {"mlx": None}, {"mlx": ["0.1"]}],
    "updates": [-1, 1.5, True, "1", None, math.nan],
    "accumulated": [-1, 1.5, True, "1", None, 1, 2**40],
    "random": [None, [], [1], [1, 2, 3], [2**32, 1], [2**40, 1], [-1, 1], [1.0, 1], [True, 1], ["1", 1], {"0": 1}],
    "settings": [None, [], "x", 1],
    "extra": [None, [], "x", 1],
    "files": [None, [], "x", {}, {"../x": {}}, {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_field_that_is_something_else(name: str, two: Two) -> None:
    content = two[2]
    for value in WRONG[name]:
        error = loaded(two, meta.sealed(content | {name: value}))
        assert isinstance(error, str) and re.search(r"meta\.json", error), value
    assert f"{name} is None, and must be" in loaded(two, meta.sealed({k: v for k, v in content.items() if k != name}))
    for value in ({"bytes": -1}, {"bytes": 1e9}, {"bytes": True}, {"bytes": 2**70}, {"bytes": "1"}, {"sha256": "x"}):
        files = {file: its | value for file, its in content["files"].items()}
        error = loaded(two, meta.sealed(content | {"files": files}))
        assert "the size or SHA-256 of" in error or "bytes instead of" in error
    for value in (None, 1, [], "x", {}, {"bytes": 1}):
        files = dict.fromkeys(content["files"], value)
        assert "the size or SHA-256 of " in loaded(two, meta.sealed(content | {"files": files}))


def test_settings_of_any_kind_are_a_difference(two: Two) -> None:
    content = two[2]
    for value in (nested(90), {"a": nested(50)}, math.nan, 10**4000, "\ud800", "a\nb\x1b[2J", "x" * 10**6):
        error = loaded(two, meta.sealed(content | {"settings": content["settings"] | {"betas": value}}))
        assert "was saved by another run" in error and "betas" in error
        error.encode()  # every terminal can show it
        assert "\x1b" not in error and not re.search("^b", error, re.M)
    for depth in (110, 500):
        for where in ("settings", "extra"):
            error = loaded(two, meta.sealed(content | {where: {"betas": nested(depth)}}))
            assert "meta.json is not one that compiled_adam wrote: it nests more than 100" in error


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 10**300])
    | st.floats()
    | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where in a tree of JSON something can be put in place of what is there."""
    if not isinstance(value, (dict, list)):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [*([path] if path else []), *(found for key, child in items for found in places(child, (*path, key)))]


@given(data=st.data(), value=JSON)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_anything_in_the_place_of_anything(two: Two, data: st.DataObject, value: Any) -> None:
    content = json.loads(json.dumps(two[2]))
    *above, last = data.draw(st.sampled_from(places(content)))
    parent = content
    for key in above:
        parent = parent[key]
    parent[last] = value
    found = loaded(two, meta.sealed(content))
    if not isinstance(found, str):
        # Only what says nothing about the run may be anything.
        free = (above or [last])[0]
        assert free in ("extra", "updates", "random", "packages") or repr(content) == repr(two[2]), (above, last)
        assert repr(found) == repr(content["extra"])


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes(two: Two, content: bytes) -> None:
    assert "meta.json is damaged: " in loaded(two, content)


# Files of arrays whose SHA-256 fits.

HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a shape beyond the data": lambda header: {**header, "shape": [1 << 20, 1 << 20]},
    "a shape beyond 32 bits": lambda header: {**header, "shape": [1 << 40]},
    "a shape whose product is 0 in 64 bits": lambda header: {"dtype": "F32", "shape": [1 << 16] * 4},
    "a negative shape": lambda header: {**header, "shape": [-1, 4]},
    "no shape": lambda header: {"dtype": "F32"},
    "a shape that is a text": lambda header: {**header, "shape": "4"},
    "offsets beyond the file": lambda header: {**header, "data_offsets": [1 << 40, (1 << 40) + 128]},
    "offsets backwards": lambda header: {**header, "data_offsets": [128, 0]},
    "another dtype": lambda header: {**header, "dtype": "F7"},
    "no mapping": lambda header: 5,
}


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("what", [*HEADERS, "a header beyond the file", "no JSON", "nothing"])
def test_arrays_that_are_not_what_their_header_says(what: str, file: str, two: Two) -> None:
    folder, step, content = two
    path = folder / "2" / file
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])
    name = "layers.0.weight" if file.startswith("weights") else "layers.0.weight.m"
    text = good[8 : 8 + size]
    if what in HEADERS:
        text = json.dumps(header | {name: HEADERS[what](header[name])}).encode()
    text = {"no JSON": b"[" * 10_000}.get(what, text)
    length = struct.pack("<Q", 1 << 62 if what == "a header beyond the file" else len(text))
    try:
        path.write_bytes(b"" if what == "nothing" else length + text + good[8 + size :])
        text = meta.sealed(content | {"files": content["files"] | {file: dict(record(path))}})
        (folder / "2" / "meta.json").write_text(text)
        with pytest.raises(InputError, match=rf"2/{file} cannot be read|2 was saved by another run"):
            ca.load_checkpoint(folder / "2", step, settings={"data": "x"})
    finally:
        path.write_bytes(good)
    assert loaded(two, meta.sealed(content)) == {"name": "2"}


# What is saved.


def test_extra_comes_back_as_json_has_it(two: Two, tmp_path: Path) -> None:
    extra = {"inf": math.inf, "nan": math.nan, "text": "\ud800\n\u00e9", "deep": nested(90), 1: (2, None), None: True}
    ca.save_checkpoint(tmp_path / "1", two[1], extra)
    found = ca.load_checkpoint(tmp_path / "1", two[1])
    assert math.isnan(found.pop("nan"))
    want = {"inf": math.inf, "text": "\ud800\n\u00e9", "deep": nested(90), "1": [2, None], "null": True}
    assert found == want


@pytest.mark.parametrize("where", ["extra", "settings"])
def test_what_could_not_come_back_is_not_saved(where: str, two: Two, tmp_path: Path, monkeypatch) -> None:
    circle: dict[str, Any] = {}
    circle["a"] = circle
    for value, kind, message in (
        ({1: "a", "1": "b"}, ValueError, f"{where} is stored as JSON, which it cannot be: the key '1' occurs twice"),
        (circle, ValueError, f"{where} is stored as JSON, which it cannot be"),
        ({"a": nested(200)}, ValueError, f"{where} has more than 100 lists or mappings in each other"),
        ({"a": nested(100_000)}, ValueError, f"{where} is stored as JSON, which it cannot be"),
        ({"a": {1, 2}}, TypeError, f"{where} is stored as JSON, but .*set"),
        ({(1, 2): 3}, TypeError, f"{where} is stored as JSON, but .*keys must be str"),
        ({"a": mx.zeros(1)}, TypeError, f"{where} is stored as JSON, but .*array"),
        ([1, 2], TypeError, f"{where} is list; pass a dict"),
    ):
        with pytest.raises(kind, match=message):
            ca.save_checkpoint(tmp_path / "1", two[1], **{where: value})
    monkeypatch.setattr(meta, "LARGEST", 10_000)
    with pytest.raises(
        ValueError, match=r"extra and settings are .* bytes as JSON, more than 10000; store what is large"
    ):
        ca.save_checkpoint(tmp_path / "1", two[1], **{where: {"a": "x" * 10_000}})
    assert not list(tmp_path.iterdir())


def test_a_setting_with_the_name_of_an_option(two: Two, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="settings has 'betas', which is the name of an option of the step"):
        ca.save_checkpoint(tmp_path / "1", two[1], settings={"betas": 1, "data": 2})
