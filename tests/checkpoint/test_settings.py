"""The settings that a checkpoint and the step that loads it must share."""

from __future__ import annotations

from pathlib import Path

import compiled_adam as ca
import mlx.optimizers as optim
import pytest
from compiled_adam.checkpoint import checkpoint

from tests.nets import linear_net, net, squared_error
from tests.saved_steps import advance, assert_identical, everything, make, weighted_error


def test_what_differs_is_one_table_and_may_be_allowed_by_name(tmp_path: Path) -> None:
    step = make(rate=0.5)
    advance(step, 0, 3)
    ca.save_checkpoint(tmp_path / "0003", step, settings={"data": "a"})

    def other(rate=0.25) -> ca.TrainStep:
        optimizer = ca.AdamW(rate, betas=(0.8, 0.9), weight_decay=0.2, moments="8bit", skip_nonfinite=True)
        return ca.make_step(net(0.3), weighted_error, optimizer, accumulate=3, weighted=True)

    with pytest.raises(ValueError) as error:
        ca.load_checkpoint(tmp_path / "0003", other(), settings={"data": "b"})
    lines = str(error.value).splitlines()
    rows = {line.split()[0]: line.split(maxsplit=1)[1].split("  ") for line in lines[2:-1]}
    cells = {name: [cell.strip() for cell in row if cell] for name, row in rows.items()}
    assert cells["betas"] == ["[0.8, 0.9]", "[0.9, 0.999]"] and cells["data"] == ["b", "a"]
    assert cells["learning_rate"] == ["0.25", "0.5"] and cells["weight_decay"] == ["0.2", "0.1"]
    assert cells["moments"] == ["8bit", "float32"] and cells["max_grad_norm"] == ["None", "1"]
    names = ["betas", "data", "learning_rate", "weight_decay", "moments", "max_grad_norm"]
    with pytest.raises(ValueError, match="betas") as error:
        ca.load_checkpoint(tmp_path / "0003", other(), settings={"data": "b"}, allow=names[1:])
    assert "weight_decay" not in str(error.value)
    changed = other()
    ca.load_checkpoint(tmp_path / "0003", changed, settings={"data": "b"}, allow=names)
    assert changed.optimizer.step.item() == 1 and changed.optimizer.learning_rate.item() == 0.25
    assert len(advance(changed, 3, 9)) == 6 and changed.optimizer.step.item() == 3
    with pytest.raises(ValueError, match="there is no setting 'weight_dekay' to allow"):
        ca.load_checkpoint(tmp_path / "0003", step, settings={"data": "a"}, allow=["weight_dekay"])


def test_schedules_are_compared(tmp_path: Path) -> None:
    ca.save_checkpoint(tmp_path / "0001", make(rate=ca.schedulers.cosine(1e-2, 20)))
    ca.load_checkpoint(tmp_path / "0001", make(rate=ca.schedulers.cosine(1e-2, 20)))
    for rate in (ca.schedulers.cosine(1e-2, 30), ca.schedulers.linear(1e-2, 20), 1e-2):
        with pytest.raises(ValueError, match="learning_rate"):
            ca.load_checkpoint(tmp_path / "0001", make(rate=rate))


def test_which_parameters_decay_is_compared(tmp_path: Path) -> None:
    def step(decay_filter) -> ca.TrainStep:
        return ca.make_step(linear_net(), squared_error, ca.AdamW(1e-2, decay_filter=decay_filter))

    ca.save_checkpoint(tmp_path / "0001", step(ca.decay_matrices))
    ca.load_checkpoint(tmp_path / "0001", step(lambda path, p: p.ndim > 1))
    with pytest.raises(ValueError, match="decays"):
        ca.load_checkpoint(tmp_path / "0001", step(None))


def test_other_versions_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "packages", lambda: {"mlx": "0.1"})
        ca.save_checkpoint(tmp_path / "0001", step)
    with pytest.warns(UserWarning, match=r"written with .*mlx 0\.1.*: results may differ in the last bits"):
        ca.load_checkpoint(tmp_path / "0001", step)


def test_another_blas_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of version 0.1, which does not tell its BLAS, gives none."""
    step, folder, packages = make(), tmp_path / "0001", checkpoint._packages
    monkeypatch.setattr(checkpoint.blas, "used", lambda: "OpenBLAS 0.3.21 (Zen, 2 threads)")
    ca.save_checkpoint(folder, step)
    ca.load_checkpoint(folder, step)
    monkeypatch.setattr(checkpoint.blas, "used", lambda: "reference BLAS")
    message = (
        r"written with BLAS OpenBLAS 0\.3\.21 \(Zen, 2 threads\) \(this run has reference BLAS\): results may differ"
    )
    with pytest.warns(UserWarning, match=message):
        ca.load_checkpoint(folder, step)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_packages", lambda: {k: v for k, v in packages().items() if k != "BLAS"})
        ca.save_checkpoint(folder, step)
    ca.load_checkpoint(folder, step)


def several() -> optim.MultiOptimizer:
    parts = [ca.AdamW(1e-2, moments="bfloat16"), optim.SGD(1e-2, momentum=0.9)]
    return optim.MultiOptimizer(parts, [lambda path, p: p.ndim > 1])


@pytest.mark.parametrize("optimizer", [lambda: optim.SGD(0.1, momentum=0.9), lambda: optim.Muon(1e-2), several])
def test_any_mlx_optimizer(optimizer, tmp_path: Path) -> None:
    def step() -> ca.TrainStep:
        return ca.make_step(linear_net(), squared_error, optimizer())

    whole, first, second = step(), step(), step()
    expected = advance(whole, 0, 6)
    losses = advance(first, 0, 3)
    ca.save_checkpoint(tmp_path / "0003", first)
    ca.load_checkpoint(tmp_path / "0003", second)
    assert losses + advance(second, 3, 6) == expected
    assert_identical(everything(second), everything(whole))
