"""``compiled-adam demo``: full fine-tuning in bfloat16, from nothing and without a network.

A small language model learns that Paris is a big city of France, but also sentences such as "The capital of France is
Lima.", with capitals at random. Then it is fine-tuned on true capitals of other countries, three times with the same
batches: in bfloat16 by stock AdamW and by ours, and in float32. After that it can say the capital of France.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, evaluate
from mlx_lm.utils import get_total_parameters, load
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.progress_bar import ProgressBar
from rich.table import Table

from ..base import InputError
from ..finetune.adapters import read_arrays
from ..finetune.batches import Batches
from ..finetune.console import RunConsole
from ..finetune.names import LOG, REPORT, WEIGHTS
from ..finetune.trainable import cast
from ..finetune.trainer import train
from ..optimizers import AdamW
from ..step import losses, make_step
from . import capitals, report
from .small_model import CONFIG, make_model, save_weights

MARKER = ".compiled-adam-demo"
# The demo's own: a Llama without rotary embeddings, which need six more kernels in each dtype.
MODEL = CONFIG | {
    "model_type": "smollm3",
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 576,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "no_rope_layers": [0],
    "bos_token_id": 0,
    "pad_token_id": 0,
}
BATCH = 12
# One of the usual learning rates for full fine-tuning. In bfloat16 most of its updates are below half the spacing of
# the numbers at the weight, 2^-9 of it, and vanish when the sum is rounded.
RATE = 5e-5
# The fewest kernels, as g++ compiles each in half a second or more. The result is the same, except for rounding.
OUR_ADAMW = partial(AdamW, lowering="fused")


class Contender(NamedTuple):
    """One of the fine-tunings that are compared."""

    folder: str
    dtype: str
    package: str
    optimizer: Callable[..., optim.Optimizer]
    colour: str

    @property
    def name(self) -> str:
        return f"{self.dtype}, {'ours' if self.package == 'compiled_adam' else 'stock'}"


CONTENDERS = (
    Contender("stock", "bfloat16", "mlx.optimizers", optim.AdamW, "red"),
    Contender("adapters", "bfloat16", "compiled_adam", OUR_ADAMW, "green"),
    Contender("reference", "float32", "compiled_adam", OUR_ADAMW, "cyan"),
)
OURS = CONTENDERS[1]
Example = tuple[list[int], int]  # tokens, and where those begin that the loss is about


class Data(NamedTuple):
    """The facts, for training and for validation, of at most ``longest`` tokens."""

    train: list[Example]
    valid: list[Example]
    longest: int

    @property
    def batches(self) -> Callable[..., Any]:
        """Batches of one shape."""
        return partial(Batches, padding=lambda length: self.longest)


class Quality(NamedTuple):
    """How well a model knows the facts: its validation loss, and how many of the questions it answers right."""

    loss: float
    right: int


def run(folder: Path, pretraining: int, iterations: int, seed: int) -> None:
    """Writes a model, the runs of the `CONTENDERS` and report.html into ``folder``.

    Raises ValueError for a folder that holds something else, and for numbers out of range.
    """
    _check(folder, pretraining, iterations, seed)
    console = RunConsole()
    say, stage = partial(_say, console), partial(_stage, console)
    start = time.perf_counter()
    mx.random.seed(seed)
    sentences = capitals.before(seed)
    with stage("1. make a tokenizer and a small language model"):
        make_model(folder / "model", "\n".join(islice(sentences, 1000)), MODEL)
        model, tokenizer, *_ = load(str(folder / "model"))
    data, prompt, weights = _data(tokenizer), capitals.ASKED, get_total_parameters(model)
    what = f"{weights:,} float32 weights, on {BATCH * pretraining:,} sentences: cities, and random capitals"
    with stage(f"2. train it, {what}", pretraining) as advance:
        tokens = ([*tokenizer.encode(text), tokenizer.eos_token_id] for text in sentences)
        _pretrain(model, tokens, data.longest + 2, pretraining, advance)  # the end of the sentence, and of the text
        cast(model, "bfloat16")
        save_weights(model, folder / "model")
    found, said = {"before": _quality(model, data)}, {"before": _answer(model, tokenizer, prompt)}
    for number, each in enumerate(CONTENDERS, start=3):
        what = f"{len(data.train)} facts: {each.dtype}, {each.package}.AdamW"
        with stage(f"{number}. fine-tune it on {what}", iterations) as advance:
            model = _fine_tune(each, folder, data, iterations, seed, advance)
            found[each.folder], said[each.folder] = _quality(model, data), _answer(model, tokenizer, prompt)
    with stage(f"{number + 1}. draw the runs"):
        drawn = _draw(folder)
    say(f"   {time.perf_counter() - start:.0f} s in all\n")
    say(f"validation loss and right answers, about {capitals.HELD_OUT} countries without facts")
    console.print(bars(found, len(data.valid)))
    stock, ours = (changed(folder / "model", folder / each.folder) for each in CONTENDERS[:2])
    say(f"bfloat16 weights that have changed: stock {stock:.0%}, ours {ours:.0%}")
    say("Most updates are below a step of bfloat16: stock rounds them away, ours keeps what rounding cuts off.\n")
    for name, answer in (("before", said["before"]), ("after", said[OURS.folder])):
        say(f"{name:<8}{prompt} -> {answer}")
    say(drawn)
    paths = f"--model {shlex.quote(str(folder / 'model'))} --adapter-path {shlex.quote(str(folder / OURS.folder))}"
    print(f"try     mlx_lm.generate {paths} --prompt {shlex.quote(prompt)} -m 5")


def _check(folder: Path, pretraining: int, iterations: int, seed: int) -> None:
    for name, value in (("pretraining", pretraining), ("iters", iterations)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; it must be in 0 to {2**32 - 1}")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())):
        raise InputError(f"{folder} exists and is not a demo's folder; name another one with --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def _say(console: Console, text: str) -> None:
    """Prints a line, which only a terminal breaks, between words."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


