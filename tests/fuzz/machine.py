"""A train step and what people do with it between its calls, against a reference in float64.

Each rule is one operation. After each: weights, counters and results are what the reference says; and where an
operation is refused, raises or does not train, everything is bit for bit as it was.
"""

from __future__ import annotations

import collections
import copy
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from compiled_adam.base.errors import InputError
from compiled_adam.optimizers import any_optimizer
from compiled_adam.step import apply_packed
from compiled_adam.update import moments, packing, residual
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlx.utils import tree_flatten, tree_map

from tests.fuzz import eager, models
from tests.fuzz.shadow import ULP, Numbers, Options, Shadow
from tests.interrupts import bytecodes, interrupted

RAN: collections.Counter[str] = collections.Counter()  # how often each operation ran
INTERRUPTED: collections.Counter[str] = collections.Counter()  # and which state an interrupt left
SKIPPED = set(filter(None, os.environ.get("FUZZ_SKIP", "").split(",")))  # rules to leave out
# The rounding of a gradient in another graph, of the largest of all gradients.
GRADIENT = {"float32": 3e-5, "bfloat16": 2.0**-5, "float16": 2.0**-8}
LOSS = {"float32": 1e-5, "bfloat16": 2.0**-5, "float16": 2.0**-8}

Snapshot = dict[str, tuple[str, tuple[int, ...], bytes]]

