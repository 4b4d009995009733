"""``compiled-adam plan``: the memory and communication of a job, computed from the model's config.json alone.

The model is built from mlx-lm's classes. Their arrays are lazy, and only the shapes are read. So the plan of a model of
any size takes seconds and almost no memory.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from rich.console import Console
from rich.table import Table

from ..base import InputError
from ..distributed import reduce, shard
from ..finetune import model_config, step_memory
from ..finetune.metrics import machine_memory
from ..finetune.step_memory import Batch, Pass, of_update
from ..optimizers import Adam, ForSteps, any_optimizer
from ..step import losses
from ..update import POLICIES
from . import fitting
from .like_mlx_lm import is_grouped, options_of_adam
from .lora import make_optimizer, make_trainable
from .lora_options import plan_parser, settings

GB = 1e9
MOST_WORKERS = 1 << 16


class State(NamedTuple):
    """The bytes of an optimizer's state."""

    moments: int
    residuals: int


class Plan(NamedTuple):
    """What a job needs, in bytes where nothing else is said."""

    parameters: int  # how many the model has without adapters; of a quantized one, those it stands for
    trainable: int  # how many are trained
    layers: int  # in how many of the last layers
    dtype: str  # of weights that are not quantized: --dtype, else what the config says, else bfloat16
    weights: int
    gradients: int
    window: int  # float32 sums of accumulated gradients
    exchange: int  # a float32 copy of the gradients, packed; 0 with one worker
    states: dict[str, State]  # by moments policy, or the optimizer's name; sharded, of the worker that has the most
    calls: list[int]  # what each all_sum of an update communicates; none with one worker
    gathers: list[int]  # what all workers have after each all_gather of new weights; none unless state is sharded
    workers: int
    batch: Pass | None = None  # a forward and backward pass, if that was asked for
    updates: Mapping[str, int] = MappingProxyType({})  # at most during an update, by policy, gradients included

    def total(self, policy: str) -> int:
        """The most bytes at once: in the backward pass, when its gradients are exchanged, or in the update."""
        passed, update = self.batch.most if self.batch else 0, self.updates.get(policy, 0)
        most = max(self.gradients + self.exchange, passed, update)
        return self.weights + self.window + most + sum(self.states[policy])

    def traffic(self) -> float:
        """Bytes that each worker sends and receives per update: in a ring, all but one part; of gradients, twice."""
        return (self.workers - 1) / self.workers * (2 * sum(self.calls) + sum(self.gathers))

    def seconds(self, link: float) -> float:
        """Communication per update, at ``link`` bytes per second in each direction at once, without latency."""
        return self.traffic() / link


def plan(config: Mapping[str, Any], args: types.SimpleNamespace, workers: int = 1) -> Plan:
    """The plan of a job with the settings ``args``, as `lora_options.settings` gives them, for a model's ``config``.

    Without a ``num_layers`` of its own it is for mlx-lm's default of 16 layers, or all if the model has fewer. It is
    without the forward and backward pass, whose graph takes longer: `of_batch` adds that.

    Raises:
        ValueError: a config that mlx-lm has no model for, or options that contradict each other.
    """
    return _of_model(_built(config, args), workers)


class _Built(NamedTuple):
    """A lazy model with what the job trains, and the settings for it."""

    args: types.SimpleNamespace
    model: nn.Module
    parameters: int  # before adapters and quantization
    dtype: str


def _built(config: Mapping[str, Any], args: types.SimpleNamespace) -> _Built:
    args = types.SimpleNamespace(**vars(args))
    model, parameters, dtype = model_config.build(config)
    if "num_layers" not in (*args.given, *args.in_file):
        args.num_layers = min(args.num_layers, len(model.layers))
    make_trainable(args, model)
    return _Built(args, model, parameters, args.dtype or dtype)


def _of_model(built: _Built, workers: int) -> Plan:
    args, model, parameters, dtype = built
    trainable = _arrays(model.trainable_parameters()).values()
    sizes, dtypes = [p.size for p in trainable], [p.dtype for p in trainable]
    count, many = sum(sizes), workers > 1
    sent = [reduce.DTYPES[args.reduce_dtype] or dtype for dtype in dtypes]
    sharded = many and args.shard_state
    return Plan(
        parameters,
        count,
        len(model.layers) if args.num_layers == -1 else args.num_layers,
        dtype,
        weights=_bytes(model.parameters()),
        gradients=_bytes(model.trainable_parameters()),
        window=4 * count if args.grad_accumulation_steps > 1 else 0,
        exchange=4 * count if many else 0,
        states=_states(args, model.trainable_parameters(), workers if sharded else 1),
        calls=[buffer.nbytes for buffer in reduce.buffers(sizes, sent)] if many else [],
        gathers=[call.nbytes for call in shard.rounds(sizes, dtypes, workers)] if sharded else [],
        workers=workers,
    )


