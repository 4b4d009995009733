"""The plan of a job has the bytes that the job's arrays have."""

from __future__ import annotations

import json
import os
import re
import types
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest
from compiled_adam import cli
from compiled_adam.base.errors import InputError
from compiled_adam.commands import plan
from compiled_adam.commands.lora import make_optimizer, make_trainable
from compiled_adam.commands.lora_options import settings
from compiled_adam.distributed import Shard
from compiled_adam.finetune import model_config
from compiled_adam.finetune.step_memory import Pass
from compiled_adam.step import losses
from compiled_adam.update.moments import POLICIES
from hypothesis import given
from hypothesis import settings as fuzzing
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.models import llama

from bench import scaling


def nbytes(tree) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))


def options(*argv: str) -> types.SimpleNamespace:
    return settings(["--train", "--optimizer", "adamw", "--num-layers", "2", *argv])


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_bytes_are_those_of_the_arrays(kind: str, tiny_model: Path) -> None:
    args = options("--fine-tune-type", kind)
    made = plan.plan({**model_config.read(str(tiny_model)), "torch_dtype": "float32"}, args)
    model = load(str(tiny_model))[0]
    assert made.parameters == sum(p.size for _, p in tree_flatten(model.parameters()))
    make_trainable(args, model)
    assert made.weights == nbytes(model.parameters())
    assert made.gradients == nbytes(model.trainable_parameters())
    assert list(made.states) == list(POLICIES)
    for policy, state in made.states.items():
        optimizer = make_optimizer(types.SimpleNamespace(**{**vars(args), "moments": policy}))
        optimizer.init(model.trainable_parameters())
        assert sum(state) == nbytes(optimizer.state)
        assert state.residuals == 0
    assert made.calls == [] and made.exchange == 0 and made.traffic() == 0


def test_half_precision_and_quantized_models(tiny_model: Path) -> None:
    config = {**model_config.read(str(tiny_model)), "torch_dtype": "bfloat16"}
    made = plan.plan(config, options("--fine-tune-type", "full", "--grad-accumulation-steps", "2"), workers=2)
    assert made.gradients == 2 * made.trainable and made.window == made.exchange == 4 * made.trainable
    for policy, per_parameter in (("float32", 10), ("bfloat16", 6), ("param", 6)):
        assert sum(made.states[policy]) == pytest.approx(per_parameter * made.trainable, rel=1e-3)
        assert made.states[policy].residuals == 2 * made.trainable
    quantized = plan.plan({**config, "quantization": {"group_size": 32, "bits": 4}}, options())
    assert quantized.parameters == made.parameters
    # 4 bits and, for each 32 weights, a scale and a bias of 2 bytes: 5 bits instead of 16. Adapters are float32.
    adapters = 4 * quantized.trainable
    assert quantized.weights - adapters == pytest.approx(made.weights * 5 / 16, rel=0.02)


@pytest.mark.parametrize("optimizer", ["muon", "lion"])
def test_other_optimizers_have_float32_state_and_residuals(optimizer: str, tiny_model: Path) -> None:
    config = {**model_config.read(str(tiny_model)), "torch_dtype": "bfloat16"}
    args = options("--fine-tune-type", "full", "--optimizer", optimizer)
    made = plan.plan(config, args)
    model = load(str(tiny_model))[0]
    model.set_dtype(mx.bfloat16)
    make_trainable(args, model)
    its = make_optimizer(args)
    its.init(model.trainable_parameters())
    assert made.states[optimizer].residuals == 2 * made.trainable
    assert sum(made.states[optimizer]) == nbytes(its.state)


