"""The options of `compiled-adam lora` about batches: how they are made, how many there are, and what mlx-lm does."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.optimizers as optim
import pytest
from compiled_adam.commands import like_mlx_lm, lora_options
from compiled_adam.commands import lora as lora_command

from tests.commands.test_lora_command import of_many_lengths, reported_losses

Lora = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def lora(tiny_model: Path, data: Path, command, tmp_path: Path) -> Lora:
    """Trains on 23 texts of 20 to 100 characters."""
    folder = of_many_lengths(data, tmp_path / "lengths")

    def lora(out: str, *more: str) -> subprocess.CompletedProcess[str]:
        fixed = ["--model", str(tiny_model), "--data", str(folder), "--adapter-path", out, "--num-layers", "2"]
        rate = [] if "rate.yaml" in more else ["--learning-rate", "1e-3"]
        return command("lora", "--train", *fixed, *rate, "--batch-size", "2", "--steps-per-report", "1", *more)

    return lora


def losses(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr
    return reported_losses(done.stdout)


def test_epochs_instead_of_iterations(lora: Lora) -> None:
    done = lora("out", "--epochs", "1.5")
    assert len(losses(done)) == 18
    assert "18 iterations = 1.5 epochs of 12 batches of 1 to 2 examples of similar length; " in done.stdout
    assert re.search(r"; \d shapes, \d+\.\d % padding\n", done.stdout)
    done = lora("out", "--epochs", "1", "--no-group-by-length")
    assert "11 iterations = 1 epochs of 11 batches\n" in done.stdout and len(losses(done)) == 11  # one is left out
    assert "5 iterations = 0.455 epochs of 11 batches" in lora("out", "--iters", "5", "--like-mlx-lm").stdout
    done = lora("out", "--epochs", "2", "--batch-tokens", "256")
    count = int(re.search(r"= 2 epochs of (\d+) batches of \d+ to \d+ examples", done.stdout)[1])
    assert len(losses(done)) == 2 * count < 12
    assert json.loads((Path("out") / "adapter_config.json").read_text())["iters"] == 2 * count
    shorter = lora("out", "--epochs", "1", "--batch-tokens", "256", "--resume").stdout
    assert f"all {count} iterations are done; to train on, give more iters (--iters) or epochs\n" in shorter
    assert f"\n{2 * count} iterations, 0 of them now, in " in shorter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "2", "--iters", "5"), "iters (--iters) is given beside epochs, which says how long to train"),
        (("--epochs", "0"), "epochs (--epochs) is 0.0; it must be a number above 0"),
        (("--epochs", "1e18"), "epochs (--epochs) is 1e+18, which no run can finish; give fewer"),
        (("--epochs", "inf"), "epochs (--epochs) is inf; it must be a number above 0"),
        (("--batch-tokens", "0"), "batch_tokens (--batch-tokens) is 0; it must be a whole number of at least 1"),
        (("--batch-tokens", "20"), "batch_tokens (--batch-tokens) is 20, but the longest example takes "),
        (("--batch-tokens", "99", "--no-group-by-length"), "but group_by_length is off; leave one of them out"),
    ],
)
def test_options_that_cannot_be(options: tuple[str, ...], message: str, lora: Lora) -> None:
    done = lora("out", *options)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


def test_a_schedule_is_checked_for_the_iterations_of_the_epochs(lora: Lora, tmp_path: Path) -> None:
    (tmp_path / "rate.yaml").write_text("lr_schedule: {name: step_decay, arguments: [1.0e-3, 1.0e+25, 15]}\niters: 9\n")
    first = lora("out", "-c", "rate.yaml", "--epochs", "1")
    assert len(losses(first)) == 12
    done = lora("out", "-c", "rate.yaml", "--epochs", "3")  # infinite from update 30 on
    assert done.returncode == 2 and "learning rate inf at update 30 of 36" in done.stderr.splitlines()[-1], done.stderr
    assert "note: iters is not used, because there is epochs, which says how long to train" in first.stdout


@pytest.mark.parametrize("options", [(), ("--batch-tokens", "256"), ("--bucket", "--grad-accumulation-steps", "3")])
def test_a_resumed_run_is_the_same_run(options: tuple[str, ...], lora: Lora) -> None:
    expected = losses(lora("whole", "--iters", "17", *options))
    parts = [lora("parts", "--iters", count, "--resume", *options) for count in ("5", "13", "17")]
    assert [loss for part in parts for loss in losses(part)] == expected
    one, other = (mx.load(f"{out}/adapters.safetensors") for out in ("whole", "parts"))
    assert all(mx.array_equal(array, other[path]).item() for path, array in one.items())


@pytest.mark.filterwarnings("default:the checkpoint is at")
def test_a_run_is_not_resumed_with_other_batches(lora: Lora) -> None:
    lora("out", "--iters", "3", "--no-group-by-length")
    done = lora("out", "--iters", "5", "--resume")
    assert done.returncode == 2 and re.search(r"(?m)^  --group-by-length +True +-$", done.stderr), done.stderr
    assert len(losses(lora("out", "--iters", "5", "--resume", "--no-group-by-length"))) == 2
    done = lora("out", "--iters", "7", "--resume", "--allow-change", "group_by_length")
    assert len(losses(done)) == 2 and "an epoch has 12 now: a new epoch begins" in done.stderr


def test_validations_are_of_the_same_examples(lora: Lora) -> None:
    # All that fill a batch. With fewer --val-batches, which ones is drawn at random, as in mlx-lm.
    found = {
        re.search(r"validation loss (\S+)", lora("out", "--iters", "1", "--val-batches", "-1", *options).stdout)[1]
        for options in ((), ("--no-group-by-length",), ("--batch-tokens", "300"), ("--bucket",))
    }
    assert len(found) == 1


# --like-mlx-lm.


def test_it_changes_defaults_and_explicit_options_win(tmp_path: Path) -> None:
    def made(*argv: str):
        args = lora_options.settings(["--train", *argv])
        return args, lora_command.make_optimizer(args)

    args, optimizer = made()
    assert args.group_by_length and optimizer.bias_correction and optimizer.skipped is not None
    assert args.chunked_loss
    args, optimizer = made("--like-mlx-lm")
    assert not args.group_by_length and not optimizer.bias_correction and optimizer.skipped is None
    assert lora_command._loss(args, ca) is ca.losses.like_mlx_lm
    args, optimizer = made("--like-mlx-lm", "--group-by-length", "--bias-correction")
    assert args.group_by_length and optimizer.bias_correction and optimizer.skipped is None
    assert type(made("--like-mlx-lm", "--optimizer", "sgd")[1]) is optim.SGD
    assert type(made("--optimizer", "sgd")[1]) is ca.Compensated
    (tmp_path / "job.yaml").write_text("like_mlx_lm: true\noptimizer_config: {adam: {bias_correction: true}}\n")
    args, optimizer = made("-c", str(tmp_path / "job.yaml"), "--skip-nonfinite")
    assert args.like_mlx_lm and optimizer.bias_correction and optimizer.skipped is not None
    assert not made("-c", str(tmp_path / "job.yaml"), "--no-like-mlx-lm")[0].like_mlx_lm
    (tmp_path / "job.yaml").write_text("like_mlx_lm: true\ngroup_by_length: true\n")
    assert made("-c", str(tmp_path / "job.yaml"))[0].group_by_length


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            [],
            "unlike mlx_lm.lora: batches of similar length, no loss on padding, bias correction, updates with NaN"
            " skipped (--like-mlx-lm for its results)",
        ),
        (["--like-mlx-lm"], "like mlx_lm.lora"),
        (["--like-mlx-lm", "--optimizer", "sgd"], "like mlx_lm.lora"),
        (["--like-mlx-lm", "--chunked-loss"], "like mlx_lm.lora, but for: no loss on padding"),
        (
            ["--like-mlx-lm", "--grad-accumulation-steps", "3", "--skip-nonfinite"],  # of 1000
            "like mlx_lm.lora, but for: updates with NaN skipped, last window applied",
        ),
        (
            ["--like-mlx-lm", "--grad-accumulation-steps", "2", "--batch-tokens", "4096"],
            "like mlx_lm.lora, but for: batches of similar length, accumulation weighted by tokens",
        ),
        (
            ["--no-group-by-length", "--optimizer", "sgd", "--no-skip-nonfinite"],
            "unlike mlx_lm.lora: no loss on padding (--like-mlx-lm for its results)",
        ),
    ],
)
def test_a_line_says_what_differs(argv: list[str], line: str) -> None:
    assert like_mlx_lm.differences(lora_options.settings(argv)) == line


def test_schedules_of_both() -> None:
    def rates(*argv: str, **config) -> list[float]:
        args = lora_options.settings(argv)
        args.lr_schedule = {"arguments": [1.0, 10], "warmup": 3, **config}
        return [like_mlx_lm.schedule(args)(mx.array(step)).item() for step in (3, 4)]

    ours, theirs = rates(name="cosine_decay"), rates("--like-mlx-lm", name="cosine_decay")
    assert ours[0] == theirs[0] == theirs[1] == 1 > ours[1]  # mlx-lm repeats the peak
    assert rates(name="cosine") == rates("--like-mlx-lm", name="cosine")  # which mlx-lm does not have
