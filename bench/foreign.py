"""AdamW of other frameworks on the same parameters and gradients, for those who wonder: PyTorch's and optax's.

They are imported by name when one is made, because neither need be installed.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np

from .contenders import BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY, Tree
from .environment import cores

_NAMES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))  # a copy; NumPy has no bfloat16


class Torch:
    """``torch.optim.AdamW`` on the CPU; either ``fused`` (one C++ loop) or ``foreach`` (horizontally batched)."""

    traces = None

    def __init__(self, parameters: Tree, gradients: Tree, fused: bool, one_thread: bool) -> None:
        self._torch = torch = import_module("torch")
        self._threads = 1 if one_thread else cores()
        self._parameters = {}
        for name, array in parameters.items():
            dtype = getattr(torch, _NAMES[array.dtype])
            parameter = torch.nn.Parameter(torch.from_numpy(_numpy(array)).to(dtype))
            parameter.grad = torch.from_numpy(_numpy(gradients[name])).to(dtype)
            self._parameters[name] = parameter
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, fused=fused, foreach=not fused
        )

    def update(self) -> None:
        self._torch.set_num_threads(self._threads)
        self._optimizer.step()

    def state_bytes(self) -> int:
        states = self._optimizer.state.values()
        return sum(t.numel() * t.element_size() for state in states for t in state.values() if t.numel() > 1)

    def named_parameters(self) -> Tree:
        return {name: mx.array(p.detach().float().numpy()) for name, p in self._parameters.items()}


class Optax:
    """``optax.adamw`` under ``jax.jit`` with parameters and state donated."""

    def __init__(self, parameters: Tree, gradients: Tree) -> None:
        self._jax, jnp = import_module("jax"), import_module("jax.numpy")
        optax = import_module("optax")
        self._traced = 0

        def moved(tree: Tree) -> dict[str, Any]:
            return {name: jnp.asarray(_numpy(a)).astype(_NAMES[a.dtype]) for name, a in tree.items()}

        self._parameters, self._gradients = moved(parameters), moved(gradients)
        adamw = optax.adamw(LEARNING_RATE, *BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        self._state = adamw.init(self._parameters)

        @partial(self._jax.jit, donate_argnums=(0, 1))
        def update(parameters: Any, state: Any, gradients: Any) -> Any:
            self._traced += 1
            changes, state = adamw.update(gradients, state, parameters)
            return optax.apply_updates(parameters, changes), state

        self._update = update

    def update(self) -> None:
        new = self._update(self._parameters, self._state, self._gradients)
        self._parameters, self._state = self._jax.block_until_ready(new)

    @property
    def traces(self) -> int | None:
        return self._traced

    def state_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in self._jax.tree_util.tree_leaves(self._state) if leaf.size > 1)

    def named_parameters(self) -> Tree:
        return {name: mx.array(np.asarray(p.astype("float32"))) for name, p in self._parameters.items()}
