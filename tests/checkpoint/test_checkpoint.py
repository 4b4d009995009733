from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from compiled_adam.base import fingerprint
from compiled_adam.checkpoint import checkpoint, durable, series
from mlx.utils import tree_flatten, tree_unflatten

from tests.nets import Net, linear_net, squared_error
from tests.saved_steps import FILES, advance, assert_identical, everything, make

POLICIES = ["float32", "bfloat16", "8bit", "param"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_loaded_run_goes_on_bit_for_bit(policy: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    whole = make(policy, dtype)
    expected = advance(whole, 0, 20)

    first = make(policy, dtype)
    losses = advance(first, 0, 8)  # two updates, and two micro-batches of the next window
    extra = {"iteration": 8, "best": 1.5, "names": ["a"]}
    ca.save_checkpoint(tmp_path / "0008", first, extra)
    mx.random.seed(123)  # another process
    second = make(policy, dtype)
    advance(second, 0, 1)  # not even fresh
    assert ca.load_checkpoint(tmp_path / "0008", second) == extra
    losses += advance(second, 8, 20)
    assert losses == expected
    assert_identical(everything(second), everything(whole))


def test_what_a_checkpoint_has(tmp_path: Path) -> None:
    step = make()
    advance(step, 0, 4)
    ca.save_checkpoint(tmp_path / "0004", step, {"a": 1}, settings={"data": "x"})
    assert sorted(os.listdir(tmp_path)) == ["0004"]
    assert sorted(os.listdir(tmp_path / "0004")) == sorted(FILES)
    weights, state, window = (mx.load(str(tmp_path / "0004" / name)) for name in FILES[:3])
    # Trained parameters and the statistics that the forward pass assigns; not the frozen layer.
    trained = {path for path, _ in tree_flatten(step.model.trainable_parameters())}
    assert weights.keys() == trained | {"layers.1.running_mean", "layers.1.running_var"}
    assert state.keys() == {path for path, _ in tree_flatten(step.optimizer.state)}
    assert window.keys() == {f"gradients.{path}" for path in trained} | {"weight", "loss", "batches"}
    meta = json.loads((tmp_path / "0004" / "meta.json").read_text())
    assert (meta["format"], meta["updates"], meta["accumulated"], meta["extra"]) == (1, 1, 1, {"a": 1})
    assert meta["packages"].keys() >= {"mlx", "compiled-adam"} and meta["settings"]["data"] == "x"
    assert meta["random"] == mx.random.state[0].tolist()
    assert {name: file["sha256"] for name, file in meta["files"].items()} == {
        name: durable.record(tmp_path / "0004" / name)["sha256"] for name in FILES[:3]
    }


def test_an_older_checkpoint_of_the_name_is_replaced_but_nothing_else(tmp_path: Path) -> None:
    step = make()
    for iteration in (1, 2):
        advance(step, iteration, iteration + 1)
        ca.save_checkpoint(tmp_path / "last", step, {"iteration": iteration})
    assert ca.load_checkpoint(tmp_path / "last", step) == {"iteration": 2}
    assert os.listdir(tmp_path) == ["last"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="thesis exists and is not a checkpoint; name another folder"):
        ca.save_checkpoint(tmp_path / "thesis", step)
    assert os.listdir(tmp_path / "thesis") == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    ca.save_checkpoint(tmp_path / "empty", step)
    assert ca.load_checkpoint(tmp_path / "empty", step) == {}


# Damage.


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="there is no checkpoint in"):
            ca.latest_checkpoint(folder)
    (tmp_path / "0001").mkdir()
    with (
        pytest.warns(UserWarning, match="0001 is not a checkpoint: it has no meta.json"),
        pytest.raises(ValueError, match="there is no whole checkpoint in"),
    ):
        ca.latest_checkpoint(tmp_path)


# Checkpoints from elsewhere.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_window_that_does_not_fit(accumulate: int) -> None:
    step = make(accumulate=3)
    advance(step, 0, 2)
    with pytest.raises(ValueError, match=f"a window of 2 micro-batches, but accumulate is {accumulate}"):
        make(accumulate=accumulate).load_state_dict(step.state_dict())


# Stock MLX's states.


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_our_state_goes_on_in_stock_mlx_and_stocks_in_ours(kind: str, tmp_path: Path) -> None:
    def step(module) -> ca.TrainStep:
        return ca.make_step(linear_net(), squared_error, getattr(module, kind)(1e-2, bias_correction=True))

    whole = step(optim)
    expected = advance(whole, 0, 20)
    for module, other in ((ca, optim), (optim, ca)):
        first = step(module)
        losses = advance(first, 0, 10)
        ca.save_checkpoint(tmp_path / "0010", first)
        second = step(other)
        # The files are what MLX's documentation does with an optimizer's state.
        second.model.load_weights(str(tmp_path / "0010" / "weights.safetensors"))
        state = mx.load(str(tmp_path / "0010" / "optimizer.safetensors"))
        second.optimizer.state = tree_unflatten(list(state.items()))
        losses += advance(second, 10, 20)
        assert losses == pytest.approx(expected, rel=1e-5)  # float32 rounding


def test_a_stock_state_becomes_any_policys(tmp_path: Path) -> None:
    stock = ca.make_step(linear_net(), squared_error, optim.AdamW(1e-2))
    advance(stock, 0, 5)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(stock.optimizer.state)))
    state = stock.state_dict() | {"optimizer": mx.load(str(tmp_path / "state.safetensors"))}
    for policy in POLICIES:
        optimizer = ca.AdamW(1e-2, moments=policy, max_grad_norm=1e9)
        step = ca.make_step(linear_net(), squared_error, optimizer)
        with pytest.raises(ValueError, match="grad_norm"):
            step.load_state_dict(state)
        step.load_state_dict(state, convert=True)
        assert optimizer.step.item() == 5
        assert advance(step, 5, 15)[-1] == pytest.approx(advance_copy(stock, 5, 15)[-1], rel=2e-2)  # bfloat16's digits
    before = everything(step)
    del state["optimizer"]["step"]
    with pytest.raises(ValueError, match=r"step +.integer, True. +-"):
        step.load_state_dict(state, convert=True)
    assert_identical(everything(step), before)


