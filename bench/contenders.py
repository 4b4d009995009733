"""What is compared: each contender has parameters, gradients and state of its own and does one AdamW update when asked.

All have the same constants and bias correction, are given the same gradients, and have done an update when parameters
and state are both computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, cast

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from compiled_adam.step.apply_packed import PackedTrees
from compiled_adam.update.moments import POLICIES

from .environment import cores

Tree = dict[str, mx.array]
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.01
SAME = (
    f"all: AdamW, lr {LEARNING_RATE:g}, betas {BETAS[0]:g} and {BETAS[1]:g}, eps {EPS:g}, weight decay"
    f" {WEIGHT_DECAY:g}, with bias correction; same gradients; an update ends when parameters and state are computed"
)


class Contender(Protocol):
    def update(self) -> None:
        """One update; everything it changes has been computed when it returns."""

    @property
    def traces(self) -> int | None:
        """How often the Python of the update was traced so far; None where nothing is."""

    def state_bytes(self) -> int:
        """What the optimizer keeps for the parameters, a few scalars aside."""

    def named_parameters(self) -> Tree:
        """As they are after the last update."""


class OnMLX(ABC):
    """A contender on MLX. If it is ``lazy``, `build` makes a graph that is computed later."""

    lazy = True

    def __init__(self, optimizer: optim.Optimizer, parameters: Tree, gradients: Tree) -> None:
        self.tree, self.optimizer, self.gradients = {"parameters": parameters}, optimizer, gradients
        optimizer.init(parameters)

    @abstractmethod
    def build(self) -> None:
        """One update, not yet computed if `lazy`."""

    def changed(self) -> list[mx.array]:
        """Everything an update changes: parameters and state."""
        return [*self.tree["parameters"].values(), *_leaves(self.optimizer.state)]

    def update(self) -> None:
        self.build()
        mx.eval(self.changed())

    def named_parameters(self) -> Tree:
        return self.tree["parameters"]

    @property
    def traces(self) -> int | None:
        return None

    def state_bytes(self) -> int:
        return sum(array.nbytes for state in self.optimizer.state.values() for array in _of_parameter(state))


class Eager(OnMLX):
    """An optimizer called as in an uncompiled training loop; ours compiles its update itself."""

    def build(self) -> None:
        self.tree["parameters"] = self.optimizer.apply_gradients(self.gradients, self.tree["parameters"])

    @property
    def traces(self) -> int | None:
        return self.optimizer.traces if isinstance(self.optimizer, ca.Adam) else None


class Compiled(OnMLX):
    """An optimizer under ``mx.compile`` with captured state, as MLX's documentation and mlx-lm do it."""

    def __init__(self, optimizer: optim.Optimizer, parameters: Tree, gradients: Tree) -> None:
        super().__init__(optimizer, parameters, gradients)
        self._traced = 0
        state = [self.tree, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def update(gradients: Tree) -> None:
            self._traced += 1
            self.tree["parameters"] = optimizer.apply_gradients(gradients, self.tree["parameters"])

        self._update = update

    def build(self) -> None:
        self._update(self.gradients)

    @property
    def traces(self) -> int | None:
        return self._traced


class InStep(OnMLX):
    """`ca.make_step` as users call it, with its norm, batch and result, but with gradients that cost nothing."""

    optimizer: ca.Adam
    lazy = False

    def __init__(self, optimizer: ca.Adam, parameters: Tree, gradients: Tree) -> None:
        super().__init__(optimizer, parameters, gradients)
        self.model = nn.Module()
        dict.update(self.model, parameters)
        self.tree["parameters"] = cast(Tree, self.model)

        @mx.custom_function
        def free(parameters: Tree) -> mx.array:
            return mx.array(0.0)

        @free.vjp
        def backward(parameters: Tree, cotangent: mx.array, output: mx.array) -> Tree:
            return gradients

        self.step = ca.make_step(self.model, lambda model: free(dict(model)), optimizer)

    def build(self) -> None:
        self.step()

    def changed(self) -> list[mx.array]:
        # Not `optimizer.state`: a loop of training does not ask for the moments of packed parameters either.
        states, scalars = cast(PackedTrees, self.step._bound.trees).state()
        return [*self.tree["parameters"].values(), *(a for state in (*states, scalars) for a in state.values())]

    def named_parameters(self) -> Tree:
        return dict(self.model)

    @property
    def traces(self) -> int:
        return self.step.traces["update"]


def _of_parameter(state: Any) -> list[mx.array]:
    return list(state.values()) if isinstance(state, dict) else []


def _leaves(state: dict) -> list[mx.array]:
    return [leaf for value in state.values() for leaf in (value.values() if isinstance(value, dict) else [value])]


class Torch:
    """``torch.optim.AdamW`` on the CPU as one fused C++ loop. Imported by name: PyTorch need not be installed."""

    traces = None

    def __init__(self, parameters: Tree, gradients: Tree) -> None:
        torch, numpy = import_module("torch"), import_module("numpy")
        torch.set_num_threads(cores())

        def moved(array: mx.array) -> Any:
            dtype = getattr(torch, str(array.dtype).removeprefix("mlx.core."))
            return torch.from_numpy(numpy.array(array.astype(mx.float32))).to(dtype)  # NumPy has no bfloat16

        self._parameters = {name: torch.nn.Parameter(moved(array)) for name, array in parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.grad = moved(gradients[name])
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, fused=True
        )

    def update(self) -> None:
        self._optimizer.step()

    def state_bytes(self) -> int:
        states = self._optimizer.state.values()
        return sum(t.numel() * t.element_size() for state in states for t in state.values() if t.numel() > 1)

    def named_parameters(self) -> Tree:
        return {name: mx.array(p.detach().float().numpy()) for name, p in self._parameters.items()}


Make = Callable[[Tree, Tree], Contender]  # of parameters that become the contender's, and gradients
NOT_MEASURED = "skipped"  # the key, in a row of figures, of why there are none


class Unavailable(Exception):
    """A framework is installed, but cannot make this contender; says why."""


class Entry(NamedTuple):
    make: Make
    needs: tuple[str, ...] = ()  # modules that must be importable
    half_only: bool = False  # for half-precision parameters only; on others it is what another entry is

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        absent = [name for name in self.needs if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None


def _stock() -> optim.Optimizer:
    return optim.AdamW(LEARNING_RATE, list(BETAS), EPS, WEIGHT_DECAY, bias_correction=True)


def _ours(
    moments: str = "float32", compensated: bool = True, kind: type[OnMLX] = Eager, lowering: str = "auto"
) -> Entry:
    def make(parameters: Tree, gradients: Tree) -> Contender:
        optimizer = ca.AdamW(
            LEARNING_RATE,
            BETAS,
            EPS,
            WEIGHT_DECAY,
            bias_correction=True,
            moments=moments,
            compensated=compensated,
            lowering=lowering,
        )
        return kind(optimizer, parameters, gradients)

    return Entry(make, half_only=not compensated)


def _torch(parameters: Tree, gradients: Tree) -> Contender:
    try:
        return Torch(parameters, gradients)
    except Exception as error:  # a library it needs is not there, its version is too old: anything, and not ours
        reason = str(error).partition("\n")[0]
        raise Unavailable(f"torch fails: {type(error).__name__}: {reason}") from error


EAGER, COMPILED, OURS, STEP = DEFAULT = "mlx eager", "mlx compiled", "compiled_adam", "compiled_adam step"
REFERENCES = (EAGER, COMPILED)  # ratios are to these; always measured
TORCH = "torch fused"
CONTENDERS: dict[str, Entry] = {
    EAGER: Entry(lambda parameters, gradients: Eager(_stock(), parameters, gradients)),
    COMPILED: Entry(lambda parameters, gradients: Compiled(_stock(), parameters, gradients)),
    OURS: _ours(),
    STEP: _ours(kind=InStep),
    f"{STEP} inplace": _ours(kind=InStep, lowering="inplace"),
    **{f"{OURS} {policy}": _ours(policy) for policy in POLICIES if policy != "float32"},
    f"{OURS} uncompensated": _ours(compensated=False),
    TORCH: Entry(_torch, needs=("torch", "numpy")),
}


def selected(names: list[str], dtype: mx.Dtype) -> tuple[dict[str, Make], dict[str, str]]:
    """The contenders of these names for parameters of a dtype, and for those that are left out: why."""
    chosen: dict[str, Make] = {}
    left_out: dict[str, str] = {}
    for name in names:
        entry = CONTENDERS[name]
        if why := entry.missing():
            left_out[name] = why
        elif entry.half_only and dtype == mx.float32:
            left_out[name] = "float32 needs no compensation"
        else:
            chosen[name] = entry.make
    return chosen, left_out


def named(names: list[str] | None, default: tuple[str, ...] = DEFAULT) -> list[str]:
    """The contenders that ``--contender`` asks for, in the order of `CONTENDERS`, the references among them."""
    if names and "all" in names:
        return list(CONTENDERS)
    wanted = {*REFERENCES, *(names or default)}
    return [name for name in CONTENDERS if name in wanted]
