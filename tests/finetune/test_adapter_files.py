"""What of a model is trained, and files of weights that fit it, or do not."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from compiled_adam.base.errors import InputError
from compiled_adam.finetune import adapters, trainable
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.models.switch_layers import SwitchLinear
from trees import assert_identical, copied

LORA = {"rank": 4, "scale": 10.0, "dropout": 0.0}


@pytest.fixture
def model(tiny_model: Path) -> nn.Module:
    """Four layers, frozen."""
    made = load(str(tiny_model))[0]
    made.freeze()
    return made


def trained(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def quantized(model: nn.Module) -> nn.Module:
    nn.quantize(model, group_size=32, bits=4)
    return model


# What is trained.


def test_adapters_for_keys(model: nn.Module) -> None:
    keys = ["self_attn.q_proj", "model.layers.0.mlp.up_proj"]  # in the layers that are trained, and of the whole model
    trainable.add_adapters(model, 2, {**LORA, "keys": keys}, dora=False)
    paths = {path.rsplit(".", 1)[0] for path in trained(model)}
    assert paths == {f"model.layers.{place}" for place in ("2.self_attn.q_proj", "3.self_attn.q_proj", "0.mlp.up_proj")}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["q_proj"], "'q_proj' of keys fits no layer; possible are self_attn.q_proj, mlp.down_proj, .*embed_tokens"),
        (["self_attn.q_proj", "self_attn.v_prj"], "'self_attn.v_prj' of keys fits no layer; possible are"),
        (["self_attn"], "'self_attn' is a Attention, which has no LoRA adapters; possible are"),
        (["input_layernorm"], "'input_layernorm' is a RMSNorm, which has no LoRA adapters; possible are"),
        ([""], "'' is a TransformerBlock, which has no LoRA adapters"),
    ],
)
def test_keys_that_fit_nothing(model: nn.Module, keys: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainable.add_adapters(model, 2, {**LORA, "keys": keys}, dora=False)
    assert not trained(model)


def test_layers_without_dora(model: nn.Module) -> None:
    model.layers[3].mlp.up_proj = SwitchLinear(64, 64, 2)
    with pytest.raises(InputError, match=r"'mlp.up_proj' is a SwitchLinear, which has no DoRA adapters$"):
        trainable.add_adapters(model, 1, LORA, dora=True)
    trainable.add_adapters(model, 1, LORA, dora=False)
    assert "model.layers.3.mlp.up_proj.lora_a" in trained(model)


def test_layers_without_adapters_or_with_their_own() -> None:
    model, layer = nn.Module(), nn.Module()
    layer.norm = nn.RMSNorm(4)
    model.layers = [layer]
    with pytest.raises(InputError, match="the model has no layer that adapters can be added to"):
        trainable.add_adapters(model, 1, LORA, dora=False)
    layer.norm.to_lora = lambda **_: nn.Linear(4, 4)
    trainable.add_adapters(model, 1, LORA, dora=False)
    assert isinstance(layer.norm, nn.Linear)


def test_full_fine_tuning_of_a_quantized_model(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"the model is quantized \(4 bits\).*--fine-tune-type\) lora or dora"):
        trainable.unfreeze_last(quantized(model), 1)
    assert not trained(model)


def test_all_layers_and_too_many(model: nn.Module) -> None:
    with pytest.raises(
        InputError, match=r"num_layers \(--num-layers\) is 5, but the model has 4 layers; give --num-layers 4, or"
    ):
        trainable.check_layers(model, 5)
    with pytest.raises(InputError, match="is 16 by default, but the model has 4 layers"):
        trainable.check_layers(model, 16, given=False)
    trainable.check_layers(model, 4)
    trainable.unfreeze_last(model, -1)
    assert {path.split(".")[2] for path in trained(model)} == {"0", "1", "2", "3"}


# Files.


def with_adapters(model: nn.Module, layers: int = 2, **changes) -> nn.Module:
    trainable.add_adapters(model, layers, {**LORA, **changes}, dora=False)
    return model


def ones(model: nn.Module, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    return {path: mx.ones(array.shape, dtype) for path, array in trained(model).items()}


def begin(model: nn.Module, file: Path) -> str:
    return adapters.load_weights(model, file, wanted=trained(model))


def test_a_file_that_fits(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    arrays = ones(with_adapters(model))
    mx.save_safetensors(str(file), arrays)
    assert begin(model, file) == f"{file}: used all 28 arrays"
    assert_identical(trained(model), arrays)
    mx.save_safetensors(str(file), ones(model, mx.float16))  # taken in its own dtype, as mlx-lm does
    begin(model, file)
    assert {array.dtype for array in trained(model).values()} == {mx.float16}
    mx.savez(str(tmp_path / "a.npz"), **arrays)
    assert begin(model, tmp_path / "a.npz").endswith("used all 28 arrays")


def test_fewer_or_more_layers_than_the_file_has(model: nn.Module, tiny_model: Path, tmp_path: Path) -> None:
    file, two = tmp_path / "a.safetensors", ones(with_adapters(model, 2))
    mx.save_safetensors(str(file), two)
    one = with_adapters(load(str(tiny_model))[0].freeze(), 1)
    said = begin(one, file)
    assert "used 14 of 28 arrays; not in the model: model.layers.2.mlp.down_proj.lora_a" in said
    assert_identical(trained(one), {path: array for path, array in two.items() if ".3." in path})
    four = with_adapters(load(str(tiny_model))[0].freeze(), 4)
    said = begin(four, file)
    assert "used all 28 arrays; not in the file: model.layers.0.mlp.down_proj.lora_a" in said and "(28 of 56)" in said


def refused(model: nn.Module, file: Path, message: str) -> None:
    before = copied(model.parameters())
    with pytest.raises(InputError, match=message):
        begin(model, file)
    assert_identical(model.parameters(), before)


def test_files_that_do_not_fit(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    arrays = ones(with_adapters(model))
    first = min(arrays)

    def save(other: dict) -> None:
        mx.save_safetensors(str(file), other)

    save({f"base_model.model.{path.replace('lora_a', 'lora_A.weight')}": array for path, array in arrays.items()})
    refused(model, file, r"nothing that is trained is in .*has base_model.*the model has model.layers.2.*PEFT")
    save({"some.other.model": mx.ones(3)})
    refused(model, file, r"it has some.other.model; the model has model.layers.2.mlp.down_proj.lora_a, .*, \.\.\.$")
    save({"model.norm.weight": mx.ones(64)})  # in the model, but nothing that is trained
    refused(model, file, "nothing that is trained is in")
    save({path: mx.ones((*array.shape[:-1], array.shape[-1] + 1)) for path, array in arrays.items()})
    refused(model, file, rf"another rank(.|\n)*array +here +file\n +{first} +float32 \(256, 4\) +float32 \(256, 5\)")
    save({**arrays, first: arrays[first].astype(mx.int32)})
    refused(model, file, rf"{first} +float32 \(256, 4\) +int32 \(256, 4\)")
    for bad in (float("nan"), float("inf")):
        save({**arrays, first: arrays[first] * bad})
        refused(model, file, rf"a.safetensors: {first} has values that are infinite or not a number")


def test_files_that_cannot_be_read(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    mx.save_safetensors(str(file), ones(with_adapters(model)))
    whole = file.read_bytes()
    refused(model, tmp_path / "none.safetensors", "none.safetensors does not exist")
    refused(model, tmp_path, r"is a folder; give the file in it, such as .*adapters.safetensors")
    for damage, message in (
        (b"", "is damaged: it is no safetensors file"),
        (b"no weights", "is damaged: it is no safetensors file"),
        (whole[:5000], "is damaged: it has 5,000 bytes, and its header describes"),
        (whole[:-1], "and its header describes"),
        (b"\xff" * 8 + whole[8:], "is damaged: it is no safetensors file"),
        (whole[:8] + b"[" + whole[9:], "is damaged: its header is not that of a safetensors file"),
    ):
        file.write_bytes(damage)
        refused(model, file, message)
    mx.save_safetensors(str(file), {})
    refused(model, file, "has no arrays")
    (tmp_path / "a.bin").write_bytes(whole)
    refused(model, tmp_path / "a.bin", "is not a .safetensors file")
    (tmp_path / "a.npz").write_bytes(b"no weights")
    refused(model, tmp_path / "a.npz", "a.npz cannot be read")


# Folders, as --test reads them.

CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": LORA}


def folder(path: Path, model: nn.Module, config: object = CONFIG, **more: mx.array) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    mx.save_safetensors(str(path / "adapters.safetensors"), {**ones(model), **more})
    return path


def test_a_folder_of_adapters(model: nn.Module, tiny_model: Path, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        return load(str(tiny_model))[0].freeze()

    path = folder(tmp_path / "a", with_adapters(model))
    loaded = fresh()
    assert adapters.load_adapters(loaded, path).endswith("used all 28 arrays")
    assert_identical(trained(loaded), ones(model))
    folder(path, model, {**CONFIG, "num_layers": 4, "lora_parameters": {**LORA, "alpha": 16}})  # as older versions had
    assert "(28 of 56)" in adapters.load_adapters(fresh(), path)
    folder(path, model, {**CONFIG, "num_layers": 1})
    with pytest.raises(
        InputError, match=r"has 14 arrays that the model does not have: model.layers.2.mlp.down_proj.lora_a"
    ):
        adapters.load_adapters(fresh(), path)
    folder(path, model, {**CONFIG, "lora_parameters": {**LORA, "rank": 8}})
    with pytest.raises(InputError, match=r"does not fit the model; was it made with another rank"):
        adapters.load_adapters(fresh(), path)
    full = fresh()
    trainable.unfreeze_last(full, 1)
    folder(path, full, {"fine_tune_type": "full", "num_layers": 1, "lora_parameters": None})
    loaded = fresh()
    assert adapters.load_adapters(loaded, path).endswith("used all 9 arrays")
    assert mx.all(loaded.layers[3].mlp.up_proj.weight == 1).item()
    with pytest.raises(InputError, match=r"does not fit the model(.|\n)*uint32"):
        adapters.load_adapters(quantized(fresh()), path)
    mx.save_safetensors(str(path / "adapters.safetensors"), {"other": mx.ones(3)})
    with pytest.raises(InputError, match=r"nothing that is trained is in .*: it has other; the model has model.embed"):
        adapters.load_adapters(fresh(), path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json is damaged"),
        ("[]", "adapter_config.json is damaged: it is not a mapping"),
        ({**CONFIG, "fine_tune_type": "lorra"}, "fine_tune_type is 'lorra'; it must be one of"),
        ({**CONFIG, "fine_tune_type": ["lora"]}, "fine_tune_type is"),
        ({**CONFIG, "num_layers": "2"}, "num_layers is '2'; it must be a whole number"),
        ({"lora_layers": 2, "lora_parameters": LORA}, "num_layers is None"),
        ({**CONFIG, "lora_parameters": None}, "lora_parameters is None; it must be a mapping"),
        ({**CONFIG, "lora_parameters": {"rank": 4}}, "adapter_config.json: lora_parameters has no scale"),
        ({**CONFIG, "lora_parameters": {**LORA, "rank": -1}}, "rank is -1"),
        ({**CONFIG, "lora_parameters": {**LORA, "keys": ["q_proj"]}}, "'q_proj' of keys fits no layer"),
        ({"peft_type": "LORA", "r": 8}, "is of Hugging Face's PEFT"),
    ],
    ids=repr,
)
def test_a_configuration_that_cannot_be(config: object, message: str, model: nn.Module, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", nn.Linear(1, 1), config)
    with pytest.raises(InputError, match=message):
        adapters.load_adapters(model, path)


def test_a_folder_that_lacks_something(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'.*none', which is not a folder; give the folder of a run"):
        adapters.check_folder(tmp_path / "none")
    with pytest.raises(InputError, match=r"adapter_config.json does not exist"):
        adapters.check_folder(tmp_path)
    path = folder(tmp_path / "a", with_adapters(model))
    (path / "adapters.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapters.safetensors does not exist"):
        adapters.check_folder(path)


def test_adapters_of_another_scale(model: nn.Module, tmp_path: Path) -> None:
    file = folder(tmp_path / "a", with_adapters(model)) / "adapters.safetensors"
    assert adapters.other_scale(file, LORA) is None
    said = adapters.other_scale(file, {**LORA, "scale": 20.0})
    assert said == f"{file} was trained with scale 10, and this run has scale 20 (lora_parameters)"
    assert adapters.other_scale(tmp_path / "b.safetensors", LORA) is None  # without a configuration