shapes = st.builds(
    models.Shape,
    st.lists(st.sampled_from(models.BLOCKS), min_size=1, max_size=3).map(tuple),
    st.sampled_from([6, 6, 6, 182]),  # 182 squared: an array that is updated in place, on two threads
    st.sampled_from(["bfloat16", "float32", "float16"]),
)
ours = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["ours Adam", "ours AdamW"]),
        "moments": st.sampled_from(["float32", "float32", "bfloat16", "8bit", "param"]),
        "compensated": st.sampled_from([True, True, False]),
        "max_grad_norm": st.sampled_from([None, 0.5]),
        "skip_nonfinite": st.booleans(),
        "multipliers": st.booleans(),
        "groups": st.booleans(),
        "decay_filter": st.booleans(),
        "schedule": st.booleans(),
        "small": st.sampled_from([packing.SMALL, 8]),  # 8: large leaves stand beside packed ones
        "lowering": st.sampled_from(["auto", "fused", "inplace"]),
        "bias_correction": st.booleans(),
        "betas": st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.0, 0.9)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
    }
)
theirs = st.fixed_dictionaries({"name": st.sampled_from(eager.ALONE)})
wrapped = st.fixed_dictionaries(
    {
        "name": st.sampled_from(eager.COMPENSATED),
        "compensated": st.just(True),
        "max_grad_norm": st.sampled_from([None, 0.5]),
        "skip_nonfinite": st.booleans(),
    }
)
# Two that overlap with `multipliers`, of which one sets another number of the same parameter.
GROUPS: dict[str, dict[str, Any]] = {
    "^first.weight": {"betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.5},
    "^last.weight": {"learning_rate": 0.25, "betas": (0.0, 0.99)},
}
seeds = st.integers(0, 10_000)
rows = st.sampled_from([2, 3, 5])
looks = st.sampled_from(["each time", "at the end", "never"])


def allowed(name: str) -> Callable[[Any], Any]:
    return precondition(lambda self: name not in SKIPPED and self.step is not None)


class TrainStepMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.step: ca.TrainStep | None = None
        self.folder = Path(tempfile.mkdtemp())
        self.results: list[tuple[Any, float]] = []  # results of before, and the losses that they had

    def teardown(self) -> None:
        shutil.rmtree(self.folder)
        apply_packed.packs = packing.packs

    # What there is.

    @initialize(
        shape=shapes,
        options=st.one_of(ours, ours, ours, theirs, wrapped),
        accumulate=st.sampled_from([1, 1, 2, 3]),
        weighted=st.booleans(),
        max_traces=st.sampled_from([1, 2, 64]),
    )
    def begin(
        self, shape: models.Shape, options: dict[str, Any], accumulate: int, weighted: bool, max_traces: int
    ) -> None:
        self.is_ours = options["name"].startswith("ours")
        apply_packed.packs = lambda leaves, small: packing.packs(leaves, options.get("small", small))
        if not self.is_ours:
            # The reference cannot tell shared parameters apart, nor MLX's MultiOptimizer keys of digits from a list.
            without = {"shared"} | ({"digits"} if " and " in options["name"] else set())
            shape = shape._replace(blocks=tuple(b for b in shape.blocks if b not in without))
            if not options.get("compensated"):
                shape = shape._replace(dtype="float32")
            if "Muon" in options["name"]:  # a quarter of a second each time; only ours are updated in place
                shape = shape._replace(width=6)
        if options.get("lowering") == "inplace" and options["moments"] in moments.STOCHASTIC:
            options = {**options, "lowering": "auto"}
        self.shape, self.options, self.accumulate, self.weighted = shape, options, accumulate, weighted
        self.max_traces = max_traces
        self.model, self.twin = models.build(shape), models.build(shape)
        self.loss_fn = models.loss_fn if weighted else models.mean_loss
        self.optimizer = self._optimizer()
        self.step = self._step(self.model, self.optimizer)
        self.rate_is_scheduled = options.get("schedule", False)
        reference = self._reference_options(), accumulate
        if self.is_ours:
            self.shadow = Shadow(self._weights(), shape.dtype, *reference)
        else:
            self.shadow = eager.Eager(self._weights(), shape.dtype, *reference, options["name"], self._trees)
        self.start = tree_map(lambda a: mx.array(a), self.model.parameters())
        RAN[
            "begin with "
            + (
                "groups"
                if options.get("groups")
                else "ours"
                if self.is_ours
                else "Compensated"
                if options.get("compensated")
                else "theirs"
            )
        ] += 1

    def _optimizer(self) -> Any:
        o = self.options
        if not self.is_ours:
            made = eager.MAKE[o["name"]]()
            if not o.get("compensated"):
                return made
            return ca.Compensated(made, max_grad_norm=o["max_grad_norm"], skip_nonfinite=o["skip_nonfinite"])
        rate = ca.schedulers.linear(2e-2, 20, end=1e-3, warmup=3) if o["schedule"] else 1e-2
        keywords: dict[str, Any] = {
            "betas": o["betas"],
            "eps": o["eps"],
            "bias_correction": o["bias_correction"],
            "moments": o["moments"],
            "compensated": o["compensated"],
            "max_grad_norm": o["max_grad_norm"],
            "skip_nonfinite": o["skip_nonfinite"],
            "learning_rate_multipliers": {"^first": 2.0, "last.bias": 0.5} if o["multipliers"] else None,
            "lowering": o["lowering"],
        }
        if o["groups"]:
            keywords["groups"] = self._groups()
        if o["name"] == "ours Adam":
            return ca.Adam(rate, **keywords)
        decay_filter = ca.decay_matrices if o["decay_filter"] else None
        return ca.AdamW(rate, weight_decay=0.1, decay_filter=decay_filter, **keywords)

    def _groups(self) -> dict[str, dict[str, Any]]:
        without = {"weight_decay"} if self.options["name"] == "ours Adam" else set()
        return {pattern: {k: x for k, x in its.items() if k not in without} for pattern, its in GROUPS.items()}

    def _reference_options(self) -> Options:
        o = collections.defaultdict(bool, self.options)
        schedule = ca.schedulers.linear(2e-2, 20, end=1e-3, warmup=3)

        def numbers(path: str, parameter: np.ndarray) -> Numbers:
            decays = o["name"] == "ours AdamW" and (not o["decay_filter"] or parameter.ndim >= 2)
            found = {"factor": 1.0, "betas": o["betas"], "eps": o["eps"], "weight_decay": 0.1 if decays else 0.0}
            if o["multipliers"]:
                found["factor"] = 2.0 if path.startswith("first") else 0.5 if path == "last.bias" else 1.0
            for pattern, own in self._groups().items() if o["groups"] else ():
                if re.search(pattern, path):
                    found |= {{"learning_rate": "factor"}.get(name, name): number for name, number in own.items()}
            return Numbers(**found)

        return Options(
            (lambda i: float(schedule(mx.array(i)))) if o["schedule"] else 1e-2,
            o["bias_correction"],
            o["moments"],
            o["compensated"],
            o["max_grad_norm"] or None,
            o["skip_nonfinite"],
            numbers,
        )

    def _step(self, model: nn.Module, optimizer: Any) -> ca.TrainStep:
        return ca.make_step(
            model,
            self.loss_fn,
            optimizer,
            accumulate=self.accumulate,
            weighted=self.weighted,
            max_traces=self.max_traces,
        )

    # Reading.

    def _weights(self) -> dict[str, np.ndarray]:
        found = {}
        seen = set()
        for path, (container, key) in models.places(self.model).items():
            if (id(container), key) not in seen:
                seen.add((id(container), key))
                found[path] = np.array(container[key].astype(mx.float32), np.float64)
        return found

    def _trees(self) -> Any:
        return self.model.trainable_parameters(), self.optimizer.state

    def _snapshot(self) -> Snapshot:
        """Everything, bit for bit."""
        state: dict[str, Any] = {**self.step.state_dict(), "all": dict(tree_flatten(self.model.parameters()))}
        arrays = {f"{part}.{path}": a for part, those in state.items() for path, a in those.items()}
        mx.eval(arrays)
        # Views of nothing but bytes: an array that was kept would not be overwritten in place.
        return {n: (str(a.dtype), a.shape, bytes(memoryview(a.reshape(-1).view(mx.uint8)))) for n, a in arrays.items()}

    def _gradient(self, batch: models.Batch) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float, float]:
        """By an eager call of a twin: gradients, their error bounds, the weight and the loss."""
        self.twin.update(self.model.parameters())
        self.twin.train(self.model.training)
        weight = models.loss_fn(self.twin, *batch)[1].item() if self.weighted else 1.0
        self.twin.update(self.model.parameters())  # normalisation has counted that batch
        loss, gradients = nn.value_and_grad(self.twin, models.mean_loss)(self.twin, *batch)
        summed: dict[tuple[int, Any], np.ndarray] = {}
        paths: dict[tuple[int, Any], str] = {}
        flat = dict(tree_flatten(gradients))
        for path, (container, key) in models.places(self.twin).items():
            place = id(container), key
            paths.setdefault(place, path)
            summed[place] = summed.get(place, 0.0) + np.array(flat[path].astype(mx.float32), np.float64)
        found = {paths[place]: g for place, g in summed.items()}
        largest = max(np.abs(g).max(initial=0.0) for g in found.values())
        normalised = any("norm" in block for block in self.shape.blocks)  # it makes small differences large
        bound = GRADIENT[self.shape.dtype] * largest * (8 if normalised else 1) + 1e-7
        return found, {path: np.full_like(g, bound) for path, g in found.items()}, weight, loss.item()

    def _compare_buffers(self) -> None:
        """What the forward pass assigns is as after the twin's."""
        trained = models.places(self.model).keys()
        there = dict(tree_flatten(self.twin.parameters()))
        for path, array in tree_flatten(self.model.parameters()):
            if path not in trained:
                tolerance = {"float32": 1e-5}.get(self.shape.dtype, 4 * ULP[self.shape.dtype])
                found, expected = (np.array(a.astype(mx.float32)) for a in (array, there[path]))
                np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=path)

    def _check(self, result: ca.StepResult, expected: bool, loss: float) -> None:
        assert result.updated == expected
        found = result.loss.item()
        assert abs(found - loss) <= LOSS[self.shape.dtype] * (abs(loss) + 1), (found, loss)
        if expected:
            norm, bound = self.shadow.norm
            assert result.grad_norm is not None
            assert not np.isfinite(norm) or abs(result.grad_norm.item() - norm) <= bound + 1e-6, (result, norm, bound)
        self.results = [*self.results[-3:], (result, found)]
        self._check_state()

    def _check_state(self) -> None:
        for part in any_optimizer.parts(self.optimizer):
            assert part.step.item() == self.shadow.step
        for count in any_optimizer.skipped(self.optimizer):
            assert count.item() == self.shadow.skipped
        self.shadow.compare_weights(self._weights())

    def _look(self) -> None:
        """Moments and residuals too."""
        if not self.is_ours:
            self.shadow.look()
            return
        state, weights = self.step.state_dict()["optimizer"], dict(tree_flatten(self.model.parameters()))
        m, v, values = {}, {}, {}
        for path in self.shadow.p:
            own = {
                name: state[f"{path}.{name}"] for name in ("m", "v", "m_scale", "v_scale") if f"{path}.{name}" in state
            }
            m[path], v[path] = (np.array(a, np.float64) for a in moments.decode(own))
            rest = state.get(f"{path}.residual")
            value = weights[path].astype(mx.float32) if rest is None else residual.join(weights[path], rest)
            values[path] = np.array(value, np.float64)
        self.shadow.compare_state(m, v, values)

    def _call(self, *batch: Any, **keywords: Any) -> ca.StepResult:
        return self.step(*batch, **keywords)

    def _train(self, batch: models.Batch, call: Callable[..., ca.StepResult]) -> None:
        gradients, errors, weight, loss = self._gradient(batch)
        if not all(np.isfinite(g).all() for g in gradients.values()):
            return  # float16 has overflown, as it does with a normalisation of equal numbers
        updated = self.shadow.batch(gradients, errors, weight, loss)  # of what there is before the call
        self._check(call(*batch), updated, loss)
        self._compare_buffers()

    def _different(self, before: Snapshot) -> list[str]:
        """What is not as it was. That a trace has found out what the forward pass assigns is no change of it."""
        after = self._snapshot()
        found = [name for name in after.keys() - before.keys() if not name.startswith("model.")]
        return [*found, *(name for name, array in before.items() if after.get(name) != array)]

    def _unchanged(self, before: Snapshot) -> None:
        assert self._different(before) == []
        self._check_state()

    # Training.

    @allowed("batches")
    @rule(batches=st.lists(st.tuples(seeds, rows), min_size=1, max_size=5), flush=st.booleans(), look=looks)
    def batches(self, batches: list[tuple[int, int]], flush: bool, look: str) -> None:
        """Several, since what a step keeps to itself is put into the optimizer's state when somebody looks."""
        for seed, count in batches:
            RAN["train"] += 1
            self._train(models.batch(self.shape, seed, count), self._call)
            if look == "each time":
                RAN["look"] += 1
                self._look()
        if flush and "flush" not in SKIPPED:
            self._flush()
        if look == "at the end":
            RAN["look"] += 1
            self._look()

    @allowed("thread")
    @rule(seed=seeds)
    def thread(self, seed: int) -> None:
        RAN["thread"] += 1
        mx.eval(self.model.parameters())  # what somebody has edited here, no other thread could evaluate
        results: list[Any] = []

        def call(*batch: Any) -> ca.StepResult:
            def work() -> None:
                try:
                    results.append(self._call(*batch))
                    mx.eval(results[0].loss)
                except BaseException as error:
                    results.append(error)

            worker = threading.Thread(target=work)
            worker.start()
            worker.join()
            if isinstance(results[-1], BaseException):
                raise results[-1]
            return results[0]

        self._train(models.batch(self.shape, seed, 3), call)

    def _flush(self) -> None:
        RAN["flush"] += 1
        if not self.shadow.filled:
            assert self.step.flush() is None
            return
        loss = self.shadow.loss / (self.shadow.weight or 1.0)
        empty = self.shadow.weight == 0
        self.shadow.flush()
        result = self.step.flush()
        assert result is not None
        if empty:
            assert result.updated
            self._check_state()
        else:
            self._check(result, True, loss)

    @allowed("nan")
    @precondition(lambda self: self.step is not None and self.options.get("skip_nonfinite") and self.accumulate == 1)
    @precondition(lambda self: "batch norm" not in self.shape.blocks)  # what it counts is lost, with the guard too
    @rule(seed=seeds)
    def nan(self, seed: int) -> None:
        RAN["nan"] += 1
        before = self._snapshot()
        result = self._call(*models.batch(self.shape, seed, 3, "nan"))
        assert result.updated and not np.isfinite(result.loss.item())
        self.shadow.skipped += 1
        counted = {"skipped", "_skipped", "grad_norm", "_grad_norm", "learning_rate"}
        assert {name.rpartition(".")[2] for name in self._different(before)} <= counted
        self._check_state()

    @allowed("empty")
    @precondition(lambda self: self.step is not None and self.weighted and "batch norm" not in self.shape.blocks)
    @rule(seed=seeds)
    def empty(self, seed: int) -> None:
        RAN["empty"] += 1
        gradients, errors, *_ = self._gradient(models.batch(self.shape, seed, 2))
        updated = self.shadow.batch(gradients, errors, 0.0, 0.0)
        result = self._call(*models.batch(self.shape, seed, 2, "empty"))
        assert result.updated == updated
        self._check_state()

    # What raises, what people do between the calls, and how a run goes on elsewhere: by name, for FUZZ_SKIP.

    def _one_of(self, names: tuple[str, ...], choice: int, seed: int) -> None:
        if (name := names[choice % len(names)]) not in SKIPPED:
            getattr(self, f"_{name}")(seed)
            self._go_on(seed)

    def _go_on(self, seed: int) -> None:
        """Training after it, sometimes, and a look, sometimes before that."""
        for i in range(seed % 3):
            if (seed + i) % 2:
                RAN["look"] += 1
                self._look()
            RAN["train"] += 1
            self._train(models.batch(self.shape, seed + i, 3), self._call)

    @allowed("refused")
    @rule(choice=st.integers(0, 11), seed=seeds)
    def refused(self, choice: int, seed: int) -> None:
        self._one_of(("fails", "foreign", "frozen", "set_dtype"), choice, seed)

    @allowed("between")
    @rule(choice=st.integers(0, 11), seed=seeds)
    def between(self, choice: int, seed: int) -> None:
        self._one_of(("mode", "evaluate", "load_weights"), choice, seed)

    @allowed("elsewhere")
    @rule(choice=st.integers(0, 11), seed=seeds)
    def elsewhere(self, choice: int, seed: int) -> None:
        self._one_of(("checkpoint", "state_dict", "deepcopy"), choice, seed)

    def _fails(self, seed: int) -> None:
        RAN["fails"] += 1
        text = ["a", "b"][seed % 2]
        before = self._snapshot()
        try:
            self._call(*models.batch(self.shape, seed, 3), fail=text)
        except RuntimeError as error:
            assert str(error) == text
        else:
            raise AssertionError("an error of the loss was lost")
        self._unchanged(before)

    def _foreign(self, seed: int) -> None:
        RAN["foreign"] += 1
        before = self._snapshot()
        batch = models.foreign(models.batch(self.shape, seed, 3))
        try:
            self._call(*batch)
        except RuntimeError:
            self._unchanged(before)
        else:
            raise AssertionError("a batch that cannot be evaluated was trained on")

    @allowed("interrupt")
    @rule(seed=seeds, rows=rows, part=st.integers(0, 1150), traced=st.booleans())
    def interrupt(self, seed: int, rows: int, part: int, traced: bool) -> None:
        """Before a bytecode of a call like the one before; or, perhaps, of one that traces."""
        RAN["interrupt"] += 1
        at = 1 + part * 20
        if not traced:
            counts = [0]

            def counted(*batch: Any) -> ca.StepResult:
                results: list[ca.StepResult] = []
                counts.append(bytecodes(lambda: results.append(self._call(*batch))))
                return results[0]

            self._train(models.batch(self.shape, seed, rows), counted)
            at = 1 + part * counts[-1] // 1000
        before, shadow = self._snapshot(), copy.copy(self.shadow)
        kept = copy.deepcopy({n: x for n, x in vars(shadow).items() if n not in ("options", "read", "name")})
        batch = models.batch(self.shape, seed, rows)
        gradients, errors, weight, loss = self._gradient(batch)
        if not all(np.isfinite(g).all() for g in gradients.values()):
            return
        updated = self.shadow.batch(gradients, errors, weight, loss)
        results: list[ca.StepResult] = []
        if interrupted(lambda: results.append(self._call(*batch)), at):
            which = "after" if self._different(before) else "before"
            INTERRUPTED[which] += 1
            if which == "before":
                vars(self.shadow).update(kept)
            self._check_state()  # or after it
            self._look()
            self._go_on(seed)
            return
        self._check(results[0], updated, loss)

    def _frozen(self, seed: int) -> None:
        RAN["frozen"] += 1
        before = self._snapshot()
        self.model.last.freeze(recurse=False)
        try:
            self._call(*models.batch(self.shape, seed, 3))
        except InputError as error:
            assert "last.weight" in str(error)
        else:
            raise AssertionError("a frozen layer was not noticed")
        finally:
            self.model.last.unfreeze(recurse=False)
        self._unchanged(before)

    def _mode(self, seed: int) -> None:
        RAN["mode"] += 1
        self.model.train(seed % 2 == 0)

    def _evaluate(self, seed: int) -> None:
        RAN["evaluate"] += 1
        what = ("first", "blocks", "optimizer", "all", "result")[seed % 5]
        everything = self.model.parameters()
        mx.eval(
            {"optimizer": self.optimizer.state, "all": everything, "result": [r.loss for r, _ in self.results]}.get(
                what, everything.get(what, {})
            )
        )
        self._check_state()

    @allowed("edit")
    @rule(
        how=st.sampled_from(["zero", "mask", "clamp", "scale", "add in place", "set in place"]),
        which=st.sampled_from(["first.weight", "first.bias", "last.weight", "all"]),
        seed=seeds,
    )
    def edit(self, how: str, which: str, seed: int) -> None:
        RAN["edit"] += 1
        seen = set()
        for path, (container, key) in models.places(self.model).items():
            if which not in ("all", path) or (id(container), key) in seen:
                continue
            seen.add((id(container), key))
            w = container[key]
            if how == "zero":
                container[key] = mx.zeros_like(w)
            elif how == "mask":
                container[key] = w * (mx.arange(w.size).reshape(w.shape) % 2).astype(w.dtype)
            elif how == "clamp":
                container[key] = mx.clip(w, -0.1, 0.1)
            elif how == "scale":
                container[key] = (w.astype(mx.float32) * 0.5).astype(w.dtype)
            elif how == "add in place":
                w += 1
                container[key] = w
            else:
                w[:] = 0
        self.shadow.set_weights(self._weights())
        self._go_on(seed)

    def _load_weights(self, seed: int) -> None:
        RAN["load_weights"] += 1
        if "digits" in self.shape.blocks:
            self.model.update(self.start)  # MLX's load_weights takes keys of digits for places in a list
        else:
            self.model.load_weights(tree_flatten(self.start))
        self.shadow.set_weights(self._weights())

    def _set_dtype(self, seed: int) -> None:
        """An update of weights of another dtype is refused where it would lose their residuals; the old ones go on."""
        RAN["set_dtype"] += 1
        if not (self.is_ours or self.shadow.options.compensated) or self.shadow.filled + 1 < self.accumulate:
            return
        before, state = self._snapshot(), self.step.state_dict()
        arrays = self.model.parameters()
        other = mx.float16 if self.shape.dtype == "bfloat16" else mx.bfloat16
        self.model.set_dtype(other)
        try:
            self._call(*models.batch(self.shape, seed, 3))
        except InputError:
            self.model.update(arrays)
        else:
            assert not self.shadow.has_residual
            self.model.update(arrays)
            self.step.load_state_dict(state)
        self._unchanged(before)

    @allowed("rate")
    @precondition(lambda self: self.step is not None and self.is_ours and not self.rate_is_scheduled)
    @rule(rate=st.sampled_from([0.0, 1e-3, 2e-2]), how=st.sampled_from(["attribute", "array", "number"]), seed=seeds)
    def rate(self, rate: float, how: str, seed: int) -> None:
        if f"rate_{how}" in SKIPPED:
            return
        RAN["rate"] += 1
        if how == "attribute":
            self.optimizer.learning_rate = rate
        else:
            self.optimizer.state["learning_rate"] = mx.array(rate) if how == "array" else rate
        self.shadow.rate = rate
        self._go_on(seed)

    # Copies and checkpoints.

    def _replace(self, model: nn.Module, optimizer: Any, step: ca.TrainStep) -> None:
        self.model, self.optimizer, self.step = model, optimizer, step

    def _checkpoint(self, seed: int) -> None:
        RAN["checkpoint"] += 1
        before = self._snapshot()
        ca.save_checkpoint(self.folder / "checkpoint", self.step, {"position": 7})
        self._unchanged(before)
        model, optimizer = models.build(self.shape), self._optimizer()
        model.train(self.model.training)
        if self.shadow.rate is not None:
            optimizer.learning_rate = self.shadow.rate
        step = self._step(model, optimizer)
        assert ca.load_checkpoint(self.folder / "checkpoint", step) == {"position": 7}
        self._replace(model, optimizer, step)
        self._unchanged(before)

    def _state_dict(self, seed: int) -> None:
        """What was read is not changed by going on; and going back is exact."""
        RAN["state_dict"] += 1
        before, state = self._snapshot(), self.step.state_dict()
        if "batch norm" in self.shape.blocks:
            self.step.load_state_dict(state)
        else:
            self._call(*models.batch(self.shape, seed, 3))
            self.step.load_state_dict(state)
        self._unchanged(before)

    def _deepcopy(self, seed: int) -> None:
        RAN["deepcopy"] += 1
        if self.shadow.filled or "batch norm" in self.shape.blocks:
            # The window is the step's, and stays there; and a new step knows what the forward pass assigns, and has it
            # in its checkpoints, only after it has run.
            return
        before = self._snapshot()  # first: a copy of edited weights cannot be noticed to be edited, what is saved is
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        self._replace(model, optimizer, self._step(model, optimizer))
        after = self._snapshot()
        assert {n: x for n, x in before.items() if n in after} == after
        self._look()

    @invariant()
    def results_are_values(self) -> None:
        for result, loss in self.results:
            found = result.loss.item()
            assert found == loss or (found != found and loss != loss)
        if self.step is not None:
            graphs = self.step.traces
            assert graphs["grad"] >= 0 and graphs["update"] >= 0
