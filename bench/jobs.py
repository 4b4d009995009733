"""The jobs of `step`: a small Llama, data, and an epoch of it by ``mlx_lm.lora`` and by ``compiled-adam lora``."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import compiled_adam as ca
import mlx.core as mx
import numpy as np
from compiled_adam.commands import lora, lora_options, small_model
from compiled_adam.finetune import data
from compiled_adam.finetune.batches import Batches
from compiled_adam.step import losses
from mlx_lm import load
from mlx_lm import lora as mlx_lm_lora
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset

MEDIAN, SIGMA, LONGEST = 120, 0.75, 1000  # tokens of an example: lognormal, cut
MASKED = 0.7  # of the tokens of an example are prompt
FIGURES = (
    *("tokens_per_second", "first_step_ms", "positions_per_token", "supervised", "shapes", "peak_bytes", "held_out"),
)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Job:
    """A fine-tuning: a model or the sizes of a Llama, examples, and options of both commands."""

    model: str | None = None  # a folder, or an id on the Hugging Face Hub
    hidden: int = 128
    layers: int = 4
    vocabulary: int = 512
    examples: int = 240
    length: int | None = None  # of each example; None: lognormal
    masked: bool = False
    pretraining: int = 100  # steps
    options: tuple[str, ...] = ()


@dataclass
class Count:
    """What the batches of a run have."""

    positions: int = 0  # rows times the padded length, without the last column, which is only a target
    tokens: int = 0  # those that a model sees
    supervised: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def add(self, tokens: mx.array, lengths: mx.array) -> None:
        rows, length = tokens.shape
        offset, end = np.array(lengths[:, 0]), np.array(lengths[:, 1])
        self.positions += rows * (length - 1)
        self.tokens += int(np.maximum(end - 1, 0).sum())
        self.supervised += int(np.maximum(end - np.maximum(offset, 1), 0).sum())
        self.shapes.add(tokens.shape)


def lengths(job: Job, seed: int) -> list[int]:
    """The tokens of each example."""
    if job.length is not None:
        return [job.length] * job.examples
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA, job.examples)
    return [int(n) for n in np.clip(drawn, 8, LONGEST)]


def make(folder: Path, job: Job) -> None:
    """Writes the data, pieces of mlx-lm's manuals, and a model unless the job names one."""
    _, topic, general = small_model.texts(200_000)
    if job.model is None:
        _make_model(folder / "model", job, general + topic)
    model, tokenizer = load(_model(folder, job))[:2]
    tokens = tokenizer.encode(general + topic)
    if job.model is None:
        _pretrain(model, tokens, job.pretraining)
        model.save_weights(str(folder / "model" / "model.safetensors"))
    for name, seed in (("train", 0), ("valid", 1)):
        rows, start = [], 0
        for length in lengths(job, seed):
            start = 0 if start + length > len(tokens) else start
            piece = tokens[start : start + length - 1]  # and the token that ends every example
            start += length
            cut = int(MASKED * length) if job.masked else 0
            prompt, text = tokenizer.decode(piece[:cut]), tokenizer.decode(piece[cut:])
            rows.append({"prompt": prompt, "completion": text} if job.masked else {"text": text})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _make_model(folder: Path, job: Job, text: str) -> None:
    config = {"hidden_size": job.hidden, "intermediate_size": 4 * job.hidden, "num_hidden_layers": job.layers}
    config |= {"vocab_size": job.vocabulary, "head_dim": job.hidden // 4, "tie_word_embeddings": True}
    mx.random.seed(0)
    small_model.make_model(folder, text, small_model.CONFIG | config)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))


def _model(folder: Path, job: Job) -> str:
    return job.model or str(folder / "model")


def _pretrain(model: Any, tokens: list[int], steps: int) -> None:
    """Teaches the model a little, so that the losses of fine-tuning mean something."""
    step = ca.make_step(model, losses.next_token, ca.AdamW(3e-3, bias_correction=True), weighted=True)
    random = np.random.default_rng(0)
    for _ in range(steps):
        starts = random.integers(0, len(tokens) - 129, 8)
        step(mx.array([tokens[i : i + 129] for i in starts]), mx.array([[0, 129]] * 8))


