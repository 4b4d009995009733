from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.base import differences
from compiled_adam.commands import lora as lora_command
from compiled_adam.commands import lora_options, lora_screen
from compiled_adam.optimizers import any_optimizer
from mlx.utils import tree_flatten
from mlx_lm import lora as mlx_lm_lora

from tests.conftest import ROOT


def job(tiny_model: Path, data: Path, out: str, *more: str) -> list[str]:
    options = {
        "model": tiny_model,
        "data": data,
        "adapter-path": out,
        "iters": 8,
        "batch-size": 2,
        "num-layers": 2,
        "steps-per-report": 1,
        "val-batches": 2,
        "learning-rate": 1e-3,
    }
    if "schedule.yaml" in more:
        del options["learning-rate"]  # the schedule says it
    return ["--train", *(word for name, value in options.items() for word in (f"--{name}", str(value))), *more]


def reported_losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^iter +\d+  loss (\S+)", output, re.M)]


def of_many_lengths(data: Path, folder: Path) -> Path:
    """The data with texts of 20 to 100 characters, so that batches have padding; one example fills no batch."""
    folder.mkdir()
    for name in ("train", "valid"):
        rows = [json.loads(line)["text"] for line in (data / f"{name}.jsonl").read_text().splitlines()]
        rows = [text[: 20 + 27 * i % 81] for i, text in enumerate(rows[:23])]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return folder


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--fine-tune-type", "dora"],
        ["--fine-tune-type", "full", "--optimizer", "adamw"],
        ["--grad-accumulation-steps", "2"],  # of micro-batches with different numbers of tokens
        ["--optimizer", "sgd"],
        ["-c", "schedule.yaml"],  # with a warmup, after which mlx-lm repeats the peak
        ["--model", "quantized"],
    ],
    ids=lambda more: " ".join(more) or "lora",
)
def test_the_adapters_of_mlx_lm_lora(more: list[str], tiny_model: Path, data: Path, run, tmp_path: Path) -> None:
    (tmp_path / "schedule.yaml").write_text("lr_schedule: {name: cosine_decay, arguments: [1.0e-3, 8], warmup: 3}\n")
    if "quantized" in more:
        converted = run("-m", "mlx_lm", "convert", "--hf-path", str(tiny_model), "--mlx-path", "quantized", "-q")
        assert converted.returncode == 0, converted.stderr
    data = of_many_lengths(data, tmp_path / "lengths")
    stock = run("-m", "mlx_lm", "lora", *job(tiny_model, data, "stock", *more))
    assert stock.returncode == 0, stock.stderr
    command = ("-m", "compiled_adam.cli", "lora", *job(tiny_model, data, "ours", *more, "--like-mlx-lm"))
    ours = run(*command, COMPILED_ADAM_BLAS="off")  # sums in another order would differ more than we do
    assert ours.returncode == 0, ours.stderr
    files = {path.name for path in (tmp_path / "stock").iterdir()}
    assert files >= {"adapters.safetensors", "adapter_config.json"}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files | {
        "log.jsonl",
        "run.json",
        "checkpoints",
        ".lock",
    }
    a, b = (mx.load(str(tmp_path / which / "adapters.safetensors")) for which in ("ours", "stock"))
    assert a.keys() == b.keys()
    for path in a:
        # Adam divides by sqrt(v): where that is tiny, rounding of the gradient moves the whole step.
        np.testing.assert_allclose(np.array(a[path]), np.array(b[path]), atol=1e-3 * mx.abs(b[path]).max().item())
    losses = reported_losses(ours.stdout)
    assert len(losses) == 8 and all(np.isfinite(losses))


def test_generate_fuse_and_test_work_on_the_result(tiny_model: Path, data: Path, run, command, tmp_path: Path) -> None:
    options = "--max-grad-norm 1.0 --moments 8bit --optimizer adamw --weight-decay 0.1 --decay-matrices-only --test"
    done = command("lora", *job(tiny_model, data, "out", *options.split()))
    assert done.returncode == 0, done.stderr
    assert "Test loss" in done.stdout
    model = ("--model", str(tiny_model), "--adapter-path", "out")
    generated = run("-m", "mlx_lm", "generate", *model, "--prompt", "To", "-m", "3")
    assert "Generation: 3 tokens" in generated.stdout, generated.stderr
    fused = run("-m", "mlx_lm", "fuse", *model, "--save-path", "fused")
    assert fused.returncode == 0 and (tmp_path / "fused" / "model.safetensors").exists(), fused.stderr
    tested = command("lora", *model, "--data", str(data), "--test", "--batch-size", "2")
    assert re.search(r"Test loss \S+", tested.stdout).group() == re.search(r"Test loss \S+", done.stdout).group()