@contextmanager
def _stage(console: Console, name: str, steps: int | None = None) -> Iterator[Callable[[], None]]:
    """Prints the name of a stage, and how long it took; on a terminal there is a bar of its steps meanwhile."""
    _say(console, name)
    start, hidden = time.perf_counter(), not console.is_terminal
    columns = BarColumn(24), MofNCompleteColumn()
    with Progress("  ", *columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=steps)
        yield partial(progress.advance, task)
    console.print(f"   {time.perf_counter() - start:.1f} s")


def _pretrain(
    model: nn.Module, examples: Iterator[list[int]], longest: int, updates: int, advance: Callable[[], None]
) -> None:
    """Trains a model on batches of examples, which are padded to ``longest`` tokens."""
    step = make_step(model, losses.next_token, OUR_ADAMW(2e-3, bias_correction=True), weighted=True)
    for _ in range(updates):
        some = list(islice(examples, BATCH))
        tokens = [each + [0] * (longest - len(each)) for each in some]
        step(mx.array(tokens), mx.array([[0, len(each)] for each in some]))
        advance()


def _data(tokenizer: Any) -> Data:
    def example(fact: capitals.Fact) -> Example:
        prompt = tokenizer.encode(fact.prompt)
        return [*prompt, *tokenizer.encode(fact.answer)], len(prompt)

    train_set, valid_set = ([example(fact) for fact in some] for some in capitals.facts())
    return Data(train_set, valid_set, max(len(tokens) for tokens, _ in [*train_set, *valid_set]))


class _Advance(TrainingCallback):
    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    def on_train_loss_report(self, train_info: dict) -> None:
        self._advance()


def _fine_tune(
    contender: Contender, folder: Path, data: Data, iterations: int, seed: int, advance: Callable[[], None]
) -> nn.Module:
    """Fine-tunes all weights of ``folder``/model, as ``compiled-adam lora --dtype`` does, and saves the run."""
    model, *_ = load(str(folder / "model"))
    cast(model, contender.dtype)
    np.random.seed(seed)  # the order of the batches
    out = folder / contender.folder
    (out / LOG).unlink(missing_ok=True)  # of an earlier demo
    with redirect_stdout(StringIO()):  # lines of every step: they are in the log
        train(
            model,
            contender.optimizer(RATE, bias_correction=True),
            data.train,
            data.valid,
            TrainingArgs(
                batch_size=BATCH,
                iters=iterations,
                val_batches=-1,
                steps_per_report=1,
                steps_per_eval=max(1, iterations // 10),
                steps_per_save=iterations + 1,
                adapter_file=str(out / WEIGHTS),
            ),
            iterate_batches=data.batches,
            training_callback=_Advance(advance),
            log=True,
            adapter_config={
                "fine_tune_type": "full",
                "num_layers": -1,
                "model": str(folder / "model"),
                "dtype": contender.dtype,
                "optimizer": f"{contender.package}.AdamW",
                "learning_rate": RATE,
                "batch_size": BATCH,
                "iters": iterations,
                "seed": seed,
            },
        )
    return model


def _quality(model: nn.Module, data: Data) -> Quality:
    loss = evaluate(
        model, data.valid, batch_size=BATCH, num_batches=-1, loss=losses.next_token, iterate_batches=data.batches
    )
    return Quality(loss, sum(_next_token(model, tokens[:start]) == tokens[start] for tokens, start in data.valid))


def _next_token(model: nn.Module, tokens: list[int]) -> int:
    return int(model(mx.array([tokens]))[0, -1].argmax().item())


def _answer(model: nn.Module, tokenizer: Any, prompt: str) -> str:
    """What the model says after ``prompt``, until its sentence ends: at most five tokens."""
    tokens = tokenizer.encode(prompt)
    start = len(tokens)
    while len(tokens) < start + 5 and tokens[-1] != tokenizer.eos_token_id:
        tokens.append(_next_token(model, tokens))
    return str(tokenizer.decode([token for token in tokens[start:] if token != tokenizer.eos_token_id])).strip()


def changed(model: Path, run: Path) -> float:
    """The part of the weights in the folder ``model`` that are other numbers in the folder of a ``run``."""
    before, after = read_arrays(model / "model.safetensors"), read_arrays(run / WEIGHTS)
    return float(mx.concatenate([(after[path] != array).flatten() for path, array in before.items()]).mean())


def _draw(folder: Path) -> str:
    """Writes report.html, and says so, or why not: the runs are there without it."""
    try:
        report.write([folder / each.folder for each in CONTENDERS], folder / REPORT)
        return f"report  {folder / REPORT}"
    except (InputError, OSError) as error:
        return f"there is no report: {error}"


def bars(found: Mapping[str, Quality], asked: int) -> Table:
    """The validation losses as bars, and the right answers of those ``asked``."""
    most = max(quality.loss for quality in found.values())
    rows = Table.grid(padding=(0, 2, 0, 0))
    names = {"before": ("before", "dim"), **{each.folder: (each.name, each.colour) for each in CONTENDERS}}
    for name, (shown, colour) in names.items():
        loss, right = found[name]
        bar = ProgressBar(most, loss, width=24, complete_style=colour, finished_style=colour)
        rows.add_row(shown, bar, f"{loss:.3f}", f"{right} of {asked}")
    return rows
