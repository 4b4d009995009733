"""A model or data set that is not where the user says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from compiled_adam.base import InputError
from compiled_adam.finetune import model_config, model_files, places
from huggingface_hub import errors


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model" / "4bit").mkdir(parents=True)
    (tmp_path / "data").mkdir()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("./my-modle", "name on Hugging Face either; did you mean my-model?"),
        ("my-modle/", "name on Hugging Face either; did you mean my-model?"),
        ("my-model/4bti/", "name on Hugging Face either; did you mean my-model/4bit?"),
        ("./my-model/float32", "name on Hugging Face either; the folder my-model is there, and has 4bit"),
        ("./nothing-like-it", "name on Hugging Face either"),
        ("my-model/4bit/none", "name on Hugging Face either; the folder my-model/4bit is there, and has no folders"),
        ("~/my-model", "write the whole path in place of ~"),
        ("/no/such/folder", "is '/no/such/folder', which does not exist and is not a name on Hugging Face either"),
    ],
)
def test_what_can_only_be_a_path(value: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        places.check("model", value)
    assert str(error.value).endswith(message)


def test_names_of_hugging_face_and_folders_are_let_through() -> None:
    for value in ("mlx-community/Qwen3-0.6B-4bit", "gpt2", "./my-model", "my-model/4bit", "data/"):
        places.check("model", value)


def refused(kind: type[Exception]) -> Exception:
    """An error of Hugging Face, whose constructors differ between its versions."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error\nRepository Not Found for url",)
    return error


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("mlx-comunity/Q", "RepositoryNotFoundError", "you may read; did you mean mlx-community/Q?"),
        ("my-model/4bti", "RepositoryNotFoundError", "you may read; did you mean my-model/4bit?"),
        ("my-model/8bit", "LocalEntryNotFoundError", "reached to download it now; did you mean my-model/4bit?"),
        ("mlx-community/Q", "OfflineModeIsEnabled", "not downloaded before; Hugging Face cannot be reached"),
        ("meta/llama", "GatedRepoError", "https://huggingface.co/meta/llama, and run `hf auth login`"),
        ("meta/llama", "HfHubHTTPError", "Hugging Face refused to give it: 404 Client Error"),
    ],
)
def test_what_hugging_face_does_not_give(model: str, kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise refused(getattr(errors, kind))

    monkeypatch.setattr(model_files.utils, "load", load)
    with pytest.raises(InputError) as error:
        model_files.load(model, False)
    said = str(error.value)
    assert said.startswith(f"model is {model!r}, which is no folder here") and message in said and "\n" not in said


def test_other_errors_of_a_download_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_files.utils, "load", load)
    with pytest.raises(OSError, match="No space left"):
        model_files.load("a/b", False)


def test_plan_and_data_name_the_nearest_folder() -> None:
    with pytest.raises(InputError, match="not in the cache of Hugging Face; did you mean my-model\\?"):
        model_config.read("my-modle")
    from compiled_adam.finetune import data

    args = SimpleNamespace(data="dta", train=True, test=False)
    with pytest.raises(InputError, match="data is 'dta', which is no folder; did you mean data\\?"):
        data.load(args, None)
