"""What must hold on a GPU, shown without one: by the sources, by the graph, and with a device that says it is a GPU."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator

import compiled_adam as ca
import mlx.core as mx
import mlx.optimizers as optim
import pytest
from compiled_adam.update import kernels, moments
from conftest import ROOT
from mlx.utils import tree_flatten
from nets import batch, linear_net, masked_error, ragged_batch, squared_error

# Everything that runs on the CPU whatever the default device is.
CPU_ONLY = {
    "finetune/validation.py: mean_loss": "numbers of a validation, which come from Python",
    "update/kernels.py: _second_stream": "called for the CPU only",
    "update/kernels.py: row_major": "the stream of the leaf itself",
}
# Functions of MLX that have no kernel for a GPU.
NO_KERNEL = {"linalg", "fft", "float64", "new_stream", "cpu"}


def places(tree: ast.AST, name: str = "") -> Iterator[str]:
    """The functions that name `NO_KERNEL` or choose a stream. To compare with a device is a branch, and allowed."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Compare):
            continue
        chosen = isinstance(node, ast.keyword) and node.arg == "stream"
        if chosen or (isinstance(node, ast.Attribute) and node.attr in NO_KERNEL):
            yield name
        yield from places(node, node.name if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else name)


def test_only_known_places_choose_the_cpu() -> None:
    package = ROOT / "compiled_adam"
    found = {
        f"{file.relative_to(package)}: {name}"
        for file in package.rglob("*.py")
        for name in places(ast.parse(file.read_text()))
    }
    assert found == set(CPU_ONLY)
    (call,) = (
        line for line in (package / "update" / "kernels.py").read_text().splitlines() if "(_second_stream" in line
    )
    assert call == "        streams.append(_second_stream())"  # below `if shared`, which asks for the CPU


def inputs(arrays: list[mx.array]) -> Counter[int]:
    """How many compiled kernels of the graph have so many inputs."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    compiled = re.findall(r'(\d+) \[label ="Compiled', text.getvalue())
    into = Counter(re.findall(r'"\w+" -> (\d+)$', text.getvalue(), re.M))
    return Counter(into[each] for each in compiled)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("policy", moments.POLICIES)
def test_no_kernel_has_more_inputs_than_metal_binds(policy: str, dtype: mx.Dtype) -> None:
    group = {"learning_rate": 0.5, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    options = {"bias_correction": True, "max_grad_norm": 1.0, "skip_nonfinite": True, "groups": {"p0": group}}
    optimizer = ca.AdamW(ca.schedulers.linear(1e-3, 10), moments=policy, lowering="fused", **options)
    p = {f"p{i}": mx.ones((64, 64), dtype) for i in range(3)}
    new = optimizer.apply_gradients(dict(p), p)
    found = inputs([*new.values(), *(array for _, array in tree_flatten(optimizer.state))])
    assert sum(found.values()) >= len(p)  # a kernel for each, at least
    assert max(found) <= 24


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The default device says that it is a GPU. The counter has the calls that wait for it."""
    stream = types.SimpleNamespace(device=mx.Device(mx.gpu))
    calls: Counter[str] = Counter()
    choose = mx.stream
    monkeypatch.setattr(mx, "default_device", lambda: stream.device)
    monkeypatch.setattr(mx, "default_stream", lambda device: stream)
    monkeypatch.setattr(mx, "stream", lambda its: contextlib.nullcontext() if its is stream else choose(its))
    monkeypatch.setattr(kernels, "_second_stream", lambda: pytest.fail("a stream of the CPU"))

    def counted(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: object) -> object:
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(owner, name, call)

    for owner, names in ((mx, ("eval", "synchronize")), (mx.array, ("item", "tolist", "__array__", "__bool__"))):
        for name in names:
            counted(owner, name)
    return calls


def step_of(name: str) -> Callable[[int], object]:
    options, schedule = {"max_grad_norm": 1.0, "skip_nonfinite": True}, ca.schedulers.linear(1e-2, 9)
    made = {
        "packed": lambda: ca.AdamW(schedule, **options),
        "8bit": lambda: ca.AdamW(schedule, moments="8bit"),
        "fused": lambda: ca.Adam(1e-2, lowering="fused"),
        "SGD": lambda: optim.SGD(1e-2, momentum=0.9),
        "two": lambda: optim.MultiOptimizer([optim.Muon(1e-2), ca.AdamW(1e-2)], [lambda path, p: p.ndim == 2]),
        "accumulated": lambda: ca.AdamW(1e-2),
    }
    model = linear_net()
    model.set_dtype(mx.bfloat16)
    if name == "accumulated":
        step = ca.make_step(model, masked_error, made[name](), accumulate=2, weighted=True)
        return lambda i: step(*ragged_batch(i))
    step = ca.make_step(model, squared_error, made[name]())
    return lambda i: step(*batch(i))


@pytest.mark.parametrize("name", ["packed", "8bit", "fused", "SGD", "two", "accumulated"])
def test_a_step_does_not_wait_for_a_gpu(name: str, gpu: Counter[str]) -> None:
    call = step_of(name)
    for i in range(4):
        call(i)
    gpu.clear()
    results = [call(i) for i in range(4)]
    assert not gpu
    assert results[-1].loss.item() > 0  # it has worked; reading a result waits
    assert gpu == {"item": 1}


def test_a_step_waits_for_the_gradients_on_a_cpu(gpu: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call = step_of("SGD")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    call(0)
    gpu.clear()
    call(1)
    assert gpu == {"eval": 1}  # so the test above would notice it
