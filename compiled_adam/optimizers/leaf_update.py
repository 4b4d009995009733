"""The update of the leaves (parameter arrays) of an `Adam`; `Adam`, train steps and shards build graphs from it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from ..base import Compiled
from ..update import (
    STOCHASTIC,
    TINY,
    Constants,
    DecayFilter,
    Form,
    Group,
    Leaf,
    Part,
    Patterns,
    Stored,
    apart,
    check_leaf,
    flat,
    global_norm,
    group,
    of_leaves,
    packs,
    update,
)
from .options import scheduled

MOST_SUBSETS = 16  # how many subsets of the parameters keep a compiled update
MOST_TRACES = 64  # how many traces each compiled update keeps


class Options(NamedTuple):
    """The keyword options that MLX's Adam lacks. They never change after construction."""

    moments: str
    compensated: bool
    max_grad_norm: float | None
    skip_nonfinite: bool
    patterns: Patterns
    lowering: str
    decay_filter: DecayFilter | None = None

    @property
    def needs_norm(self) -> bool:
        """Whether an update computes the global norm."""
        return self.skip_nonfinite or self.max_grad_norm is not None

    @property
    def needs_all(self) -> bool:
        """Whether the update of one parameter needs its path or the other gradients."""
        by_path = any(self.patterns.values()) or self.decay_filter is not None
        return self.needs_norm or by_path or self.moments in STOCHASTIC

    def form(self, parameter: mx.array) -> Form:
        """How the state of a parameter is stored."""
        return Form.of(parameter, self.moments, self.compensated)

    def scalars(self) -> Stored:
        """The initial scalars of the state except ``step`` and ``learning_rate``."""
        found: Stored = {"rounding_key": mx.random.key(0)} if self.moments in STOCHASTIC else {}
        return found | ({"grad_norm": mx.array(0.0), "skipped": mx.array(0, mx.int32)} if self.needs_norm else {})


class Numbers(Protocol):
    """The attributes of an `Adam` that a user may change, so every update reads them anew."""

    betas: Any
    eps: float
    bias_correction: bool
    weight_decay: float
    _schedulers: dict[str, Callable[[mx.array], Any]]


