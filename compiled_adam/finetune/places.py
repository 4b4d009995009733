"""Models and data sets that are not where a user says: folders with another name, names that Hugging Face lacks."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..base import InputError, did_you_mean

OWNER = "mlx-community"  # of most models on Hugging Face that MLX can load


def check(what: str, value: str) -> None:
    """Raises InputError for a ``value`` that is no folder, and that can only be meant as one.

    ``what`` is the name of the option. Hugging Face's names have at most one ``/``, in the middle.
    """
    path = value.startswith((".", "/", "~")) or value.endswith("/") or value.count("/") > 1
    if path and not Path(value).exists():
        hint = "; write the whole path in place of ~" if value.startswith("~") else near(value)
        raise InputError(f"{what} is {value!r}, which does not exist and is not a name on Hugging Face either{hint}")


def near(value: str) -> str:
    """The end of a sentence about a missing folder, with the nearest one, or with what its parent folder has."""
    path = Path(value)
    try:
        folders = sorted(each.name for each in path.parent.iterdir() if each.is_dir())
    except OSError:
        return ""
    here = str(path.parent) == "."
    found = did_you_mean(path.name, folders, before="" if here else f"{path.parent}/")
    if not found and not here:
        has = f"has {', '.join(folders[:5])}" if folders else "has no folders"
        return f"; the folder {path.parent} is there, and {has}"
    return found


def unavailable(model: str, error: Exception) -> InputError | None:
    """The error for a ``model`` that Hugging Face did not give; None for an ``error`` of another kind."""
    owner, _, name = model.partition("/")
    hint = near(model)
    if not hint and name and owner != OWNER:
        hint = did_you_mean(owner, [OWNER], after=f"/{name}")
    if isinstance(error, HFValidationError):
        reason = f" and no name on Hugging Face: {error}{hint}"
    elif isinstance(error, GatedRepoError):
        reason = "; Hugging Face gives it to those who have accepted its terms: accept them on"
        reason += f" https://huggingface.co/{model}, and run `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        reason = f", and Hugging Face has no model of this name that you may read{hint}"
    elif isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
        reason = f", and was not downloaded before; Hugging Face cannot be reached to download it now{hint}"
    elif isinstance(error, HfHubHTTPError):
        reason = f"; Hugging Face refused to give it: {str(error).splitlines()[0]}{hint}"
    else:
        return None
    return InputError(f"model is {model!r}, which is no folder here{reason}")