def advance_copy(step: ca.TrainStep, first: int, last: int) -> list[float]:
    copy = ca.make_step(linear_net(), squared_error, optim.AdamW(1e-2))
    copy.load_state_dict(step.state_dict())
    return advance(copy, first, last)


# What the forward pass assigns.


def test_arrays_changed_in_place_are_a_part_and_frozen_weights_are_not() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.table = mx.array(0), mx.arange(100.0)
            self.freeze(keys=["calls", "table"], recurse=False)

        def __call__(self, x: mx.array) -> mx.array:
            self.calls += 1  # in place: the array object stays the same
            return super().__call__(x) + self.table[0]

    step = ca.make_step(Counting(), squared_error)
    advance(step, 0, 3)
    state = step.state_dict()
    assert "calls" in state["model"] and not {"table", "layers.3.weight"} & state["model"].keys()
    other = ca.make_step(Counting(), squared_error)
    other.load_state_dict(state)
    assert other.model.calls.item() == 3
    assert "calls" in other.state_dict()["model"]  # before a batch has shown that it is assigned


# Writing.


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make()
    ca.save_checkpoint(tmp_path / "last", step, {"iteration": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("flush", "save_arrays"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            for folder in ("last", "next"):
                message = (
                    rf"^\[Errno {errno.ENOSPC}\] {tmp_path / folder} could not be written: No space left on device$"
                )
                with pytest.raises(OSError, match=message):
                    ca.save_checkpoint(tmp_path / folder, step, {"iteration": 2})
        assert os.listdir(tmp_path) == ["last"]
        assert ca.load_checkpoint(tmp_path / "last", step) == {"iteration": 1}


def test_an_error_of_mlx_names_the_folder_that_was_asked_for(tmp_path: Path, monkeypatch) -> None:
    """And not the hidden one beside it, which is gone by then."""

    def full(file: str, _: object) -> None:
        raise RuntimeError(f"[write] Unable to write 128 bytes to {file}.")

    step = make()
    monkeypatch.setattr(mx, "save_safetensors", full)
    for save, file in (
        (lambda: ca.save_checkpoint(tmp_path / "last", step), tmp_path / "last" / "optimizer.safetensors"),
        (lambda: durable.replace_arrays(tmp_path / "a.safetensors", {}), tmp_path / "a.safetensors"),
    ):
        with pytest.raises(OSError, match=rf"^{file} could not be written: .* to {file}; is the disk full\?$"):
            save()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        model = nn.Linear(40, 40)
        step = ca.make_step(model, lambda model, x: model(x).sum())
        ca.save_checkpoint(small / "1", step, {"iteration": 1})  # 21 kB and 24 kB of meta and pages
        with pytest.raises(OSError, match=r"safetensors could not be written|No space left"):
            for iteration in range(2, 10):
                ca.save_checkpoint(small / str(iteration), step, {"iteration": iteration})
        assert not list(small.glob(".*"))
        for path in series.numbered(small):
            assert ca.load_checkpoint(path, step) == {"iteration": int(path.name)}
    finally:
        subprocess.run(["umount", small], check=True)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    step = make()
    step.model.layers[0].weight = mx.full((8, 4), float("nan"))
    with pytest.raises(ValueError, match=r"layers\.0\.weight has values that are infinite or not a number \(1 of"):
        ca.save_checkpoint(tmp_path / "0001", step)
    assert not list(tmp_path.iterdir())
    checkpoint.check_finite({"empty": mx.zeros((0, 3)), "whole": mx.array([1]), "last": mx.ones(2, mx.complex64)})


def test_a_folder_is_locked_while_its_process_lives(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from compiled_adam.checkpoint import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(OSError, match=f"process {process.pid} is already training in"), durable.locked(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with durable.locked(tmp_path):
        pass


def test_a_reader_between_the_renamings_does_not_disturb_the_writer(tmp_path: Path) -> None:
    step = make()
    ca.save_checkpoint(tmp_path / "last", step, {"iteration": 1})
    with durable.replacing(tmp_path / "last") as temporary:
        (temporary / "new").touch()
        (tmp_path / "last").rename(tmp_path / ".last.old")
        assert ca.load_checkpoint(tmp_path / "last", step) == {"iteration": 1}
        assert not (tmp_path / "last").exists()
    assert os.listdir(tmp_path / "last") == ["new"] and os.listdir(tmp_path) == ["last"]


def test_what_cannot_be_converted() -> None:
    stock = ca.make_step(linear_net(), squared_error, optim.AdamW(1e-2))
    advance(stock, 0, 2)
    state = stock.state_dict()
    good = state["optimizer"]
    path = "layers.0.weight.m"
    for optimizer in (
        {k: v for k, v in good.items() if k != path},
        {**good, path: mx.zeros((3, 3))},
        {**good, "layers.9.weight.m": mx.zeros(1)},
        {**good, "step": mx.array(2.0)},
        {"step": good["step"], "learning_rate": good["learning_rate"]},
    ):
        step = ca.make_step(linear_net(), squared_error, ca.AdamW(1e-2, moments="8bit"))
        before = everything(step)
        with pytest.raises(ValueError, match="the state does not fit"):
            step.load_state_dict({**state, "optimizer": optimizer}, convert=True)
        assert_identical(everything(step), before)


def test_options_of_one_of_several_optimizers_may_change(tmp_path: Path) -> None:
    def step(policy: str) -> ca.TrainStep:
        parts = [ca.AdamW(1e-2, moments=policy), optim.SGD(1e-2, momentum=0.9)]
        return ca.make_step(linear_net(), squared_error, optim.MultiOptimizer(parts, [lambda path, p: p.ndim > 1]))

    first, second = step("float32"), step("bfloat16")
    advance(first, 0, 3)
    ca.save_checkpoint(tmp_path / "0003", first)
    with pytest.raises(ValueError, match=r"optimizers\.0\.moments +bfloat16 +float32"):
        ca.load_checkpoint(tmp_path / "0003", second)
    ca.load_checkpoint(tmp_path / "0003", second, allow=["optimizers.0.moments"])
    assert advance(second, 3, 6)[-1] == pytest.approx(advance(first, 3, 6)[-1], rel=2e-2)  # bfloat16's digits


def test_fingerprints_see_rows_and_columns_that_moved() -> None:
    a = mx.random.normal((6, 4)).astype(mx.bfloat16)
    others = [a[::-1], a[:, ::-1], a.T.reshape(6, 4), a.astype(mx.float32), a + 0, mx.concatenate([a, a])]
    same = [fingerprint.of_arrays({"a": other}) == fingerprint.of_arrays({"a": a}) for other in others]
    assert same == [False, False, False, False, True, False]
    assert fingerprint.of_arrays({"a": mx.array(1), "b": mx.zeros((0, 3)), "c": mx.array([True])})
