"""The chunked loss of a run: for mlx-lm's model classes it is `next_token`, and where it cannot be, a line says so."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam import InputError, losses
from compiled_adam.finetune.chunked import ChunkedLoss, batch_for
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
GEMMA2 = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),  # scaled embeddings
    "gemma2": ("gemma2", GEMMA2),  # soft caps
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", EXPERTS),
    "cohere": ("cohere", {"logit_scale": 0.3, "layer_norm_eps": 1e-5, "use_qk_norm": False}),
    "mamba2": ("mamba2", {}),  # its backbone is `backbone`
}


def made(kind: str, **more: object) -> nn.Module:
    if kind == "gemma3":  # with a language model inside
        text = {**SIZES, "model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2}
        module = importlib.import_module("mlx_lm.models.gemma3")
        return module.Model(module.ModelArgs.from_dict({"model_type": kind, "text_config": text, "vocab_size": 200}))
    name, own = MODELS[kind]
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = {**SIZES, "model_type": name, **own, **more}
    if name == "mamba2":
        config |= {"num_heads": 8, "state_size": 8, "conv_kernel": 3, "n_groups": 2, "layer_norm_epsilon": 1e-4}
        config |= {"use_bias": True, "use_conv_bias": True, "time_step_limit": (0.01, 10), "time_step_rank": 4}
    return module.Model(module.ModelArgs.from_dict(config))


def batch() -> tuple[mx.array, mx.array]:
    """Two examples of 16 tokens, of which 13 and 4 are trained."""
    tokens = mx.random.randint(1, 199, (2, 17), key=mx.random.key(3))
    return tokens, mx.array([[3, 16], [5, 9]])


def assert_same_loss(model: nn.Module, *, supervised_only: bool = True) -> None:
    model.train()
    expected, gradients = nn.value_and_grad(model, losses.next_token)(model, *batch())
    loss = ChunkedLoss(model)
    arguments = batch_for(loss, batch())
    assert [each.shape for each in arguments] == [(2, 17), (2, 2), (24,)]  # 17 of 32: three quarters
    found, ours = nn.value_and_grad(model, loss)(model, *(arguments if supervised_only else batch()))
    assert found[1].item() == expected[1].item() == 17
    # float32 sums in another order; measured 1e-7 here, and at most 2e-6 for other models of mlx-lm.
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    ours = dict(tree_flatten(ours))
    norm = sum(mx.square(array).sum().item() for _, array in tree_flatten(gradients)) ** 0.5
    for path, array in tree_flatten(gradients):
        assert mx.abs(ours.pop(path) - array).max().item() <= 1e-5 * norm, path
    assert not ours and norm > 0


@pytest.mark.parametrize("kind", [*MODELS, "gemma3"])
def test_every_parameter_of_a_model_has_the_gradient_of_all_logits(kind: str) -> None:
    model = made(kind)
    before = list(dict(tree_flatten(model.parameters())))
    assert_same_loss(model)
    assert list(dict(tree_flatten(model.parameters()))) == before  # the backbone is in its place again


def test_a_batch_without_indices_is_the_same() -> None:
    assert_same_loss(made("llama, tied"), supervised_only=False)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("keys", [None, {"self_attn.q_proj", "lm_head"}])
def test_adapters_also_on_the_head(dora: bool, keys: set[str] | None) -> None:
    model = made("llama")
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": keys}, use_dora=dora)
    for path, array in tree_flatten(model.trainable_parameters()):
        if path.endswith("lora_b"):  # which is 0 at first, and lora_a would have no gradient
            array[:] = 0.1 * mx.random.normal(array.shape)
    assert_same_loss(model)


def test_a_quantized_model() -> None:
    model = made("llama")
    model.freeze()
    nn.quantize(model, 32, 4)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    assert_same_loss(model)


def test_capacities_are_few_and_hold_every_target() -> None:
    loss, sizes = ChunkedLoss(made("llama")), set()
    for begin in range(18):
        tokens, lengths = mx.ones((2, 33), mx.int32), mx.array([[2 * begin, 33], [begin, 30]])
        rows = (*loss.with_rows(tokens, lengths), None)[2]
        targets = (33 - max(2 * begin, 1)) * (2 * begin < 33) + 30 - max(begin, 1)
        if rows is not None:
            sizes.add(rows.size)
            found = np.array(rows)
            assert (found >= 0).sum() == targets and len(set(found)) == targets + (targets < rows.size)
        else:
            sizes.add(64)
    assert sizes <= {8, 16, 24, 32, 48, 64} and len(sizes) > 2
    (_, _, rows) = loss.with_rows(tokens, mx.array([[33, 33], [40, 33]]))  # no target at all
    assert rows.tolist() == [-1] * 8


class Mixed(nn.Module):
    """Its logits at a position depend on the position before."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = nn.Embedding(200, 8), nn.Linear(8, 200)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lm_head(mx.cumsum(self.model(tokens), axis=1))


def test_a_model_of_other_parts_is_refused() -> None:
    with pytest.raises(InputError, match="its logits differ by"):
        ChunkedLoss(Mixed())
    with pytest.raises(InputError, match="no backbone where"):
        ChunkedLoss(nn.Sequential(nn.Embedding(200, 8), nn.Linear(8, 200)))
    model = made("llama")
    backbone = model.model
    model.model = nn.Sequential(backbone, lambda hidden: (hidden,))  # returns a tuple
    with pytest.raises(InputError, match="the model is not a backbone and a head"):
        ChunkedLoss(model)


def test_the_command_uses_it_and_says_where_it_cannot(
    command, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ["lora", "--train", "--test", "--test-batches", "1", "--model", str(tiny_model), "--data", str(data)]
    job += ["--iters", "3", "--batch-size", "2", "--num-layers", "2", "--steps-per-report", "1", "--val-batches", "1"]
    whole = command(*job, "--adapter-path", "whole", "--no-chunked-loss")
    calls = []
    real = losses.linear_cross_entropy
    monkeypatch.setattr(losses, "linear_cross_entropy", lambda *a, **k: calls.append(k["ahead"]) or real(*a, **k))
    chunked = command(*job, "--adapter-path", "chunked")
    assert (whole.returncode, chunked.returncode) == (0, 0), chunked.stderr
    assert {True, False} == set(calls)  # training, and validations and the test
    assert "chunked_loss" not in whole.stdout + chunked.stdout

    def numbers(done) -> list[float]:
        return [float(number) for number in re.findall(r"loss (\d+\.\d+)", done.stdout)]

    assert len(numbers(whole)) == 6
    assert numbers(chunked) == pytest.approx(numbers(whole), rel=1e-4)  # as printed, with four digits

    def refused(model: nn.Module) -> None:
        raise InputError("its logits differ by 1.0e+00 of the largest")

    monkeypatch.setattr("compiled_adam.finetune.chunked.parts", refused)
    calls.clear()
    other = command(*job, "--adapter-path", "other")
    assert other.returncode == 0 and not calls
    note = "note: chunked_loss (--chunked-loss) is not used, and all logits exist at once: its logits differ"
    assert note in other.stdout