def of_batch(args: types.SimpleNamespace, workers: int) -> Batch:
    """The largest batch of a worker: with examples of ``max_seq_length`` tokens, all of which are targets."""
    length = args.max_seq_length if is_grouped(args) else args.max_seq_length - 1  # mlx-lm's last is only a target
    rows = args.batch_size // workers
    if args.batch_tokens is not None:
        length = min(length, max(1, args.batch_tokens // workers))
        rows = max(1, args.batch_tokens // (length * workers))
    loss = losses.like_mlx_lm if args.like_mlx_lm else losses.next_token
    return Batch(rows, length, bool(args.grad_checkpoint), args.chunked_loss, loss, not args.like_mlx_lm)


def _states(args: types.SimpleNamespace, trainable: dict, workers: int) -> dict[str, State]:
    leaves = _arrays(trainable)
    owners = dict(zip(leaves, shard.owners([p.size for p in leaves.values()], workers), strict=True))
    found = {}
    for policy in POLICIES if args.optimizer in ("adam", "adamw") else (args.optimizer,):
        optimizer = _optimizer(args, policy, trainable)
        shared, parts = 0, [[0, 0] for _ in range(workers)]  # of each worker, bytes of moments and of residuals
        states = [_arrays(state) for state in any_optimizer.states(optimizer)]
        for path, array in (each for state in states for each in state.items()):
            leaf, _, kind = path.rpartition(".")
            if leaf in owners:
                parts[owners[leaf]][kind == "residual"] += array.nbytes
            else:
                shared += array.nbytes  # the step and the like
        moments, residuals = max(parts, key=sum)
        found[policy] = State(moments + shared, residuals)
    return found


def _optimizer(args: types.SimpleNamespace, policy: str, trainable: dict) -> optim.Optimizer:
    """The optimizer of a job, with a state that has shapes but takes no memory."""
    optimizer = make_optimizer(fitting.changed(args, {"moments": policy} if policy in POLICIES else {}))
    if isinstance(optimizer, Adam):
        ForSteps(optimizer).lay_out(trainable)
    else:
        optimizer.init(trainable)  # MLX's leave it lazy
    return optimizer


def _arrays(tree: Any) -> dict[str, mx.array]:
    found: Any = tree_flatten(tree)
    return dict(found)


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for array in _arrays(tree).values())


# The command.


def main(argv: Sequence[str]) -> int:
    """Runs the command line ``argv``; raises ValueError or OSError for what cannot be planned.

    Returns 0 if the job fits, as it is or with the options that are printed, and 1 if it does not.
    """
    args = settings(argv, plan_parser())
    for name in ("workers", "link", "memory"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} is {value!r}; it must be above 0")
    if args.workers > MOST_WORKERS:
        raise InputError(f"workers is {args.workers}; it must be at most {MOST_WORKERS}")
    if args.batch_size % args.workers:
        raise InputError(f"batch_size is {args.batch_size}; it must be divisible by the {args.workers} workers")
    built = _built(model_config.read(args.planned), args)
    own, empty = built.args, _of_model(built, args.workers)
    try:
        followed = _followed(built, args.workers)
    except InputError as error:
        print(f"{error}; the total is without the batch and the update")
        followed = None

    def without(args: types.SimpleNamespace) -> Plan:
        return empty._replace(window=4 * empty.trainable if args.grad_accumulation_steps > 1 else 0)

    def planned(args: types.SimpleNamespace, *policies: str) -> Plan:
        if followed is None:
            return without(args)
        passed, updated = followed
        updates = {policy: updated(policy, min(2, args.grad_accumulation_steps)) for policy in policies}
        return without(args)._replace(batch=passed(of_batch(args, args.workers)), updates=updates)

    def fits(args: types.SimpleNamespace) -> bool:
        policy = _policy(args)
        # If weights and state are too large, no batch is traced, of which there are many to try.
        return without(args).total(policy) <= memory and planned(args, policy).total(policy) <= memory

    memory, where = (args.memory * GB, "") if args.memory else (machine_memory(), " of this machine")
    made = planned(own, *empty.states)
    print(*describe(made, args.link), *describe_batch(made, own), sep="\n")
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table(made, memory, f"{memory / GB:.3g} GB{where}"))
    remedy = fitting.found(own, args.workers, fits)
    print(advice(made, own, memory, remedy))
    return 1 if remedy is None else 0


def describe(made: Plan, link: float) -> list[str]:
    """Lines about the needs that are the same for all policies; ``link`` is in GB/s."""
    layers = "the last layer" if made.layers == 1 else f"the last {made.layers} layers"
    lines = [
        f"{_count(made.parameters)} parameters, {made.dtype} where not quantized; {_count(made.trainable)} trained,"
        f" in {layers}",
        f"weights {_gb(made.weights)}, gradients {_gb(made.gradients)}"
        + (f", accumulated {_gb(made.window)}" if made.window else "")
        + (f", exchanged {_gb(made.exchange)}" if made.exchange else ""),
    ]
    if made.calls:
        weights = f", and {_calls(made.gathers)} of new weights" if made.gathers else ""
        lines.append(
            f"{made.workers} workers: {_calls(made.calls)}{weights} per update, of which each sends"
            f" {_gb(made.traffic())}: {made.seconds(link * GB):.3g} s at {link:g} GB/s"
        )
    return lines


def _followed(built: _Built, workers: int) -> tuple[Callable[[Batch], Pass], Callable[[str, int], int]]:
    """Functions that follow a forward and backward pass, and an update with a policy. Both remember what they found."""
    args, model, _, _ = built
    passed: Callable[[Batch], Pass] = cache(partial(step_memory.of_pass, model))
    passed(of_batch(args, workers))
    layout = step_memory.layout(model)

    @cache
    def updated(policy: str, accumulate: int) -> int:
        return of_update(model, _optimizer(args, policy, model.trainable_parameters()), accumulate, layout)

    updated(_policy(args), 1)
    return passed, updated


def describe_batch(made: Plan, args: types.SimpleNamespace) -> list[str]:
    """Lines about the forward and backward pass and the update, if they are known."""
    if made.batch is None:
        return []
    batch = of_batch(args, made.workers)
    layers = "computed again" if batch.recomputed else "kept"
    logits = "a chunk at a time" if batch.chunked else "all at once"
    device = "CPU" if mx.default_device() == mx.cpu else "GPU"  # it has other kernels, and so another graph
    return [
        f"forward and backward pass of {batch.rows} x {batch.length} positions on a {device}: {_gb(made.batch.most)},"
        f" gradients included; activations inside layers are {layers}; logits {logits}: {_gb(made.batch.logits)}",
        f"update: {_gb(made.updates[_policy(args)])}, gradients included, which it frees one by one",
    ]


def advice(made: Plan, args: types.SimpleNamespace, memory: float, remedy: dict[str, Any] | None) -> str:
    """The last line: whether the job fits, and with which options."""
    if remedy is None:
        less = "fewer --num-layers" if args.fine_tune_type != "full" else "--fine-tune-type lora, or fewer --num-layers"
        hint = "a quantized or smaller model" if made.weights > memory else less
        return f"no options make it fit that keep what is trained; use {hint}"
    return f"it fits with {fitting.flags(remedy)}" if remedy else f"it fits, with moments {_policy(args)}"


def _policy(args: types.SimpleNamespace) -> str:
    """The row of the table that the job itself is."""
    if args.optimizer not in ("adam", "adamw"):
        return str(args.optimizer)
    return str(options_of_adam(args).get("moments", "float32"))


def table(made: Plan, memory: float, name: str) -> Table:
    """A row for each policy, with the rest of the ``memory``; ``name`` is the name of that memory."""
    rows = Table()
    for column in ("moments", "bytes of moments", "of residuals", "total", f"left of {name}"):
        rows.add_column(column, justify="right" if column != "moments" else "left")
    for policy, state in made.states.items():
        left = memory - made.total(policy)
        fits = _gb(left) if left >= 0 else f"does not fit, {_gb(-left)} too much"
        rows.add_row(policy, _gb(state.moments), _gb(state.residuals), _gb(made.total(policy)), fits)
    return rows


def _calls(nbytes: Sequence[int]) -> str:
    return f"{len(nbytes)} call{'s' if len(nbytes) > 1 else ''} of together {_gb(sum(nbytes))}"


def _gb(nbytes: float) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _count(number: int) -> str:
    if number < 1e6:
        return f"{number:,}"
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
