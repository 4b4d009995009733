"""What workers of tests/test_distributed.py run: command lines of ``compiled-adam lora``, a JSON list of lists.

The loss of a batch that has a ``~`` is not a number.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mlx.core as mx
from compiled_adam import cli
from compiled_adam.commands import lora
from mlx_lm.tuner.trainer import default_loss

from tests import count_calls

TILDE = 94  # of the tiny model's tokenizer


def poisoned_loss(model: Any, tokens: mx.array, lengths: mx.array) -> Any:
    loss, count = default_loss(model, tokens, lengths)
    return loss * mx.where((tokens == TILDE).any(), float("nan"), 1.0), count  # a where of the loss has the gradient 0


lora._loss = lambda args, model: poisoned_loss
for arguments in json.loads(sys.argv[1]):
    code = cli.main(arguments)
    if code:
        sys.exit(code)
    print(f"all_sum in the update: {count_calls.counts}", file=sys.stderr)
    count_calls.counts.clear()
