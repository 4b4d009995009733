"""Checkpoints: folders from which a run continues exactly, and which are never there by half.

``weights.safetensors`` and ``optimizer.safetensors`` are plain MLX files with the paths of ``tree_flatten``, beside
them ``window.safetensors`` if micro-batches were accumulated. ``meta.json`` has the rest and the SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from . import any_optimizer, workers
from .compare import differences, table
from .durable import flush, present, record, recorded, replacing, save_arrays
from .errors import InputError
from .fingerprint import packages
from .step import TrainStep

FORMAT = 1
META = "meta.json"
_SEAL = ',\n "sha256": "'
FILES = {"model": "weights.safetensors", "optimizer": "optimizer.safetensors", "window": "window.safetensors"}
# Options that decide what the optimizer's state consists of: to change one is to convert the state.
_OF_THE_STATE = {"optimizer", "moments", "compensated", "max_grad_norm", "skip_nonfinite"}


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# Writing.


def save_checkpoint(
    folder: str | Path,
    step: TrainStep,
    extra: Mapping[str, Any] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes everything that an exact continuation of ``step`` needs to ``folder``, which appears whole or not at all.

    If the step has a ``group``, all workers call this, and the first one writes; what it raises, all raise.

    Args:
        folder: the checkpoint; an older one of this name is replaced, other folders are refused.
        step: what `make_step` made. Its model's trainable parameters and whatever else the forward pass assigns, its
            optimizer's state, a partly filled window and MLX's random state are stored.
        extra: what the caller needs to continue (data position, best loss, ...), as JSON can hold it. Default None.
        settings: options of the caller that results depend on, by name; `load_checkpoint` compares them. Default None.

    Raises:
        OSError: it could not be written (disk full, no permission); an older checkpoint is still there then.
        ValueError: the folder has something else, or weights are infinite or not a number.
        TypeError: ``extra`` or ``settings`` cannot be stored as JSON.
    """
    state = step.state_dict(everywhere=False)  # something that all workers take part in
    write = partial(write_checkpoint, folder, step, state, extra, settings=settings)
    if step.group is None:
        write()
    else:
        workers.first_does(step.group, write)


