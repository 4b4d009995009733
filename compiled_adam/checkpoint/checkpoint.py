"""Checkpoints: folders from which a run continues exactly. They are written atomically: complete or not at all.

``weights.safetensors`` and ``optimizer.safetensors`` are plain MLX files with the paths of ``tree_flatten``. A folder
also has ``window.safetensors`` if the window (the sums of accumulated micro-batches) was partly filled. ``meta.json``
has everything else and the SHA-256 of every file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..base import InputError, Row, blas, differences, packages, table
from ..distributed import workers
from ..optimizers import any_optimizer
from ..step import TrainStep
from .durable import flush, opened, record, recorded, replacing, save_arrays
from .meta import FILES, FORMAT, LARGEST, META, as_json, parsed, sealed

COLUMNS = ("what", "here", "checkpoint")  # of the table in `OtherRun`
# Options that decide which arrays the optimizer's state has. If one changes, the state must be converted.
_OF_THE_STATE = {"optimizer", "moments", "compensated", "max_grad_norm", "skip_nonfinite"}


def warn_caller(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# Writing.


def save_checkpoint(
    folder: str | Path,
    step: TrainStep,
    extra: Mapping[str, Any] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes everything that an exact continuation of ``step`` needs to ``folder``, atomically: all or nothing.

    If the step has a ``group``, all workers must call this function. The first worker writes. If it raises an error,
    all workers raise this error.

    Args:
        folder: the folder to write. An older checkpoint there is replaced. A folder with other content is refused.
        step: a step from `make_step`. The checkpoint has the trainable parameters, the other arrays that the forward
            pass assigns, the optimizer's state, the gradients of a partly filled window, and MLX's random state.
        extra: data of the caller that a continuation needs (data position, best loss, ...). It is stored as JSON: keys
            become text, and tuples become lists. Numbers may be infinite or NaN. Default None.
        settings: options of the caller that results depend on, by name. `load_checkpoint` compares them. Default None.

    Several processes or threads may save to the same folder. Each checkpoint is complete, and the last one stays.

    Raises:
        OSError: writing failed (disk full, no permission). An older checkpoint is still there then.
        ValueError: the folder has other content than a checkpoint; a weight is infinite or NaN; ``extra`` or
            ``settings`` contain themselves, are nested too deep or too large, or have two keys that become the same
            text; a setting has the same name as an option of the step.
        TypeError: ``extra`` or ``settings`` cannot be stored as JSON.
    """
    state = step.state_dict(everywhere=False)  # all workers must take part in this call
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
    """Writes the checkpoint of `save_checkpoint` from the ``state_dict`` of ``step``, by this process alone."""
    folder = Path(folder)
    if _is_something_else(folder):
        raise InputError(f"{folder} exists and is not a checkpoint; name another folder")
    mx.eval(state)
    meta = {
        "format": FORMAT,
        "packages": _packages(),
        "updates": int(any_optimizer.states(step.optimizer)[0]["step"].item()),
        "accumulated": state["window"]["batches"].item() if state["window"] else 0,
        "random": state["random"]["key"].tolist(),
        "settings": _settings(settings, step),
        "extra": as_json("extra", extra or {}),
    }
    records = {}
    # In this order: after an error `replacing` removes the files first, so the hashing threads of the pool see their
    # file removed and stop.
    with ThreadPoolExecutor() as pool, replacing(folder) as temporary:
        # The largest part first: its SHA-256 is computed while the other parts are written.
        for part in ("optimizer", "window", "model"):
            if state[part]:
                file = temporary / FILES[part]
                with recorded(file, pool) as records[file.name]:
                    save_arrays(file, state[part])
        check_finite(state["model"])
        meta["files"] = {name: future.result() for name, future in records.items()}
        (temporary / META).write_text(sealed(meta), encoding="utf-8")
        flush(temporary / META)