def run(folder: Path, job: Job, command: str, options: tuple[str, ...], seed: int) -> dict[str, Any]:
    """One epoch by ``command``: some `FIGURES` by name, without loading the model.

    ``first_step_ms`` only for batches that are all alike, because ours begins with the longest one and mlx-lm with any;
    ``held_out``, the loss of other examples, only for examples of different lengths.
    """
    with tempfile.TemporaryDirectory() as out:
        argv = ["--train", "--model", _model(folder, job), "--data", str(folder), "--adapter-path", out]
        argv += ["--num-layers", "-1", "--learning-rate", "3e-4", "--seed", str(seed), "--batch-size", "4"]
        argv += ["--steps-per-report", "10", "--save-every", "100000", "--val-batches", "-1"]
        argv += ["--mask-prompt"] * job.masked + [*job.options, *options]
        more = {}
        if job.length is not None:
            more["first_step_ms"] = 1e3 * _timed(command, [*argv, "--iters", "1"], Count())[0]
        count = Count()
        ends = ["--iters", str(job.examples // 4)] if command == "mlx_lm.lora" else ["--epochs", "1"]
        seconds, peak, model = _timed(command, [*argv, *ends], count)
    if job.length is None:
        more["held_out"] = _held_out(folder, job, model)
    return {
        "tokens_per_second": count.supervised / seconds,
        "positions_per_token": count.positions / count.tokens,
        "supervised": count.supervised,
        "shapes": len(count.shapes),
        "peak_bytes": peak,
        **more,
    }


def _timed(command: str, argv: list[str], count: Count) -> tuple[float, int, Any]:
    """Seconds of a training without its validations, bytes above the weights at the peak, and the trained model."""
    args = lora_options.settings(argv) if command != "mlx_lm.lora" else _stock_settings(argv)
    model: Any
    tokenizer: Any
    model, tokenizer = load(args.model)[:2]
    mx.eval(model.parameters())
    np.random.seed(args.seed)
    sets = data.load(args, tokenizer) if command != "mlx_lm.lora" else mlx_lm_lora.load_dataset(args, tokenizer)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), _counted(count):
        begin = time.perf_counter()
        if command == "mlx_lm.lora":
            mlx_lm_lora.train_model(args, model, sets[0], [])
        else:
            lora.train_model(args, model, lora.make_optimizer(args), sets[0], [], None)
        seconds = time.perf_counter() - begin
    return seconds, mx.get_peak_memory() - before, model


def _stock_settings(argv: list[str]) -> Any:
    parser = mlx_lm_lora.build_parser()
    given = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    return type("Settings", (), {**mlx_lm_lora.CONFIG_DEFAULTS, **given})()


@contextlib.contextmanager
def _counted(count: Count) -> Iterator[None]:
    """Counts the batches of both commands."""
    ours: Callable[..., Any] = Batches.__next__

    def next_of_ours(self: Batches) -> Any:
        batch = ours(self)
        count.add(*batch[:2])
        return batch

    def theirs(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in trainer.iterate_batches(*args, **kwargs):
            count.add(*batch)
            yield batch

    def train(**kwargs: Any) -> None:
        trainer.train(**kwargs, iterate_batches=theirs)

    with mock.patch.object(Batches, "__next__", next_of_ours), mock.patch.object(mlx_lm_lora, "train", train):
        yield


def _held_out(folder: Path, job: Job, model: Any) -> float:
    """The mean loss of all tokens to be learned of the other examples."""
    args = lora_options.settings(["--data", str(folder), *["--mask-prompt"] * job.masked, "--train"])
    valid = data.load(args, load(_model(folder, job))[1])[1]
    return trainer.evaluate(model, CacheDataset(valid), 4, -1, loss=losses.next_token)