def write_checkpoint(
    folder: str | Path,
    step: TrainStep,
    state: Mapping[str, dict[str, mx.array]],
    extra: Mapping[str, Any] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """`save_checkpoint` of the ``state_dict`` of ``step``, by this process alone."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / META).exists() or not any(folder.iterdir()))):
        raise InputError(f"{folder} exists and is not a checkpoint; name another folder")
    mx.eval(state)
    meta = {
        "format": FORMAT,
        "packages": _packages(),
        "updates": _updates(step),
        "accumulated": state["window"]["batches"].item() if state["window"] else 0,
        "random": state["random"]["key"].tolist(),
        "settings": dict(settings or {}) | step.description(),
        "extra": dict(extra or {}),
    }
    try:
        meta = json.loads(json.dumps(meta))  # what will be read: of text keys, lists instead of tuples
    except TypeError as error:
        raise TypeError(f"extra and settings are stored as JSON, but {error}; use numbers, strings, lists") from None
    records = {}
    with replacing(folder) as temporary, ThreadPoolExecutor() as pool:
        # The largest first: its record is still being made while the others are written.
        for part in ("optimizer", "window", "model"):
            if state[part]:
                file = temporary / FILES[part]
                with recorded(file, pool) as records[file.name]:
                    save_arrays(file, state[part])
        check_finite(state["model"])
        meta["files"] = {name: future.result() for name, future in records.items()}
        (temporary / META).write_text(_sealed(meta), encoding="utf-8")
        flush(temporary / META)


def check_finite(arrays: Mapping[str, mx.array]) -> None:
    """Raises ValueError, naming it, for an array that has an infinite value or one that is not a number."""
    floats = {path: a for path, a in arrays.items() if a.size and mx.issubdtype(a.dtype, mx.floating)}
    # A reduction passes over the array at once; isfinite(a) would write as many booleans first.
    finite = {path: mx.isfinite(a.max()) & mx.isfinite(a.min()) for path, a in floats.items()}
    mx.eval(finite)
    if bad := [path for path, is_finite in finite.items() if not is_finite.item()]:
        raise InputError(f"{bad[0]} has values that are infinite or not a number ({len(bad)} of {len(finite)} arrays)")


# Reading.


def load_checkpoint(
    folder: str | Path,
    step: TrainStep,
    *,
    settings: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
    warn: Callable[[str], None] = _warn,
) -> dict[str, Any]:
    """Continues ``step`` from a checkpoint; returns the ``extra`` it was saved with.

    If the step has a ``group``, all workers call this, and all read; if one cannot, none continues.

    Args:
        folder: the checkpoint.
        step: a fresh step of the same model, loss and optimizer.
        settings: as for `save_checkpoint`.
        allow: names of settings that may differ; what ``step`` has now is used then. Also the learning rate's:
            without it, a checkpoint's and a step's must be the same. Default: none.
        warn: gets a sentence about other package versions, or another device. Default ``warnings.warn``.

    Raises:
        ValueError: the checkpoint is damaged, or does not fit, with a table of what differs; nothing is changed then.
    """
    read = partial(read_checkpoint, folder, step, settings=settings, allow=allow, warn=warn)
    contents = read() if step.group is None else workers.all_do(step.group, read)
    contents.into(step)
    return contents.extra


class Contents(NamedTuple):
    """A checkpoint that was read, and fits."""

    state: dict[str, dict[str, mx.array]]
    extra: dict[str, Any]
    convert: bool  # whether the optimizer's state is of other options
    own_rate: bool  # whether the learning rate stays that of the step

    def into(self, step: TrainStep) -> None:
        """Continues ``step`` from it."""
        optimizers = any_optimizer.parts(step.optimizer)
        rates = [optimizer.state.get("learning_rate") for optimizer in optimizers]
        step.load_state_dict(self.state, convert=self.convert)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            if rate is not None and self.own_rate:
                optimizer.state["learning_rate"] = rate


def read_checkpoint(
    folder: str | Path,
    step: TrainStep,
    *,
    settings: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
    warn: Callable[[str], None] = _warn,
) -> Contents:
    """What `load_checkpoint` continues ``step`` from; it is not changed."""
    folder = Path(folder)
    meta = check_checkpoint(folder)
    folder = present(folder)
    state = {part: _load(folder / name) if name in meta["files"] else {} for part, name in FILES.items()}
    state["random"] = {"key": mx.array(meta["random"], mx.uint32)}
    here = json.loads(json.dumps(dict(settings or {}) | step.description()))
    if unknown := set(allow) - here.keys() - meta["settings"].keys():
        raise InputError(f"there is no setting {min(unknown)!r} to allow; there are {', '.join(sorted(here))}")
    rows = differences(here, meta["settings"])
    changed = {name for name, *_ in rows} & set(allow)
    convert = bool({name.split(".")[-1] for name in changed} & _OF_THE_STATE)
    rows = [row for row in rows if row[0] not in changed] + step.mismatches(state, convert=convert)
    if rows:
        raise InputError(
            f"{folder} was saved by another run:\n{table(('what', 'here', 'checkpoint'), rows)}\n"
            "make it the same, or allow what may change by its name (allow=..., --allow-change)"
        )
    mx.eval(state)
    check_finite(state["model"])
    if others := differences(_packages(), meta["packages"]):
        names = ", ".join(f"{name} {there}" for name, _, there in others)
        warn(f"{folder} was written with {names}: results may differ in the last bits")
    own_rate = any(name.endswith("learning_rate") for name in changed)
    return Contents(state, meta["extra"], convert, own_rate)


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The content of ``meta.json``, after every file was compared with it. Raises ValueError that names the damage."""
    folder = present(folder)
    file = folder / META
    if not file.is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no {META}")
    try:
        text = file.read_text(encoding="utf-8")
        meta = json.loads(text)
        del meta["sha256"]
        files = dict(meta["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged: {error!r}") from None
    if text != _seal(text.rpartition(_SEAL)[0]):
        raise InputError(f"{file} is damaged: it is not what was written")
    if meta.get("format") != FORMAT:
        raise InputError(
            f"{folder} has format {meta.get('format')}; this version reads {FORMAT}, so update compiled_adam"
        )
    random = meta.get("random")
    if not all(isinstance(meta.get(name), dict) for name in ("settings", "packages", "extra")) or not (
        isinstance(random, list) and len(random) == 2 and all(isinstance(word, int) for word in random)
    ):
        raise InputError(f"{file} is not one that compiled_adam wrote: it has no settings, packages, extra or random")
    if unknown := files.keys() - FILES.values():
        raise InputError(f"{file} names the file {min(unknown)!r}, which no checkpoint has")
    if missing := {FILES["model"], FILES["optimizer"]} - files.keys():
        raise InputError(f"{file} does not name {min(missing)}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing")
        size = expected.get("bytes") if isinstance(expected, dict) else None
        if path.stat().st_size != size:
            raise InputError(f"{path} is damaged: it has {path.stat().st_size} bytes instead of {size}")
        if record(path) != expected:
            raise InputError(f"{path} is damaged: its SHA-256 is not the one in {META}")
    return meta


def latest_checkpoint(folder: str | Path, *, warn: Callable[[str], None] = _warn) -> Path:
    """The newest checkpoint in ``folder`` that is whole; names of checkpoints are numbers. Damaged ones are warned of.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    found = numbered(folder)
    for path in reversed(found):
        try:
            check_checkpoint(path)
            return path
        except (ValueError, OSError) as error:
            warn(f"{error}; trying the checkpoint before it")
    raise InputError(f"there is no {'whole ' if found else ''}checkpoint in {folder}")


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()), key=lambda p: int(p.name))


def prune(folder: Path, keep: int) -> list[Path]:
    """Removes all but the newest ``keep`` checkpoints, once the newest is known to be whole; returns what went."""
    for leftover in folder.glob(".[0-9]*.partial"):
        shutil.rmtree(leftover)  # of a process that was killed while it wrote
    *older, newest = numbered(folder)
    check_checkpoint(newest)
    gone = older[: max(0, len(older) + 1 - keep)]
    for path in gone:
        shutil.rmtree(path)
    return gone


def _load(file: Path) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(file))
    except RuntimeError as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    assert isinstance(arrays, dict)
    return arrays


def _sealed(meta: Mapping[str, Any]) -> str:
    """``meta`` as JSON with the SHA-256 of its own text as the last entry."""
    return _seal(json.dumps(meta, indent=1).removesuffix("\n}"))


def _seal(text: str) -> str:
    return f'{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def _packages() -> dict[str, str]:
    return packages() | {"device": str(mx.default_device())}


def _updates(step: TrainStep) -> int:
    state = any_optimizer.states(step.optimizer)[0]
    return int(state["step"].item())