def _settings(settings: Mapping[str, Any] | None, step: TrainStep) -> dict[str, Any]:
    """The caller's settings and the step's options, as JSON will give them back."""
    theirs, own = as_json("settings", settings or {}), step.description()
    if both := theirs.keys() & own.keys():
        raise InputError(
            f"settings has {min(both)!r}, which is the name of an option of the step; give it another name"
        )
    return theirs | as_json("the description of the step", own)


def _is_something_else(folder: Path) -> bool:
    """Whether ``folder`` must not be replaced: it is a file, or a folder that has other content than a checkpoint."""
    with suppress(FileNotFoundError, NotADirectoryError), opened(folder, [META]) as (found, files):
        return META not in files and any(found.iterdir())
    return folder.exists()


def check_finite(arrays: Mapping[str, mx.array]) -> None:
    """Raises ValueError if an array has an infinite value or a NaN. The message names the array."""
    floats = {path: a for path, a in arrays.items() if a.size and mx.issubdtype(a.dtype, mx.floating)}
    # A reduction makes one pass; isfinite(a) would first write one boolean per element.
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
    warn: Callable[[str], None] = warn_caller,
) -> dict[str, Any]:
    """Continues ``step`` from a checkpoint. Returns the ``extra`` that `save_checkpoint` was given.

    Another process may replace the folder at the same time. Then the old or the new checkpoint is read, never a
    mixture. If the step has a ``group``, all workers must call this function, and all read the folder. If one worker
    cannot read it, no worker continues.

    Args:
        folder: the folder of the checkpoint.
        step: a fresh step of the same model, loss and optimizer.
        settings: the options that were given to `save_checkpoint`, with their present values. Default None.
        allow: names of settings or options that may differ from the checkpoint. The value of ``step`` is used then.
            The learning rate is an option, too: to change it, allow "learning_rate". Default: none.
        warn: a function that gets a sentence about other package versions or another device. Default ``warnings.warn``.

    Raises:
        ValueError: the checkpoint is damaged, or does not fit. The message has a table of the differences. Nothing is
            changed then.
    """
    read = partial(read_checkpoint, folder, step, settings=settings, allow=allow, warn=warn)
    contents = read() if step.group is None else workers.all_do(step.group, read)
    contents.into(step)
    return contents.extra


class OtherRun(InputError):
    """A checkpoint has other settings than this run, or arrays of other names, shapes or dtypes.

    Attributes:
        folder: the checkpoint.
        settings: a row for each setting that differs and is not allowed to: its name, the value here, and there.
        arrays: the same for arrays, as they are after a change of these settings was allowed.
        there: the checkpoint's values of all settings.
    """

    def __init__(
        self, folder: str | Path, settings: Sequence[Row], arrays: Sequence[Row], there: Mapping[str, Any]
    ) -> None:
        self.folder, self.settings, self.arrays, self.there = folder, settings, arrays, there
        super().__init__(
            f"{folder} was saved by another run:\n{table(COLUMNS, [*settings, *arrays])}\n"
            "use the same values, or allow the change of a setting by name (allow=..., --allow-change)"
        )


