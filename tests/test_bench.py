from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from bench import measure, numerics, quality, readme
from bench.contenders import CONTENDERS
from bench.workloads import WORKLOADS, arrays, parameter_count


class Fake:
    """A contender whose update takes a known time on a clock of its own."""

    now = 0.0

    def __init__(self, cost: float) -> None:
        self.cost = cost

    def build(self, gradients: dict) -> list[mx.array]:
        Fake.now += self.cost
        return [mx.array(1.0) + 1]


def test_a_contender_that_is_three_times_slower_is_reported_so() -> None:
    figures = measure.compare(
        {"fast": lambda p: Fake(0.001), "slow": lambda p: Fake(0.003)}, dict, {}, 0.1, clock=lambda: Fake.now
    )
    assert figures["slow"]["ratio"] == pytest.approx(3)
    assert figures["fast"]["ratio"] == 1
    assert figures["slow"]["median_ms"] == pytest.approx(3)
    assert figures["slow"]["p10_ms"] <= figures["slow"]["median_ms"] <= figures["slow"]["p90_ms"]
    assert figures["slow"]["rounds"] == figures["fast"]["rounds"] >= 25


def test_kernels_of_graphs_made_by_hand() -> None:
    x = mx.ones((4, 4))
    mx.eval(x)
    assert measure.kernels([mx.exp(x) + mx.exp(x)]) == {"Exp": 2, "Add": 1}
    assert measure.kernels([x.reshape(16)]) == {}
    fused = mx.compile(lambda x: mx.exp(x) * mx.sin(x))(x)
    assert list(measure.kernels([fused]).values()) == [1]


def test_contenders_do_the_same_update() -> None:
    shapes = {"a": (8, 3), "b": (5,)}
    results = []
    for make in CONTENDERS.values():
        contender = make(arrays(shapes, mx.float32, 1.0, seed=0))
        for seed in (1, 2, 3):
            outputs = contender.build(arrays(shapes, mx.float32, 1.0, seed=seed))
            assert len(outputs) == 2 * 3 + 2  # two parameters with two moments each, the step and the learning rate
            mx.eval(outputs)
        results.append(contender.parameters)
    for other in results[1:]:
        for name in shapes:
            assert mx.allclose(results[0][name], other[name], rtol=1e-6, atol=1e-6).item()  # float32 rounding


def test_extra_memory_is_what_an_update_allocates() -> None:
    shapes = {"a": (1 << 20,)}
    figures = measure.compare(
        {name: CONTENDERS[name] for name in ("mlx compiled",)},
        lambda: arrays(shapes, mx.float32, 1.0, seed=0),
        arrays(shapes, mx.float32, 1.0, seed=1),
        0.0,
    )
    # One kernel with three outputs, none of which can take the place of an input.
    assert figures["mlx compiled"]["peak_extra_bytes"] / (4 << 20) == pytest.approx(3, abs=0.01)


def test_workloads_are_what_they_are_called() -> None:
    sizes = {name: (len(shapes), parameter_count(shapes)) for name, shapes in WORKLOADS.items()}
    assert sizes == {
        "1000 x 64": (1000, 64_000),
        "224 x (8x1024)": (224, 224 * 8192),
        "95 M GPT-2": (97, 94_617_600),
    }


def test_command_writes_a_table_and_a_record(run, tmp_path: Path) -> None:
    done = run(
        "-m", "bench", "--workload", "1000 x 64", "--dtype", "float32", "--seconds", "0", "--json", "record.json"
    )
    assert done.returncode == 0, done.stderr
    assert "compiled_adam" in done.stdout and "ns/parameter" in done.stdout
    record = json.loads((tmp_path / "record.json").read_text())
    assert [row["contender"] for row in record["update"]] == list(CONTENDERS)
    assert record["environment"].keys() >= {"date", "device", "mlx", "compiled_adam", "commit", "load_average"}
    assert all(row["median_ms"] > 0 and row["rounds"] >= 5 for row in record["update"])


def test_wrong_arguments(run) -> None:
    for arguments in (["--workload", "huge"], ["--json", "missing/folder/x.json"], ["--seconds", "soon"]):
        done = run("-m", "bench", *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, arguments


def test_numerics_measures_movement_and_decay() -> None:
    start = mx.random.normal((64,)).astype(mx.bfloat16)
    sgd = numerics.trajectory(
        lambda rate, decay: optim.SGD(rate, momentum=0.0, weight_decay=0.0), 0.0, start, mx.bfloat16
    )
    assert mx.array_equal(sgd, start.astype(mx.float32)).item()
    decayed = numerics.trajectory(numerics.CONTENDERS["compiled_adam"], 1e-3, start, mx.bfloat16, decay=0.1)
    assert mx.allclose(decayed, start.astype(mx.float32) * (1 - 1e-4) ** numerics.STEPS, rtol=1e-3).item()
    assert (numerics.percent(0.123456), numerics.percent(None)) == ("12.35 %", "nan")


def test_eight_bit_moments_train_a_small_language_model_as_well() -> None:
    # The short version of `python -m bench quality`, with its tolerance of 0.5 %.
    runs = {
        policy: quality.train(policy, 0, steps=60, width=64, layers=2, context=32, batch=8)
        for policy in ("float32", "8bit")
    }
    assert runs["8bit"]["eval_loss"] == pytest.approx(runs["float32"]["eval_loss"], rel=5e-3)
    assert runs["float32"]["eval_loss"] < 0.8 * runs["float32"]["losses"][0]
    assert runs["8bit"]["state_bytes_per_parameter"] < 2.2 < 8 == runs["float32"]["state_bytes_per_parameter"]


def test_readme_needs_a_place_for_each_table() -> None:
    with pytest.raises(ValueError, match="0 places for the update table"):
        readme.rendered("no markers")
