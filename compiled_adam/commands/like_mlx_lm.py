"""What ``--like-mlx-lm`` changes, and the line that says how a job differs from one of ``mlx_lm.lora``."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

from .. import schedulers

# The defaults of options; one that is given explicitly wins.
DEFAULTS = {"group_by_length": False, "chunked_loss": False}
OF_ADAM = ("max_grad_norm", "skip_nonfinite", "moments", "weight_decay", "bias_correction")


def options_of_adam(args: types.SimpleNamespace) -> dict[str, Any]:
    """The keywords for `Adam` or `AdamW`: defaults, below ``optimizer_config``, below the options of the job."""
    defaults = dict.fromkeys(("bias_correction", "skip_nonfinite"), not args.like_mlx_lm)
    given = {key: getattr(args, key) for key in OF_ADAM if getattr(args, key) is not None}
    return {**defaults, **args.optimizer_config.get(args.optimizer, {}), **given}


def options_of_others(args: types.SimpleNamespace) -> dict[str, Any]:
    """The keywords for `Compensated`, which the other optimizers are in: defaults, below the options of the job."""
    skip = not args.like_mlx_lm if args.skip_nonfinite is None else args.skip_nonfinite
    return {"max_grad_norm": args.max_grad_norm, "skip_nonfinite": skip}


def is_grouped(args: types.SimpleNamespace) -> bool:
    """Whether batches are of similar length."""
    return bool(args.group_by_length or args.batch_tokens is not None)


def tokens_count_alike(args: types.SimpleNamespace) -> bool:
    """Whether micro-batches and workers are weighted by tokens. mlx-lm's count alike, which are not grouped."""
    return not args.like_mlx_lm or is_grouped(args)


def schedule(args: types.SimpleNamespace) -> Callable[[Any], Any]:
    """The learning rates of ``lr_schedule``. mlx-lm repeats the peak after a warmup, but knows only MLX's schedules."""
    if args.like_mlx_lm and hasattr(optim.schedulers, args.lr_schedule["name"]):
        return build_schedule(args.lr_schedule)
    return schedulers.from_config(args.lr_schedule)


def differences(args: types.SimpleNamespace) -> str:
    """A line with everything that makes the results of a job differ from those of ``mlx_lm.lora``."""
    ours = args.optimizer in ("adam", "adamw")
    options = options_of_adam(args) if ours else options_of_others(args)
    found = {
        "batches of similar length": is_grouped(args),
        "no loss on padding": not args.like_mlx_lm or args.chunked_loss,
        "bias correction": options.get("bias_correction", False),
        f"weights cast to {args.dtype}": args.dtype is not None,
        "updates with NaN skipped": options.get("skip_nonfinite", False),
        "AdamW for all but the matrices of layers": args.optimizer == "muon" and not args.like_mlx_lm,
        "accumulation weighted by tokens": args.grad_accumulation_steps > 1 and tokens_count_alike(args),
        "last window applied": args.iters % args.grad_accumulation_steps > 0,
    }
    names = ", ".join(name for name, differs in found.items() if differs)
    if args.like_mlx_lm:
        return f"like mlx_lm.lora{', but for: ' + names if names else ''}"
    return f"unlike mlx_lm.lora: {names} (--like-mlx-lm for its results)"