def test_communication(tiny_model: Path) -> None:
    config = {**model_config.read(str(tiny_model)), "torch_dtype": "bfloat16"}
    lora = plan.plan(config, options(), workers=4)
    assert lora.calls == [4 * (lora.trainable + 3)]
    assert lora.traffic() == 1.5 * sum(lora.calls) and lora.seconds(1e9) == lora.traffic() / 1e9
    full = plan.plan(config, options("--fine-tune-type", "full", "--reduce-dtype", "param"), workers=2)
    assert full.calls == [12, 2 * full.trainable]
    # One call for every size with LoRA; bounded buffers for more.
    assert all(len(scaling.planned(name, "LoRA", 64).calls) == 1 for name in scaling.MODELS)
    large = scaling.planned("Llama 3.2 1B", "full", 2)
    assert sum(large.calls) == 4 * (large.trainable + 3) and max(large.calls) == 4 * 2048 * 8192


def test_sharded_state(tiny_model: Path) -> None:
    config = {**model_config.read(str(tiny_model)), "torch_dtype": "bfloat16"}
    job = ("--fine-tune-type", "full", "--num-layers", "2", "--reduce-dtype", "param")
    whole = plan.plan(config, options(*job), workers=2)
    sharded = plan.plan(config, options(*job, "--shard-state"), workers=2)
    for policy, state in sharded.states.items():
        assert sum(state) == pytest.approx(sum(whole.states[policy]) / 2, rel=0.02)
    assert sum(sharded.gathers) == pytest.approx(2 * sharded.trainable, rel=0.01)
    assert sharded.traffic() == whole.traffic() + sum(sharded.gathers) / 2 and not whole.gathers
    alone = plan.plan(config, options(*job, "--shard-state"))
    assert alone == plan.plan(config, options(*job)) and not alone.gathers
    # Leaves are bounded by the largest, whatever the number of workers, and nothing is sent twice.
    for count in (2, 8, 64):
        large = scaling.sharded("Llama 3.2 1B", count)
        assert max(large.gathers) <= max(32 * 2**20, 2 * 2048 * 8192 * count)
        assert sum(large.gathers) <= 1.2 * large.gradients


def test_sharded_state_of_two_optimizers_is_that_of_a_real_shard(tiny_model: Path) -> None:
    config = {**model_config.read(str(tiny_model)), "torch_dtype": "bfloat16"}
    args = options("--fine-tune-type", "full", "--optimizer", "muon", "--shard-state")
    model = load(str(tiny_model))[0]
    model.set_dtype(mx.bfloat16)
    make_trainable(args, model)
    trainable, found = model.trainable_parameters(), []
    for rank in range(3):
        group = cast(mx.distributed.Group, types.SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 3))
        its = make_optimizer(args)
        Shard(its, trainable, [path for path, _ in tree_flatten(trainable)], group).init(trainable)
        found.append(nbytes(its.state))
    assert sum(plan.plan(config, args, workers=3).states["muon"]) == max(found) < 0.4 * sum(found)


def test_nothing_is_computed_for_a_large_model() -> None:
    mx.reset_peak_memory()
    made = scaling.planned("Llama 3.1 70B", "full", 64)
    assert mx.get_peak_memory() < 100e6
    assert made.parameters == 70_553_706_496


def test_published_numbers_of_parameters() -> None:
    published = {"SmolLM2 135M": 0.1345, "Llama 3.2 1B": 1.236, "Llama 3.1 8B": 8.030, "Qwen2.5 32B": 32.76}
    for name, billions in published.items():
        assert scaling.planned(name, "LoRA", 1).parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_the_page_is_what_is_computed() -> None:
    """Two of its models: the largest ones take most of the time."""
    lines = iter(scaling.PAGE.read_text().splitlines())
    for line in scaling.page(["SmolLM2 135M", "Llama 3.2 1B"]).splitlines():
        assert line in lines, f"{line!r} is not there, or not in its place: run python -m bench.scaling"


@pytest.mark.long
def test_the_whole_page_is_what_is_computed() -> None:
    assert scaling.PAGE.read_text() == scaling.page(), "run python -m bench.scaling"