class Contents(NamedTuple):
    """A checkpoint that was read and that fits the step."""

    state: dict[str, dict[str, mx.array]]
    extra: dict[str, Any]
    convert: bool  # whether the optimizer's state was saved with other options
    own_rate: bool  # whether the step keeps the present learning rate

    def into(self, step: TrainStep) -> None:
        """Continues ``step`` from the checkpoint."""
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
    warn: Callable[[str], None] = warn_caller,
) -> Contents:
    """Reads and checks a checkpoint for `load_checkpoint`, without a change of ``step``."""
    with _opened(Path(folder)) as (found, files):
        meta = _checked(found, files)
        state = {
            part: _load(found / name, files[name]) if name in meta["files"] else {} for part, name in FILES.items()
        }
        state["random"] = {"key": mx.array(meta["random"], mx.uint32)}
        here = _settings(settings, step)
        if unknown := set(allow) - here.keys() - meta["settings"].keys():
            raise InputError(f"there is no setting {min(unknown)!r} to allow; there are {', '.join(sorted(here))}")
        rows = differences(here, meta["settings"])
        changed = {name for name, *_ in rows}
        convert = bool({name.split(".")[-1] for name in changed} & _OF_THE_STATE)
        rows = [row for row in rows if row[0] not in allow]
        if rows + (arrays := step.mismatches(state, convert=convert)):
            raise OtherRun(folder, rows, arrays, meta["settings"])
        mx.eval(state)  # before the files are closed
    if state["window"] and "weighted" in changed:
        raise InputError(
            f"{folder} is in the middle of a window, whose {meta['accumulated']} micro-batches are weighted in another"
            " way; go on without the change of 'weighted' (--like-mlx-lm) up to the end of a window"
        )
    check_finite(state["model"])
    if others := _other_packages(meta["packages"]):
        warn(f"{folder} was written with {others}: results may differ in the last bits")
    own_rate = any(name.endswith("learning_rate") for name in changed)
    return Contents(state, meta["extra"], convert, own_rate)


def check_checkpoint(folder: Path) -> None:
    """Compares every file with ``meta.json``. ValueError names the damage."""
    with _opened(folder) as (found, files):
        _checked(found, files)


def check_exists(folder: Path) -> None:
    """Raises ValueError like `check_checkpoint` if there is no checkpoint at all. It reads no file."""
    with _opened(folder):
        pass


def is_whole(folder: Path) -> bool:
    """Whether `check_checkpoint` finds no damage."""
    try:
        check_checkpoint(folder)
    except (InputError, OSError):
        return False
    return True


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Path, dict[str, FileIO]]]:
    """`durable.opened` for the files of a checkpoint."""
    with ExitStack() as stack:
        try:
            place, files = stack.enter_context(opened(folder, [META, *FILES.values()]))
        except FileNotFoundError:
            raise InputError(f"{folder} is not a checkpoint: there is no such folder") from None
        except NotADirectoryError:
            raise InputError(f"{folder} is not a checkpoint: it has no {META}") from None
        if META not in files:
            raise InputError(f"{place} is not a checkpoint: it has no {META}")
        yield place, files


def _checked(folder: Path, files: Mapping[str, FileIO]) -> dict[str, Any]:
    """`check_checkpoint` for open ``files`` that were found in ``folder``. Returns the content of ``meta.json``."""
    path = folder / META
    try:
        meta = parsed(path, files[META].read(LARGEST + 1))
        for name, expected in meta["files"].items():
            path = folder / name
            if name not in files:
                raise InputError(f"{path} is missing")
            if (size := files[name].seek(0, SEEK_END)) != expected["bytes"]:
                raise InputError(f"{path} is damaged: it has {size} bytes instead of {expected['bytes']}")
            if record(files[name]) != expected:
                raise InputError(f"{path} is damaged: its SHA-256 is not the one in {META}")
    except OSError as error:  # which does not name the file
        raise type(error)(error.errno, error.strerror, str(path)) from None
    return meta


def _load(file: Path, stream: FileIO) -> dict[str, mx.array]:
    """The arrays of an open file. The file must stay open until they are evaluated."""
    stream.seek(0)
    try:
        arrays = mx.load(stream, format="safetensors")
    except RuntimeError as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    assert isinstance(arrays, dict)
    return arrays


def _packages() -> dict[str, str]:
    return packages() | {"device": str(mx.default_device()), "BLAS": blas.used()}


def _other_packages(there: Mapping[str, str]) -> str:
    here = _packages()
    rows = differences(here, {"BLAS": here["BLAS"], **there})  # a checkpoint of version 0.1 does not tell its BLAS
    return ", ".join(f"{name} {other} (this run has {own})" for name, own, other in rows)