class LeafUpdate:
    """The update of lists of parameters and states, and of the scalars of the state.

    ``traces`` counts how often the Python code of the update ran.
    """

    def __init__(self, optimizer: Numbers, options: Options) -> None:
        self._optimizer, self.options = optimizer, options
        self.traces = 0
        self._groups: dict[str, Group] = {}
        self._join = True
        self._compiled: OrderedDict[tuple[str, ...], Compiled] = OrderedDict()

    def group(self, path: str, parameter: mx.array) -> Group:
        """The group of a parameter: all its members use the same coefficients. It is found once for each path."""
        if path not in self._groups:
            self._groups[path] = group(path, parameter, self.options.decay_filter, self.options.patterns)
        return self._groups[path]

    def group_and_form(self, path: str, parameter: mx.array) -> tuple[Group, Form]:
        """The group and the form of storage. With the dtype they decide how a parameter is updated."""
        return self.group(path, parameter), self.options.form(parameter)

    def decays(self) -> str:
        """The number of parameters that have weight decay, and a digest of their paths."""
        decaying = sorted(path for path, its in self._groups.items() if its.weight_decay != 0)
        return f"{len(decaying)} parameters, {hashlib.sha256(repr(decaying).encode()).hexdigest()[:8]}"

    def streams(self, sizes: list[int]) -> list[mx.Stream]:
        """The stream on which `traced` will update each parameter of these sizes."""
        return [how.stream for how in of_leaves(self.options.lowering, sizes)]

    def scheduled(self, step: mx.array) -> Stored:
        """The learning rate of this step, if it comes from a schedule."""
        return {name: scheduled(name, f, step) for name, f in self._optimizer._schedulers.items()}

    def constants(self) -> Constants:
        # They are arguments of the compiled update, so a change takes effect. Attributes would stay in the trace.
        its = self._optimizer
        b1, b2 = map(float, its.betas)
        return Constants(
            (b1, b2),
            float(its.eps),
            bool(its.bias_correction),
            float(its.weight_decay),
            self.options.max_grad_norm,
            self.options.skip_nonfinite,
            self.options.lowering,
        )

    def compiled(self, paths: tuple[str, ...]) -> Compiled:
        """`joined`, compiled for parameters with these paths. The least recently used function is dropped first."""
        found = self._compiled.get(paths)
        if found is None:
            while len(self._compiled) >= MOST_SUBSETS:
                self._compiled.popitem(last=False)
            found = self._compiled[paths] = Compiled(partial(self.joined, paths), MOST_TRACES)
        self._compiled.move_to_end(paths)
        return found

    def join_none(self) -> None:
        """From now on no leaves are joined. Joined leaves are large enough for other kernels, with other last bits.

        Several workers need the same bits from a part of the leaves, which shards the state, and from all of them.
        """
        self._join = False
        self._compiled.clear()

    def joined(
        self,
        paths: tuple[str, ...],
        gradients: list[mx.array],
        parameters: list[mx.array],
        states: list[Stored],
        scalars: Stored,
        constants: tuple[Any, ...],
        part: tuple[Any, ...] | None = None,
    ) -> tuple[list[mx.array], list[Stored], Stored]:
        """`traced`, with small leaves joined for the update, and cut apart again.

        A half-precision leaf takes three tasks of MLX's CPU backend, and more time than to copy it. A float32 leaf
        takes one task, and less time than to copy it if it has more than `TINY` elements.
        """
        leaves = [Leaf.of(p, *self.group_and_form(path, p)) for path, p in zip(paths, parameters, strict=True)]
        small = [i for i, leaf in enumerate(leaves) if leaf.form.compensated or leaf.size <= TINY]
        rows = [tuple(small[i] for i in row) for row in packs([leaves[i] for i in small])]
        if (
            not rows
            or not self._join
            or part is not None
            or self.options.lowering != "auto"
            or mx.default_device().type != mx.DeviceType.cpu
        ):
            return self.traced(paths, gradients, parameters, states, scalars, constants, part)
        for leaf in zip(paths, gradients, parameters, states, [leaf.form for leaf in leaves], strict=True):
            check_leaf(*leaf)
        # Of the leaves, so that the norm is the same to the last bit as that of a part and of the others.
        norm = (
            global_norm(gradients, self.streams([p.size for p in parameters]))
            if self.options.needs_norm
            else mx.array(0.0)
        )
        alone = set(range(len(paths))).difference(*rows)
        rows += [(i,) for i in sorted(alone)]
        new, stored, scalars = self.traced(
            tuple(paths[row[0]] for row in rows),
            [flat([gradients[i] for i in row]) for row in rows],
            [flat([parameters[i] for i in row]) for row in rows],
            [{name: flat([states[i][name] for i in row]) for name in leaves[row[0]].form.names} for row in rows],
            scalars,
            constants,
            Part(norm, tuple(row[0] for row in rows), len(paths)),
        )
        updated, kept = list(parameters), [dict(state) for state in states]
        for row, weights, state in zip(rows, new, stored, strict=True):
            shapes = [parameters[i].shape for i in row]
            for i, weight in zip(row, apart(weights, shapes), strict=True):
                updated[i] = weight
            for name, array in state.items():
                for i, its in zip(row, apart(array, shapes), strict=True):
                    kept[i][name] = its
        return updated, kept, scalars

    def traced(
        self,
        paths: tuple[str, ...],
        gradients: list[mx.array],
        parameters: list[mx.array],
        states: list[Stored],
        scalars: Stored,
        constants: tuple[Any, ...],
        part: tuple[Any, ...] | None = None,
        weight: mx.array | None = None,
        measured: bool = False,
    ) -> tuple[list[mx.array], list[Stored], Stored]:
        """`update` of leaves. It finds the groups and forms of storage, once per trace.

        A leaf may pack several parameters of the same group and form. The path is then the path of any of them.
        """
        self.traces += 1
        forms = [self.options.form(p) for p in parameters]
        for leaf in zip(paths, gradients, parameters, states, forms, strict=True):
            check_leaf(*leaf)
        groups = [self.group(path, p) for path, p in zip(paths, parameters, strict=True)]
        numbers = Constants(*constants)
        common = Part(*part) if part else None
        return update(gradients, parameters, states, scalars, groups, forms, numbers, common, weight, measured)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions can be neither copied nor pickled; a copy traces its own.
        return {**self.__dict__, "_compiled": OrderedDict()}
