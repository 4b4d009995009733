"""``--dtype``: what is cast, what is saved, and who has to know about it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from compiled_adam import cli
from compiled_adam.base.errors import InputError
from compiled_adam.commands import lora, lora_options, plan
from compiled_adam.finetune import adapters, model_config, trainable
from mlx.utils import tree_flatten
from mlx_lm import fuse, load

LAST_TWO = ("--num-layers", "2", "--fine-tune-type")


def dtypes(arrays: object) -> set[mx.Dtype]:
    return {array.dtype for _, array in tree_flatten(arrays)}


def made(tiny_model: Path, *argv: str) -> nn.Module:
    """What the command would train; the model is stored in float32."""
    model = load(str(tiny_model))[0]
    lora.make_trainable(lora_options.settings(["--train", *argv]), model)
    return model


def job(tiny_model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = f"--model {tiny_model} --data {data} --adapter-path {out} --batch-size 2"
    return ["lora", *options.split(), *more]


def full(tiny_model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return job(tiny_model, data, out, "--train", *LAST_TWO, "full", "--iters", "3", "--val-batches", "1", *more)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of full fine-tuning in bfloat16. Its tests change nothing in it."""
    out = tmp_path_factory.mktemp("dtype") / "adapters"
    assert cli.main(full(tiny_model, data, out, "--dtype", "bfloat16")) == 0
    return out


def test_full_fine_tuning_is_in_the_dtype(tiny_model: Path) -> None:
    assert dtypes(made(tiny_model, *LAST_TWO, "full").parameters()) == {mx.float32}
    assert dtypes(made(tiny_model, *LAST_TWO, "full", "--dtype", "bfloat16").parameters()) == {mx.bfloat16}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_stay_float32(kind: str, tiny_model: Path) -> None:
    model = made(tiny_model, *LAST_TWO, kind, "--dtype", "bfloat16")
    assert dtypes(model.trainable_parameters()) == {mx.float32}
    assert model.model.embed_tokens.weight.dtype == mx.bfloat16
    assert model.layers[3].mlp.up_proj.linear.weight.dtype == mx.bfloat16


def test_what_is_no_weight_keeps_its_dtype() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias, self.count = mx.zeros(2, mx.float16), mx.zeros(2), mx.zeros(2, mx.int32)

        cast_predicate = staticmethod(lambda path: "bias" not in path)  # as mlx-lm's models have it for a few arrays

    model = Model()
    trainable.cast(model, "bfloat16")
    assert (model.weight.dtype, model.bias.dtype, model.count.dtype) == (mx.bfloat16, mx.float32, mx.int32)
    trainable.cast(model, None)
    assert model.weight.dtype == mx.bfloat16


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_quantized_model_is_refused(kind: str, tiny_model: Path) -> None:
    model = load(str(tiny_model))[0]
    nn.quantize(model, group_size=32, bits=4)
    args = lora_options.settings(["--train", *LAST_TWO, kind, "--dtype", "float32"])
    with pytest.raises(
        InputError, match=r"the model is quantized \(4 bits\), and dtype \(--dtype\) is for weights that"
    ):
        lora.make_trainable(args, model)


def test_other_dtypes_are_no_choice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--dtype is 'float16'; it must be one of bfloat16, float32"):
        lora_options.settings(["--train", "--dtype", "float16"])
    (tmp_path / "job.yaml").write_text("dtype: float64\n")
    with pytest.raises(InputError, match="dtype is 'float64'; it must be one of bfloat16, float32"):
        lora_options.settings(["--train", "-c", str(tmp_path / "job.yaml")])


def test_the_plan_has_the_bytes(tiny_model: Path) -> None:
    config = model_config.read(str(tiny_model)) | {"torch_dtype": "float32"}
    stored, cast = (
        plan.plan(config, lora_options.settings(["--train", *LAST_TWO, "full", *more]))
        for more in ((), ("--dtype", "bfloat16"))
    )
    assert (stored.dtype, cast.dtype) == ("float32", "bfloat16")
    assert stored.weights == 2 * cast.weights and stored.gradients == 2 * cast.gradients
    assert cast.states["float32"].residuals == 2 * cast.trainable


def test_mlx_lm_reads_what_is_saved(trained: Path, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    assert json.loads((trained / "adapter_config.json").read_text())["dtype"] == "bfloat16"
    saved = mx.load(str(trained / "adapters.safetensors"))
    assert dtypes(saved) == {mx.bfloat16}
    generating = load(str(tiny_model), adapter_path=str(trained))[0]  # as mlx_lm.generate does
    assert dtypes(generating.layers[3].parameters()) == {mx.bfloat16}
    argv = f"mlx_lm.fuse --model {tiny_model} --adapter-path {trained} --save-path {tmp_path / 'fused'}"
    monkeypatch.setattr(sys, "argv", argv.split())
    fuse.main()
    fused = dict(tree_flatten(load(str(tmp_path / "fused"))[0].parameters()))
    assert all(mx.array_equal(fused[path], array).item() for path, array in saved.items())
    assert fused["model.layers.3.mlp.up_proj.weight"].dtype == mx.bfloat16


def test_a_test_without_training_uses_the_dtype_of_the_run(trained, tiny_model: Path, data: Path, command) -> None:
    def tested(*more: str) -> str:
        return command(*job(tiny_model, data, trained, "--test", "--test-batches", "2", *more)).stdout

    loss = re.search("Test loss (.*),", tested())
    assert "the weights are cast to bfloat16\n" in tested() and loss
    assert "the weights are cast to float32\n" in tested("--dtype", "float32")
    model = load(str(tiny_model))[0]
    adapters.load_adapters(model, trained)
    assert dtypes(model.parameters()) == {mx.float32, mx.bfloat16}
    lora._load_adapters(lora_options.settings(["--test", "--adapter-path", str(trained)]), model)
    assert dtypes(model.parameters()) == {mx.bfloat16}


def test_a_wrong_dtype_in_adapter_config(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"dtype": "int8"}')
    with pytest.raises(InputError, match=r"adapter_config.json: dtype is .int8.; it must be one of bfloat16, float32"):
        adapters.trained_dtype(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")  # as mlx-lm writes it
    assert adapters.trained_dtype(tmp_path) is None


def test_a_resumed_run_must_have_the_same(trained, tiny_model: Path, data: Path, command, tmp_path: Path) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "adapters"))
    other = command(*full(tiny_model, data, out, "--resume"))
    assert other.returncode == 2 and re.search(r"^ +--dtype +- +bfloat16$", other.stderr, re.M), other.stderr
    assert not re.search(r"^ +(--)?model ", other.stderr, re.M)  # which is the same, before it is cast
    same = command(*full(tiny_model, data, out, "--resume", "--dtype", "bfloat16"))
    assert same.returncode == 0 and "all 3 iterations are done" in same.stdout


def test_weights_of_another_run_are_cast(trained, tiny_model: Path, data: Path, command, tmp_path: Path) -> None:
    file = ("--resume-adapter-file", str(trained / "adapters.safetensors"), "--keep-checkpoints", "0")
    done = command(*full(tiny_model, data, tmp_path / "next", "--dtype", "float32", "--iters", "1", *file))
    assert "weights cast to float32" in done.stdout  # among what differs from mlx_lm.lora
    assert dtypes(mx.load(str(tmp_path / "next" / "adapters.safetensors"))) == {mx.float32}
