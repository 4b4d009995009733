"""Damaged, forged and unreadable files of a checkpoint are named, and change nothing."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import pytest
from compiled_adam.checkpoint import checkpoint, durable, series
from compiled_adam.checkpoint.meta import sealed

from tests.saved_steps import FILES, advance, assert_identical, everything, make


def damages(file: Path) -> list[tuple[str, bytes | None]]:
    content = file.read_bytes()
    flipped = [bytearray(content) for _ in range(3)]
    for i, array in enumerate(flipped):
        array[[len(content) // 2, len(content) - 3, 9][i]] ^= 4
    return [
        ("truncated", content[: len(content) // 2]),
        ("last byte", content[:-1] if file.suffix != ".json" else content[:-3]),
        ("emptied", b""),
        ("removed", None),
        *((f"flipped {i}", bytes(array)) for i, array in enumerate(flipped)),
    ]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_named_and_the_checkpoint_before_is_used(name: str, tmp_path: Path) -> None:
    step = make()
    for iteration in (4, 5):
        advance(step, iteration - 1, iteration)
        ca.save_checkpoint(tmp_path / f"{iteration:04d}", step, {"iteration": iteration})
    newest = tmp_path / "0005"
    assert ca.latest_checkpoint(tmp_path) == newest
    before = everything(step)
    content = (newest / name).read_bytes()
    for what, damaged in damages(newest / name):
        if damaged is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"0005.*{name}"):
            ca.load_checkpoint(newest, step)
        assert_identical(everything(step), before)
        with pytest.warns(UserWarning, match=rf"0005.*{name}.*; trying the checkpoint before it"):
            assert ca.latest_checkpoint(tmp_path) == tmp_path / "0004", what
        with pytest.raises(ValueError, match="0005"):
            series.prune(tmp_path, 1)  # the oldest is not deleted for a newest that is not whole
        assert (tmp_path / "0004").exists()
        (newest / name).write_bytes(content)
    assert series.prune(tmp_path, 1) == [tmp_path / "0004"]


def test_every_bit_of_a_small_checkpoints_meta_counts(tmp_path: Path) -> None:
    step = make()
    ca.save_checkpoint(tmp_path / "0001", step, {"iteration": 1})
    file = tmp_path / "0001" / "meta.json"
    content = bytearray(file.read_bytes())
    for at in range(0, len(content), 7):
        for bit in (1, 16):
            content[at] ^= bit
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"damaged|not name|no checkpoint|format"):
                checkpoint.check_checkpoint(tmp_path / "0001")
            content[at] ^= bit


def forge(folder: Path, **changes) -> None:
    """A meta.json that is valid in itself."""
    meta = json.loads((folder / "meta.json").read_text()) | changes
    del meta["sha256"]
    for name in meta["files"]:
        if (folder / name).exists():
            meta["files"][name] = durable.record(folder / name)
    (folder / "meta.json").write_text(sealed(meta))


def test_files_from_elsewhere(tmp_path: Path) -> None:
    step = make()
    advance(step, 0, 4)
    ca.save_checkpoint(tmp_path / "good", step)
    before = everything(step)
    good = mx.load(str(tmp_path / "good" / "weights.safetensors"))
    path = "layers.0.weight"

    def refused(message: str, weights: dict[str, mx.array] | None = None, **changes) -> None:
        folder = tmp_path / "other"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        if weights is not None:
            mx.save_safetensors(str(folder / "weights.safetensors"), weights)
        forge(folder, **changes)
        with pytest.raises(ValueError, match=message):
            ca.load_checkpoint(folder, step)
        assert_identical(everything(step), before)

    refused(rf"{path} +float32 \(8, 4\) +float32 \(8, 5\)", {**good, path: mx.zeros((8, 5))})
    refused(rf"{path} +float32 \(8, 4\) +float16 \(8, 4\)", {**good, path: good[path].astype(mx.float16)})
    refused(rf"{path} +float32 \(8, 4\) +-", {k: v for k, v in good.items() if k != path})
    refused(r"layers\.9\.weight +- +float32 \(1,\)", {**good, "layers.9.weight": mx.zeros(1)})
    refused(rf"{path} has values that are infinite or not a number", {**good, path: good[path] * float("nan")})
    refused("layers.1.running_var has values", {**good, "layers.1.running_var": mx.full((8,), float("inf"))})
    for name in ("../good/weights.safetensors", "/etc/passwd", "other.safetensors"):
        files = json.loads((tmp_path / "good" / "meta.json").read_text())["files"]
        refused(f"names the file '{name}', which no checkpoint has", files={**files, name: {"bytes": 1, "sha256": ""}})
    refused("has format 2; this version reads 1", format=2)
    refused("does not name optimizer.safetensors", files={"weights.safetensors": {}})
    for folder in (tmp_path, tmp_path / "good" / "weights.safetensors"):
        with pytest.raises(ValueError, match=r"is not a checkpoint: it has no meta\.json"):
            ca.load_checkpoint(folder, step)


def test_a_file_that_cannot_be_read_is_like_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make()
    for name in ("0001", "0002"):
        ca.save_checkpoint(tmp_path / name, step)
    real, failures = checkpoint.record, [OSError(errno.EIO, "Input/output error")]

    def failing(*arguments):
        if failures:  # the newest is read first
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "record", failing)
    with pytest.warns(UserWarning, match=r"Input/output error.*0002/.*safetensors"):
        assert ca.latest_checkpoint(tmp_path) == tmp_path / "0001"


def test_names_of_the_first_release_are_where_they_were() -> None:
    from compiled_adam.checkpoint import _sealed, check_checkpoint

    assert check_checkpoint is checkpoint.check_checkpoint and "sha256" in _sealed({})