def test_command_line_before_yaml_before_defaults(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("iters: 7\nmoments: 8bit\nclear_cache_threshold: 5\nskip_nonfinite: false\nseed: 3\n")
    found = lora_options.settings(["-c", str(config), "--iters", "9", "--bias-correction"])
    assert (found.iters, found.seed, found.batch_size) == (9, 3, mlx_lm_lora.CONFIG_DEFAULTS["batch_size"])
    assert (found.moments, found.clear_cache_threshold, found.skip_nonfinite) == ("8bit", 5, False)
    assert (found.bias_correction, found.max_traces, found.max_grad_norm) == (True, 64, None)


def test_every_option_of_mlx_lm_is_there() -> None:
    stock = {action.dest for action in mlx_lm_lora.build_parser()._actions}
    assert stock <= {action.dest for action in lora_options.parser()._actions}
    assert {action.dest for action in lora_options.parser()._actions} - stock == set(lora_options.OURS)
    assert all(action.help for action in lora_options.parser()._actions)
    # Every option and its default are said.
    text = " ".join(lora_options.parser().format_help().split())
    for words in ("unlike mlx_lm.lora", "so a small threshold makes steps slow", "--no-skip-nonfinite", "log.jsonl"):
        assert words in text, words


def optimizer(*argv: str) -> optim.Optimizer:
    return lora_command.make_optimizer(lora_options.settings(argv))


def test_optimizers_and_their_options() -> None:
    made = optimizer()
    assert type(made) is ca.Adam and made.bias_correction and made.skipped is not None
    made = optimizer("--optimizer", "adamw", "--no-bias-correction", "--no-skip-nonfinite", "--weight-decay", "0.3")
    assert type(made) is ca.AdamW and not made.bias_correction and made.skipped is None and made.weight_decay == 0.3
    assert type(optimizer("--optimizer", "muon", "--like-mlx-lm")) is optim.Muon
    made = optimizer("--optimizer", "lion", "--max-grad-norm", "0.5")
    assert type(made) is ca.Compensated and type(made.wrapped) is optim.Lion
    assert made.options == {"compensated": True, "max_grad_norm": 0.5, "skip_nonfinite": True}
    assert not optimizer("--optimizer", "sgd", "--no-skip-nonfinite").options["skip_nonfinite"]
    assert type(optimizer("--optimizer", "sgd", "--no-skip-nonfinite", "--like-mlx-lm")) is optim.SGD  # as without it


def test_muon_is_for_matrices_of_layers_and_adamw_for_the_rest(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(
        "lr_schedule: {name: cosine_decay, arguments: [1.0e-2, 100]}\n"
        "optimizer_config: {muon: {momentum: 0.8}, adamw: {betas: [0.8, 0.9]}}\n"
    )
    made = optimizer("-c", str(config), "--optimizer", "muon")
    muon, adamw = made.wrapped.optimizers
    assert (muon.momentum, adamw.betas, adamw.bias_correction) == (0.8, [0.8, 0.9], True)
    assert adamw.learning_rate.item() == pytest.approx(0.015 * muon.learning_rate.item(), rel=1e-6)  # float32
    # Without a schedule as well; and with a factor of one's own, which a resumed run must share.
    made = optimizer("--optimizer", "muon", "--learning-rate", "2e-2")
    assert [part.learning_rate.item() for part in made.wrapped.optimizers] == pytest.approx([2e-2, 3e-4], rel=1e-6)
    assert made.wrapped.optimizers[1].betas == (0.9, 0.95)
    config.write_text("{optimizer: muon, learning_rate: 2.0e-2, optimizer_config: {muon: {adamw_rate_factor: 0.5}}}")
    other = optimizer("-c", str(config))
    assert [part.learning_rate.item() for part in other.wrapped.optimizers] == pytest.approx([2e-2, 1e-2], rel=1e-6)
    assert len(differences(any_optimizer.description(made), any_optimizer.description(other))) == 1
    with pytest.raises(ca.InputError, match=r"adamw_rate_factor, but .* has no AdamW"):
        optimizer("-c", str(config), "--like-mlx-lm")
    matrix, vector = mx.ones((4, 4), mx.bfloat16), mx.ones((4,), mx.bfloat16)
    layer = {"q_proj": {"weight": matrix, "bias": vector}, "norm": {"weight": vector}, "embed": {"weight": matrix}}
    layer["conv"] = {"weight": mx.ones((2, 2, 2), mx.bfloat16)}
    made.init({"model": {"embed_tokens": {"weight": matrix}, "layers": [layer]}, "lm_head": {"weight": matrix}})
    found = [{path for path, _ in tree_flatten(part.state) if path.endswith(".v")} for part in made.wrapped.optimizers]
    assert found[0] == {"model.layers.0.q_proj.weight.v"}
    assert len(found[1]) == 6


def test_optimizer_config_of_yaml(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    schedule = "lr_schedule: {name: cosine_decay, arguments: [1.0, 100], warmup: 10}\n"
    config.write_text(
        schedule + "optimizer: adamw\noptimizer_config: {adamw: {betas: [0.8, 0.9], weight_decay: 0.2}}\n"
    )
    made = optimizer("-c", str(config), "--weight-decay", "0.3")
    assert (made.betas, made.weight_decay, made.learning_rate.item()) == ([0.8, 0.9], 0.3, 0.0)
    config.write_text("optimizer_config: {adam: {beta: 0.8}}\n")
    with pytest.raises(ValueError, match=r"optimizer_config of adam has the key 'beta'"):
        optimizer("-c", str(config))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resume", "here", "--resume-adapter-file", "a"], "give one of them. Or give --resume without a path"),
        (["--allow-change", "data"], "allow_change is about a checkpoint's settings, but there is no --resume"),
        (["--decay-matrices-only", "--weight-decay", "0"], "weight_decay is 0; leave one of them out"),
        (["--model", "a/b/c"], "model is 'a/b/c', which does not exist"),
    ],
)
def test_options_that_contradict_each_other(argv: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        lora_command.run(lora_options.settings(["--train", "--data", str(tmp_path), *argv]))


@pytest.mark.parametrize(
    "flag", ["--resume", "--save-best", "--bucket", "--moments=8bit", "--max-grad-norm=1", "--keep-checkpoints=0"]
)
def test_options_of_training_without_it(flag: str) -> None:
    name = flag[2:].split("=")[0].replace("-", "_")
    with pytest.raises(ValueError, match=rf"{name} \(--{name.replace('_', '-')}\) is an option of training"):
        lora_command.run(lora_options.settings(["--test", flag]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("iters: many", "iters is 'many'; it must be a whole number"),
        ("batch_size: 2.5", "batch_size is 2.5; it must be a whole number"),
        ("max_grad_norm: [1]", r"max_grad_norm is \[1\]; it must be a number"),
        ("train: 1", "train is 1; it must be true or false"),
        ("save_best: maybe", "save_best is 'maybe'; it must be true or false"),
        ("moments: 4bit", "moments is '4bit'; it must be one of float32"),
        ("fine_tune_type: lorra", "fine_tune_type is 'lorra'; it must be one of lora, dora, full"),
        ("keep_checkpoint: 3", "unknown key 'keep_checkpoint'"),
        ("iters: [", "job.yaml is not YAML: .*expected"),
        ("steps_per_eval: .inf", "steps_per_eval is inf; it must be a whole number"),
        ("optimizer_config: 3", "optimizer_config is 3; it must be a mapping"),
        ("report_to: 3", "report_to is 3; it must be text"),
        ("report_to: tensorboard", r"report_to \(--report-to\) is 'tensorboard'; it must be one of wandb, swanlab"),
        ("reduce_dtype: [param]", r"reduce_dtype is \['param'\]; it must be one of float32"),
        ("reduce_dtype: {a: 1}", "reduce_dtype is {'a': 1}; it must be one of float32"),
        (f"val_batches: {10**20}", rf"val_batches \(--val-batches\) is {10**20}; it must be a whole number from 1 to"),
        (
            f"lora_parameters: {{rank: {10**20}, scale: 1.0, dropout: 0.0}}",
            f"rank is {10**20}; it must be a whole number from 1 to 65536",
        ),
        ("clear_cache_threshold: 4XB", "clear_cache_threshold is '4XB'; it must be a size such as 500MB or 4GB"),
    ],
)
def test_yaml_values_that_the_command_line_would_refuse(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        lora_options.settings(["-c", str(tmp_path / "job.yaml")])


def test_yaml_values_of_every_kind(tmp_path: Path) -> None:
    numbers = "iters: 1.0e1\nseed: 1.0\nclear_cache_threshold: 2GB\nlearning_rate: 1e-4\nbucket: 2\n"
    (tmp_path / "job.yaml").write_text(numbers + "resume: auto\nallow_change: [data]\nreport_to: wandb\n")
    found = lora_options.settings(["-c", str(tmp_path / "job.yaml")])
    assert (found.clear_cache_threshold, found.learning_rate, found.bucket) == (2_000_000_000, 1e-4, 2)
    assert (found.resume, found.allow_change, found.report_to) == ("auto", ["data"], "wandb")
    assert (repr(found.iters), repr(found.seed)) == ("10", "1")
    for text, resume in (("true", "auto"), ("false", None)):
        (tmp_path / "job.yaml").write_text(f"resume: {text}\nallow_change: learning_rate\n")
        found = lora_options.settings(["-c", str(tmp_path / "job.yaml")])
        assert (found.resume, found.allow_change) == (resume, ["learning_rate"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--optimizer", "sgd", "--moments", "8bit"],
            r"moments \(--moments\) is an option of adam and adamw, but the optimizer is sgd",
        ),
        (
            ["--optimizer", "muon", "--skip-nonfinite", "--like-mlx-lm"],
            r"skip_nonfinite \(--skip-nonfinite\) changes what mlx-lm's muon computes",
        ),
        (
            ["--weight-decay", "0.1"],
            r"weight_decay \(--weight-decay\) is an option of adamw, but the optimizer is adam",
        ),
        (["--weight-decay", "0"], r"weight_decay \(--weight-decay\) is an option of adamw, but the optimizer is adam"),
        (["--optimizer", "sgd", "--no-bias-correction"], r"bias_correction \(.*\) is an option of adam and adamw, but"),
        (["--decay-matrices-only"], r"decay_matrices_only \(--decay-matrices-only\) is an option of adamw"),
        (["--max-grad-norm", "-1"], r"max_grad_norm \(--max-grad-norm\) is -1.0"),
    ],
)
def test_options_that_cannot_apply_are_errors(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(*argv)


def test_what_cannot_be_done_is_one_sentence(tiny_model: Path, data: Path, command, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("iterations: 3\n")
    (tmp_path / "list.yaml").write_text("- 3\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty" / "train.jsonl").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "rank.yaml").write_text("lora_parameters: {rank: 8, alpha: 16}\n")
    (tmp_path / "file").write_text("")
    model = ("--model", str(tiny_model))
    train = (*model, "--data", str(data), "--train", "--num-layers", "2")
    for arguments, message in (
        ((*model, "--data", str(data)), "give --train, --test or both"),
        (("-c", "typo.yaml"), "unknown key 'iterations'"),
        (("-c", "list.yaml"), "not a mapping"),
        (("-c", "missing.yaml"), "there is no file missing.yaml; `compiled-adam init missing.yaml` writes one"),
        (("--model", "missing/model/folder", "--data", str(data), "--train"), "model is 'missing/model/folder', which"),
        ((*model, "--data", "./missing", "--train"), "data is './missing', which does not exist"),
        ((*model, "--data", "empty", "--train"), "empty/train.jsonl has no examples"),
        ((*model, "--data", "nothing", "--train"), "Training set not found or empty"),
        (
            (
                *model,
                "--data",
                str(data),
                *["--train", "--num-layers", "2", "--batch-size", "1000", "--no-group-by-length"],
            ),
            "at least batch_size=1000",
        ),
        (
            (*model, "--data", str(data), "--train", "--num-layers", "99"),
            "num_layers (--num-layers) is 99, but the model has 4",
        ),
        ((*model, "--data", str(data), "--train"), "num_layers (--num-layers) is 16 by default, but the model has 4"),
        (("--model", "broken", "--data", str(data), "--train"), "broken/config.json has no model_type"),
        ((*model, "--data", "dataa", "--train"), "data is 'dataa', which is no folder"),
        (
            (*model, "--data", "lines", "--train"),
            "lines/train.jsonl line 2 is not JSON (Expecting value: line 1 column 1 (char 0)): 'not json'",
        ),
        (
            (*train, "--resume-adapter-file", "none.safetensors"),
            "resume_adapter_file (--resume-adapter-file) is 'none.safetensors', which does not exist",
        ),
        # Before the model is loaded, whose config would be named.
        (
            ("--model", "broken", "--data", str(data), "--train", "--resume", "none"),
            "none is not a checkpoint: there is no such folder",
        ),
        ((*train, "-c", "rank.yaml"), "lora_parameters has the key 'alpha'; the keys are rank, scale, dropout, keys"),
        ((*train, "--adapter-path", "file"), "file is a file; give a folder for the adapters"),
        ((*train, "--bucket", "0"), "bucket (--bucket) is 0.0; the ratio of the lengths must be from 1.01 to 1000"),
        ((*train, "--save-every", "0"), "save_every (--save-every) is 0"),
        ((*train, "--batch-size", "20"), "the validation set has 8 examples, fewer than batch_size=20"),
        ((*train, "--test", "--batch-size", "20"), "the test set has 8 examples, fewer than batch_size=20"),
        ((*model, "--data", str(data), "--test", "--adapter-path", "nothing"), "adapter_config.json does not exist"),
        (("--clear-cache-threshold", "4XB"), "a size such as 500MB or 4GB, not '4XB'"),
        (("--iters", "many"), "--iters is 'many'; it must be a whole number"),
        (("--no-such-flag",), "lora has no option --no-such-flag"),
    ):
        done = command("lora", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr.splitlines()[-1], (arguments, done.stderr)
        assert "Traceback" not in done.stderr


def test_resuming_on_the_command_line(tiny_model: Path, data: Path, command, tmp_path: Path) -> None:
    def lora(out: str, *more: str):
        options = ("--bucket", "--save-best", "--grad-accumulation-steps", "3", "--steps-per-eval", "4", *more)
        return command("lora", *job(tiny_model, data, out, *options))

    first = lora("parts", "--iters", "5")
    assert re.search(r"bucket 1\.25: at most \d+ traces, [\d.]+ % padding \(without --bucket: \d", first.stdout)
    wrong = lora("parts", "--resume", "--learning-rate", "1e-4")
    assert wrong.returncode == 2 and re.search(r"--learning-rate +0\.0001 +0\.001", wrong.stderr)
    assert lora("parts", "--resume").returncode == 0
    assert {path.name for path in (tmp_path / "parts").iterdir()} >= {"best", "checkpoints", "log.jsonl"}
    again = lora("parts", "--resume", "--learning-rate", "1e-4", "--allow-change", "learning_rate", "--iters", "9")
    assert again.returncode == 0 and "lr 1.00e-04" in again.stdout, again.stderr
    damaged = tmp_path / "parts" / "checkpoints" / "0000009" / "weights.safetensors"
    damaged.write_bytes(b"")
    back = lora("parts", "--resume", "--iters", "9")
    assert "warning: " in back.stdout and "trying the checkpoint before it" in back.stdout and back.returncode == 0
    assert "resumed from parts/checkpoints/0000008" in back.stdout


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_training(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    command = " ".join([sys.executable, "-m", "compiled_adam.cli", "lora", *job(tiny_model, data, "out")])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(f"{command} | head -n 2", shell=True, cwd=tmp_path, env=environment, timeout=120, check=True)
    assert (tmp_path / "out" / "adapters.safetensors").exists()
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 8 + 2  # and two validations


def test_another_model_or_other_data_is_not_resumed(tiny_model: Path, data: Path, command, tmp_path: Path) -> None:
    def lora(model: Path, data: Path, *more: str):
        return command("lora", *job(model, data, "out", *more))

    assert lora(tiny_model, data).returncode == 0
    other, edited = tmp_path / "model", tmp_path / "data"
    shutil.copytree(tiny_model, other)
    weights = mx.load(str(other / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001
    mx.save_safetensors(str(other / "model.safetensors"), weights, metadata={"format": "mlx"})
    shutil.copytree(data, edited)
    (edited / "train.jsonl").write_text((data / "train.jsonl").read_text().replace("a", "e", 1))
    for model, texts, name in ((other, data, "model"), (tiny_model, edited, "data")):
        done = lora(model, texts, "--resume")
        assert done.returncode == 2 and re.search(rf"^  {name} ", done.stderr, re.M), done.stderr
    done = lora(tiny_model, data, "--resume", "--val-batches", "1")
    assert done.returncode == 2 and re.search(r"^  --val-batches +1 +2$", done.stderr, re.M)


@pytest.mark.parametrize(
    ("example", "asked"),
    [
        ({"messages": "no list", "prompt": "of  the example"}, "of the example"),
        ({"messages": ["no dictionary", {"role": "user", "content": "a question"}]}, "a question"),
        ({"messages": [{"role": "user", "content": ["parts"]}]}, "Hello"),
        ({}, "Hello"),
    ],
)
def test_the_line_after_a_run_has_a_prompt_whatever_the_data_are(example: dict, asked: str) -> None:
    assert lora_screen.prompt(example) == asked
