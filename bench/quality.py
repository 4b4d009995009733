"""Does it train as well? A small byte-level language model on real text, once for each way to store the moments."""

from __future__ import annotations

import statistics
from pydoc_data import topics
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

import compiled_adam as ca

POLICIES = ("float32", "bfloat16", "8bit")
WIDTH, LAYERS, CONTEXT, BATCH, STEPS, SEEDS = 128, 4, 128, 8, 600, (0, 1, 2)


def text() -> tuple[mx.array, mx.array]:
    """The bytes of Python's help topics, about half a megabyte of English: nine tenths to train on, one to evaluate."""
    data = mx.array(list("".join(topics.topics[key] for key in sorted(topics.topics)).encode()), mx.uint8)
    cut = data.size * 9 // 10
    return data[:cut], data[cut:]


def model(width: int, layers: int) -> nn.Module:
    """A Llama over bytes; 1.07 M parameters at width 128 and 4 layers."""
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    return llama.Model(arguments)


def loss_fn(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def windows(data: mx.array, count: int, context: int, seed: int) -> mx.array:
    """``count`` random pieces of ``context + 1`` bytes, one a row."""
    starts = mx.random.randint(0, data.size - context - 1, (count, 1), key=mx.random.key(seed))
    return data[starts + mx.arange(context + 1)].astype(mx.int32)


def train(
    policy: str,
    seed: int,
    steps: int = STEPS,
    width: int = WIDTH,
    layers: int = LAYERS,
    context: int = CONTEXT,
    batch: int = BATCH,
) -> dict[str, Any]:
    """Trains one model; the figures of the run. Models of the same seed start alike and see the same batches."""
    train_data, eval_data = text()
    mx.random.seed(seed)
    trained = model(width, layers)
    rate = ca.schedulers.cosine(3e-3, steps, 3e-4, warmup=steps // 20)
    optimizer = ca.AdamW(rate, weight_decay=0.1, bias_correction=True, moments=policy, max_grad_norm=1.0)
    step = ca.make_step(trained, loss_fn, optimizer)
    losses = [step(windows(train_data, batch, context, seed * 1_000_000 + i)).loss for i in range(steps)]
    trained.eval()
    evaluated = [float(loss_fn(trained, windows(eval_data, batch, context, i))) for i in range(24)]
    parameters = sum(array.size for array in dict(tree_flatten(trained.trainable_parameters())).values())
    state = sum(array.nbytes for path, array in dict(tree_flatten(optimizer.state)).items() if "." in path)
    return {
        "policy": policy,
        "seed": seed,
        "steps": steps,
        "parameters": parameters,
        "state_bytes_per_parameter": state / parameters,
        "losses": [round(float(loss), 5) for loss in losses],
        "eval_loss": statistics.mean(evaluated),
    }