@pytest.mark.usefixtures("on_cpu")
def test_command(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(tiny_model / "config.json")
    job = ["plan", config, "--workers", "2", "--num-layers", "1"]
    assert cli.main([*job, "--batch-size", "2", "--memory", "0.0001"]) == 1
    out = capsys.readouterr().out
    assert cli.main([*job, "--shard-state"]) == 0
    assert "and 1 call of together" in (gathers := capsys.readouterr().out) and "of new weights" in gathers
    assert "2 workers: 1 call of together" in out and "at 5 GB/s" in out and "does not fit" in out
    assert all(policy in out for policy in POLICIES)
    assert "no options make it fit that keep what is trained; use a quantized or smaller model\n" in out
    assert re.search(r"forward and backward pass of 1 x 2048 positions on a CPU: [\d.]+ [MG]B", out)
    assert "logits a chunk at a time: " in out


def test_the_batch_is_the_largest_of_the_job() -> None:
    def batch(*argv: str, workers: int = 1) -> tuple:
        return plan.of_batch(options(*argv), workers)[:4]

    assert batch() == (4, 2048, False, True)
    assert batch("--grad-checkpoint", "--no-chunked-loss", workers=2) == (2, 2048, True, False)
    assert batch("--no-group-by-length", "--max-seq-length", "65") == (4, 64, False, True)
    assert batch("--batch-tokens", "8192", "--max-seq-length", "1000", workers=2) == (4, 1000, False, True)
    assert batch("--batch-tokens", "100") == (1, 100, False, True)
    assert batch("--batch-tokens", "2", workers=4) == (1, 1, False, True)
    like = plan.of_batch(options("--like-mlx-lm"), 1)
    assert like[:4] == (4, 2047, False, False) and like.loss is losses.like_mlx_lm


def test_the_total_has_the_pass_with_its_gradients(tiny_model: Path) -> None:
    args = options("--fine-tune-type", "full", "--grad-accumulation-steps", "2")
    made = plan.plan(model_config.read(str(tiny_model)), args, workers=2)
    without = made.weights + made.window + sum(made.states["8bit"])
    assert made.total("8bit") == without + made.gradients + made.exchange
    assert made._replace(batch=Pass(10**9, 10**6)).total("8bit") == without + 10**9
    assert made._replace(batch=Pass(made.gradients, 0)).total("8bit") == made.total("8bit")
    assert made._replace(batch=Pass(10**6, 0), updates={"8bit": 10**9}).total("8bit") == without + 10**9


def said_last(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_is_a_job_that_fits(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The job with its options fits as it is."""
    job = ["plan", str(tiny_model), "--optimizer", "adamw", "--no-chunked-loss"]
    needed = {}
    for memory, expected in (("4", []), ("0.3", ["--grad-checkpoint"]), ("0.05", ["--batch-size 1"])):
        assert cli.main([*job, "--memory", memory]) == 0
        line = said_last(capsys)
        if not expected:
            assert line == "it fits, with moments float32"
            continue
        fragment = line.removeprefix("it fits with ")
        assert fragment != line and all(option in fragment for option in expected)
        assert cli.main([*job, *fragment.split(), "--memory", memory]) == 0
        assert said_last(capsys).startswith("it fits, with moments ")
        needed[memory] = fragment
    assert len(set(needed.values())) == 2


def test_no_smaller_batch_is_traced_if_the_weights_do_not_fit(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trace of a large model takes seconds."""
    followed: list[object] = []
    monkeypatch.setattr(plan.step_memory, "of_pass", lambda _, batch: followed.append(batch) or Pass(1, 1))
    job = ["plan", str(tiny_model), "--batch-size", "16"]
    assert cli.main([*job, "--memory", "0.00001"]) == 1
    assert len(followed) == 1  # that of the table


def test_a_model_that_cannot_be_traced_is_planned_without_its_activations(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*args: object, **kwargs: object) -> None:
        raise RuntimeError("needs Metal\nand more")

    monkeypatch.setattr(llama.Model, "__call__", call)
    assert cli.main(["plan", str(tiny_model), "--memory", "0.01"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "activations cannot be computed: needs Metal; the total is without the batch and the update\n"
    )
    assert "forward and backward pass" not in out and "update: " not in out and "it fits, with moments float32\n" in out
    assert cli.main(["plan", str(tiny_model), "--memory", "0.0001"]) == 1


def test_moments_of_the_job_decide_whether_it_fits(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["plan", str(tiny_model), "--fine-tune-type", "full", "--batch-size", "1", "--max-seq-length", "8"]
    assert cli.main([*job, "--memory", "1"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.count("│") == 6]
    total = {row[1].strip(): 1e6 * float(row[4].split()[0]) for row in rows}  # in MB
    between = (total["8bit"] + min(total["float32"], total["bfloat16"])) / 2
    assert total["8bit"] < between
    assert cli.main([*job, "--memory", f"{between / 1e9:.6f}"]) == 0
    assert said_last(capsys) == "it fits with --moments 8bit"
    assert cli.main([*job, "--memory", f"{between / 1e9:.6f}", "--moments", "8bit"]) == 0
    assert said_last(capsys) == "it fits, with moments 8bit"
    assert cli.main([*job, "--memory", f"{between / 1e9:.6f}", "--optimizer", "sgd"]) == 0
    assert said_last(capsys) == "it fits, with moments sgd"


def test_numbers_of_parameters_are_never_zero() -> None:
    shown = {12: "12", 12_288: "12,288", 999_999: "999,999", 1_234_567: "1.2 M", 7_610_000_000: "7.61 B"}
    assert {number: plan._count(number) for number in shown} == shown


def test_a_plan_without_options_is_for_all_layers_of_a_small_model(tiny_model: Path, capsys) -> None:
    """mlx-lm's default of 16 layers is more than it has."""
    config = model_config.read(str(tiny_model))
    said = []
    for argv in ([], ["--num-layers", "-1"], ["--num-layers", "1"]):
        assert cli.main(["plan", str(tiny_model), "--memory", "1", *argv]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "trained, in the last 4 layers\n" in said[0]
    assert "trained, in the last layer\n" in said[2]
    assert plan.plan({**config, "num_hidden_layers": 17}, settings(["--train"])).layers == 16
    assert cli.main(["plan", str(tiny_model), "--num-layers", "16"]) == 2  # asked for
    assert "num_layers (--num-layers) is 16, but the model has 4 layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not the config of a model"),
        (json.dumps({"model_type": "llama"}), "not one that mlx-lm can build"),
        (json.dumps({"model_type": "no such"}), "not supported"),
        (json.dumps({"model_type": "llama", "torch_dtype": "float8"}), "torch_dtype is 'float8'"),
        ("[" * 100_000, "is not JSON"),
        ("\udcff", "is not JSON"),
        ("{}", "model_type is None; it must be the name of a model"),
        (json.dumps({"model_type": ["llama"]}), "model_type is ['llama']"),
        (json.dumps({"model_type": "llama", "text_config": 5}), "text_config is 5; it must be an object"),
        (json.dumps({"model_type": "llama", "quantization": "4"}), "quantization is '4'; it must be an object"),
        (
            json.dumps({"model_type": "llama", "hidden_size": "64"}),
            "hidden_size is '64'; it must be a whole number from 1",
        ),
        (json.dumps({"model_type": "llama", "vocab_size": 0}), "vocab_size is 0"),
        (json.dumps({"model_type": "llama", "head_dim": -16}), "head_dim is -16"),
        (json.dumps({"model_type": "llama", "num_attention_heads": {"a": 1}}), "num_attention_heads is {'a': 1}"),
        (json.dumps({"model_type": "llama", "num_hidden_layers": 10**9}), "it must be a whole number from 1 to 10000"),
        (json.dumps({"model_type": "llama", "text_config": {"vocab_size": 1.5}}), "vocab_size is 1.5"),
        ('{"model_type": "llama", "hidden_size": 1e400}', "hidden_size is inf"),
    ],
)
def test_configs_that_cannot_be_used(content: str, message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert cli.main(["plan", str(tmp_path)]) == 2
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1
    if any(name in message for name in model_config.SIZES):  # before anything is built of it, or loaded
        assert cli.main(["lora", "--model", str(tmp_path), "--data", str(tmp_path), "--train"]) == 2
        assert message in (said := capsys.readouterr().err) and said.count("\n") == 1


ANYTHING = st.recursive(
    st.sampled_from(
        ["2", "", None, True, 0, -1, 1, 3, 64, 2**20, 2**31, 10**30, 1.5, -0.5, 1e308, float("nan"), float("inf")]
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "bits"]), inner, max_size=2),
    max_leaves=2,
)
OPTIONS = options("--num-layers", "1")
NAMES = ("head_dim", "rope_scaling", "rope_theta", "layer_types", "quantization", "text_config", "torch_dtype", "bits")


@fuzzing(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_configs_are_one_sentence_or_a_plan(data: st.DataObject, tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_bytes())
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    if data.draw(st.booleans()):
        config["quantization"] = quantization
        quantization[data.draw(st.sampled_from(sorted(quantization)))] = data.draw(ANYTHING)
    for name in data.draw(st.lists(st.sampled_from([*sorted(config), *NAMES]), max_size=2)):
        if data.draw(st.integers(0, 3)):
            config[name] = data.draw(ANYTHING)
        else:
            config.pop(name, None)
    try:
        made = plan.plan(config, OPTIONS)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert made.trainable > 0 and made.total("float32") < 1e18


def test_what_is_no_file_is_not_read(tmp_path: Path, capsys) -> None:
    os.mkfifo(tmp_path / "config.json")  # a pipe would be waited for
    for name in (tmp_path, tmp_path / "config.json"):
        assert cli.main(["plan", str(name)]) == 2
        assert "config.json is no file; name a model's folder" in capsys.readouterr().err


def test_a_yaml_file_has_the_options_of_plan_too(tiny_model: Path, tmp_path: Path, capsys) -> None:
    printed = []
    options = {"workers": 2, "link": 1.5, "memory": 3}
    (tmp_path / "job.yaml").write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    for words in (
        ["-c", str(tmp_path / "job.yaml")],
        [f"--{name}={value}" for name, value in options.items()],
        [],
    ):
        cli.main(["plan", str(tiny_model), *words])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert "2 workers" in printed[0]


def test_arguments_that_cannot_be_used(tiny_model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "job.yaml").write_text("memory: 16 GB\n")
    assert cli.main(["plan", str(tiny_model), "-c", str(tmp_path / "job.yaml")]) == 2
    assert "memory is '16 GB'; it must be a number" in capsys.readouterr().err
    for name in ("no/such", "/nonexist", "no/such/folder", "-.", "a b/c", "nosuch"):
        assert cli.main(["plan", "--", name]) == 2
        assert f"{name} does not exist here, and is not in the cache of Hugging Face" in capsys.readouterr().err
    assert cli.main(["plan", str(tiny_model), "--workers", "0"]) == 2
    assert "workers is 0" in capsys.readouterr().err
    assert cli.main(["plan", str(tiny_model), "--workers", str(10**9), "--shard-state"]) == 2
    assert "workers is 1000000000; it must be at most 65536" in capsys.readouterr().err
    assert cli.main(["plan", str(tiny_model), "--workers", "3"]) == 2  # as of a run
    assert "batch_size is 4; it must be divisible by the 3 workers" in capsys.readouterr().err
    for name in ("--memory", "--link"):
        for value in ("0", "-1", "nan", "inf", "1e400", "1e-400"):
            assert cli.main(["plan", str(tiny_model), f"{name}={value}"]) == 2
            assert f"{name.strip('-')} is {float(value)}; it must be above 0" in capsys.readouterr().err
