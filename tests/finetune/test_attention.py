"""Causal attention in blocks: the same numbers as whole, less memory; and where it is used."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from compiled_adam import cli
from compiled_adam.base import peak, traced
from compiled_adam.commands import lora as lora_command
from compiled_adam.finetune.attention import in_blocks

from tests.commands.test_lora_command import job

SCALE = 0.25


def inputs(queries: int, keys: int, dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    """Queries of four heads, keys and values of two, as models with grouped queries have them."""
    mx.random.seed(0)
    shapes = (2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16)
    return [mx.random.normal(shape).astype(dtype) for shape in shapes]


def both(arrays: list[mx.array], mask: object, **options: object) -> list[list[mx.array]]:
    """The attention and its gradients, whole and in blocks."""

    def total(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        found = mx.fast.scaled_dot_product_attention(*arrays, scale=SCALE, mask=mask, **options)
        return (found * mx.cos(mx.arange(found.size).reshape(found.shape))).sum(), found

    results = []
    for wanted in (False, True):
        with in_blocks(wanted):
            (_, found), gradients = mx.value_and_grad(total, argnums=(0, 1, 2))(*arrays)
            mx.eval(found, gradients)
            results.append([found, *gradients])
    return results


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 200, 511, 513, 1000])
@pytest.mark.parametrize("sinks", [False, True])
def test_causal_attention_is_the_same(length: int, sinks: bool) -> None:
    options = {"sinks": mx.array([0.5, -1.0, 0.0, 2.0])} if sinks else {}
    for whole, blocks in zip(*both(inputs(length, length), "causal", **options), strict=True):
        # Sums of up to a thousand float32 products, in another order.
        assert mx.allclose(whole, blocks, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_cpu")
def test_half_precision_is_as_exact_as_whole() -> None:
    exact = both(inputs(300, 300), "causal")[0]
    for blocks, right in zip(both(inputs(300, 300, mx.bfloat16), "causal")[1], exact, strict=True):
        assert mx.allclose(blocks, right, rtol=0.1, atol=0.1)  # eight bits of inputs and of results


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("mask", [None, "array"])
@pytest.mark.parametrize("keys", [300, 400])
def test_other_masks_are_left_to_mlx(mask: object, keys: int) -> None:
    given = mx.tril(mx.ones((300, keys), mx.bool_)) if mask else None
    for whole, blocks in zip(*both(inputs(300, keys), given), strict=True):
        assert mx.array_equal(whole, blocks)


@pytest.mark.usefixtures("on_cpu")
def test_keys_of_a_cache_are_left_to_mlx() -> None:
    for whole, blocks in zip(*both(inputs(200, 300), "causal"), strict=True):
        assert mx.array_equal(whole, blocks)


@pytest.mark.usefixtures("on_cpu")
def test_what_is_computed_and_kept_is_little_more_than_half() -> None:
    arrays = inputs(1024, 1024)

    def gradient(*arrays: mx.array) -> list[mx.array]:
        def total(*arrays: mx.array) -> mx.array:
            return mx.fast.scaled_dot_product_attention(*arrays, scale=SCALE, mask="causal").sum()

        return list(mx.grad(total, argnums=(0, 1, 2))(*arrays))

    bytes_of = []
    for wanted in (False, True):
        with in_blocks(wanted):
            bytes_of.append(peak(traced(gradient, *arrays)))
    assert bytes_of[1] < 0.65 * bytes_of[0]  # 9/16 of the scores, and one block of the others


def test_a_gpu_keeps_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, k, v, **options: calls.append(q.shape) or q)
    for device in (mx.Device(mx.gpu), mx.Device(mx.cpu)):
        monkeypatch.setattr(mx, "default_device", lambda device=device: device)
        with in_blocks():
            mx.fast.scaled_dot_product_attention(*inputs(128, 128), scale=SCALE, mask="causal")
    assert calls == [(2, 4, 128, 16), (2, 4, 64, 16), (2, 4, 64, 16)]


@pytest.mark.usefixtures("on_cpu")
def test_there_are_at_most_eight_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, k, v, **_: calls.append(q.shape[-2]) or q)
    with in_blocks():
        mx.fast.scaled_dot_product_attention(*inputs(1023, 1023), scale=SCALE, mask="causal")
    assert calls == [128] * 7 + [127]


def test_mlxs_function_is_back_after_an_error() -> None:
    before = mx.fast.scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="out of memory"), in_blocks():
        assert mx.fast.scaled_dot_product_attention is not before
        raise RuntimeError("out of memory")
    assert mx.fast.scaled_dot_product_attention is before


def calls_of_mlx(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A function that computes attention, and returns how many blocks it was computed in."""
    calls: list[mx.array] = []
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, k, v, **options: calls.append(q) or q)

    def blocks() -> int:
        before = len(calls)
        mx.fast.scaled_dot_product_attention(*inputs(128, 128), scale=SCALE, mask="causal")
        return len(calls) - before

    return blocks


@pytest.mark.usefixtures("on_cpu")
def test_threads_leave_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = calls_of_mlx(monkeypatch)
    before = mx.fast.scaled_dot_product_attention
    one, two = in_blocks(), in_blocks()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        first.submit(one.__enter__).result()
        second.submit(two.__enter__).result()
        assert [first.submit(blocks).result(), second.submit(blocks).result(), blocks()] == [2, 2, 1]
        first.submit(one.__exit__, None, None, None).result()
        assert [first.submit(blocks).result(), second.submit(blocks).result(), blocks()] == [1, 2, 1]
        second.submit(two.__exit__, None, None, None).result()
    assert mx.fast.scaled_dot_product_attention is before


@pytest.mark.usefixtures("on_cpu")
def test_the_inner_context_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = calls_of_mlx(monkeypatch)
    with in_blocks():
        with in_blocks(False):
            assert blocks() == 1
        with in_blocks():
            assert blocks() == 2
        assert blocks() == 2
    assert blocks() == 1


@pytest.mark.parametrize("command", ["--train", "--test"])
def test_lora_uses_it_unless_it_is_to_be_like_mlx_lm(
    command: str, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def noted(wanted: bool = True) -> object:
        found.append(wanted)
        return in_blocks(wanted)

    monkeypatch.setattr(lora_command.attention, "in_blocks", noted)
    options = [word for word in job(tiny_model, data, str(tmp_path / "a"), "--iters", "1") if word != "--train"]
    for more in ([], ["--like-mlx-lm"]):
        only = ["--adapter-path", "", "--test-batches", "1"] if command == "--test" else []
        assert cli.main(["lora", command, *options, *only, *more]) == 0
    assert found == [True, False]
