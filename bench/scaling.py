"""``python -m bench.scaling``: writes docs/scaling.md, the plans of published models.

Nothing is measured here, and nothing downloaded: the configs are copied from the models' pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from compiled_adam.commands.lora_options import settings
from compiled_adam.commands.plan import GB, Plan, plan
from compiled_adam.update.moments import POLICIES

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
# Name: hidden size, intermediate size, layers, heads, key-value heads, vocabulary, whether embeddings are tied.
MODELS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "SmolLM2 135M": (576, 1536, 30, 9, 3, 49152, True),
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Llama 3.1 8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Qwen2.5 14B": (5120, 13824, 48, 40, 8, 152064, False),
    "Qwen2.5 32B": (5120, 27648, 64, 40, 8, 152064, False),
    "Llama 3.1 70B": (8192, 28672, 80, 64, 8, 128256, False),
}
MEMORIES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)  # GB; those that Macs and GPU servers have
WORKERS = (1, 2, 4, 8, 16, 64)
LINKS = {"10 Gb Ethernet": 1.25, "Thunderbolt 4": 5.0, "Thunderbolt 5": 10.0, "400 Gb InfiniBand": 50.0}  # GB/s
JOBS = {
    "LoRA": ["--num-layers", "-1"],
    "full": ["--fine-tune-type", "full", "--num-layers", "-1"],
    "full, `--reduce-dtype param`": ["--fine-tune-type", "full", "--num-layers", "-1", "--reduce-dtype", "param"],
}


def config(name: str) -> dict[str, Any]:
    """What config.json has of a model, as far as its shapes depend on it."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = MODELS[name]
    return {
        "model_type": "qwen2" if name.startswith("Qwen2") else "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }


def planned(name: str, job: str, workers: int) -> Plan:
    """The plan of one of `JOBS`."""
    # With two workers and with more the same is communicated.
    return _planned(name, job, workers > 1)._replace(workers=workers)


@cache
def sharded(name: str, workers: int) -> Plan:
    """The plan of "full" with `--shard-state`."""
    argv = ["--train", "--optimizer", "adamw", "--fine-tune-type", "full", "--num-layers", str(MODELS[name][2])]
    return plan(config(name), settings([*argv, "--shard-state"]), workers)


@cache
def _planned(name: str, job: str, many: bool) -> Plan:
    layers = MODELS[name][2]
    argv = [str(layers) if word == "-1" else word for word in JOBS[job]]
    return plan(config(name), settings(["--train", "--optimizer", "adamw", *argv]), 2 if many else 1)


def page(models: Sequence[str] = tuple(MODELS)) -> str:
    """The text of docs/scaling.md, with the rows of these ``models``."""
    memory = [["model", "parameters", "job", "weights", "gradients", *POLICIES, "fits in"]]
    for name in models:
        for job in ("LoRA", "full"):
            made = planned(name, job, 1)
            states = [_gb(sum(made.states[policy])) for policy in POLICIES]
            fits = " / ".join(_smallest(made.total(policy)) for policy in ("float32", "8bit"))
            row = [f"{made.parameters / 1e9:.2f} B", job, _gb(made.weights), _gb(made.gradients), *states, fits]
            memory.append([name, *row])
    shards = [["model", "moments", *(f"{n} workers" if n > 1 else "1 worker" for n in WORKERS)]]
    for name in models:
        for policy in ("float32", "8bit"):
            shards.append([name, policy, *(_gb(sum(sharded(name, n).states[policy])) for n in WORKERS)])
    traffic = [["model", "job", "calls", "one pass", *(f"{n} workers" for n in WORKERS[1:])]]
    for name in models:
        for job in JOBS:
            plans = [planned(name, job, n) for n in WORKERS[1:]]
            sizes = [_gb(each.traffic()) for each in plans]
            traffic.append([name, job, str(len(plans[0].calls)), _gb(sum(plans[0].calls)), *sizes])
    for name in models:
        plans = [sharded(name, n) for n in WORKERS[1:]]
        sizes = [_gb(each.traffic()) for each in plans]
        calls = f"{len(plans[0].calls)} and {len(plans[0].gathers)}"
        one_pass = _gb(sum(plans[0].calls) + sum(plans[0].gathers))
        traffic.append([name, "full, `--shard-state`", calls, one_pass, *sizes])
    times = [["model", "job", "workers", *(f"{link}, {speed:g} GB/s" for link, speed in LINKS.items())]]
    for name in models:
        for job in JOBS:
            for n in (2, 64):
                made = planned(name, job, n)
                times.append([name, job, str(n), *(_seconds(made.seconds(speed * GB)) for speed in LINKS.values())])
    return TEXT.format(
        memory=_markdown(memory),
        shards=_markdown(shards),
        traffic=_markdown(traffic),
        times=_markdown(times),
        memories=", ".join(map(str, MEMORIES)),
    )


TEXT = """# Scaling: what fits, and what is communicated

Made by `python -m bench.scaling` from published configs and `compiled_adam.commands.plan`; a test compares this page
with what that computes. **Everything here is computed.** What was run are models of up to 0.3 M parameters with 1, 2
and 4 processes on one machine, where the number of calls and their bytes were the computed ones (`tests/distributed`).
Nothing was run on several machines, on Thunderbolt or InfiniBand, or with more than 4 workers. For a model and options
of your own: `compiled-adam plan MODEL --workers N --link GB/S --memory GB`, with the options of `compiled-adam lora`.

GB are 10^9 bytes. Weights are bfloat16; all layers are trained, with LoRA of rank 8 in mlx-lm's default places, without
accumulation (which adds 4 bytes for each trained parameter). "full" is what `--fine-tune-type full` trains: the layers,
without embeddings and head.

## Memory of one worker

State is moments and residuals together, by `--moments`. Activations come on top of everything; `compiled-adam
plan` adds those of a batch of your size. *Fits in* is the smallest of {memories} GB that holds
weights, gradients and state with float32 / 8bit moments, and nothing else. Every worker has all of it, without
`--shard-state`. Several workers add one float32 copy of the gradients, the buffers of the reduction: 4 bytes for each
trained parameter.

{memory}

## State of one worker with `--shard-state`

Of the worker that has the most, for "full". Weights and gradients stay whole at every worker. Parameters are dealt out
whole, so that it is a little more than one N-th where there are few large ones for each worker.

{shards}

## Bytes of one update

*One pass* is what the calls of all_sum have together: the trained parameters, in float32 or with `--reduce-dtype param`
in their own dtype, and three numbers. Up to 512 MiB it is one call; beyond, buffers of 32 MiB, or of one leaf if that
is larger. In a ring of N workers each sends, and receives, 2 (N - 1) / N of that, which hardly grows with N. With
accumulation it is once for a whole window. With `--shard-state` come calls of all_gather for the new weights, of which
each sends (N - 1) / N; *one pass* has them too, for two workers.

{traffic}

## Time of that

At the nominal speed of the link in each direction at once, without latency: the least that it can take. It is not
overlapped with the backward pass. An update that takes longer than the communication of its gradients is one that more
workers make faster; when it does not, accumulate.

{times}
"""


def _smallest(nbytes: int) -> str:
    return next((f"{memory}" for memory in MEMORIES if nbytes < memory * GB), f"over {MEMORIES[-1]}")


def _gb(nbytes: float) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB / 10 else f"{nbytes / 1e6:.1f} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
