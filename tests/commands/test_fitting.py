"""Which options are proposed, for jobs whose memory is a made-up number."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
from compiled_adam.commands.fitting import flags, found, remedies
from compiled_adam.commands.lora_options import settings


def job(*argv: str) -> types.SimpleNamespace:
    return settings(["--train", "--optimizer", "adamw", *argv])


def at_most(limit: float) -> Callable[[types.SimpleNamespace], bool]:
    """Positions count; half without all logits, half with layers computed again; 100 for the state in float32."""

    def fits(args: types.SimpleNamespace) -> bool:
        size = args.batch_tokens or args.batch_size * args.max_seq_length
        activations = size * (1 if args.chunked_loss else 2) * (1 if args.grad_checkpoint else 2)
        return activations + (10 if args.moments == "8bit" else 100) <= limit

    return fits


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (10**6, ""),
        (17_000, "--chunked-loss"),
        (8_300, "--chunked-loss --grad-checkpoint"),
        (8_210, "--chunked-loss --grad-checkpoint --moments 8bit"),
        (4_200, "--chunked-loss --grad-checkpoint --batch-size 2 --grad-accumulation-steps 2"),
        (2_200, "--chunked-loss --grad-checkpoint --batch-size 1 --grad-accumulation-steps 4"),
        (150, "--chunked-loss --grad-checkpoint --moments 8bit --batch-size 1 --grad-accumulation-steps 4"
        " --max-seq-length 128"),
    ],
)  # fmt: skip
def test_what_costs_least_comes_first_and_nothing_is_there_for_nothing(limit: int, expected: str) -> None:
    remedy = found(job("--no-chunked-loss"), 1, at_most(limit))
    assert remedy is not None and flags(remedy) == expected


def test_nothing_makes_it_fit() -> None:
    assert found(job(), 1, at_most(100)) is None


def test_a_cheap_option_that_another_makes_needless_is_left_out() -> None:
    def fits(args: types.SimpleNamespace) -> bool:
        return bool(args.moments == "8bit")

    assert found(job("--no-chunked-loss"), 1, fits) == {"moments": "8bit"}


def test_batches_stay_whole_at_every_worker_and_updates_the_same() -> None:
    def proposed(*argv: str, workers: int = 1) -> list[tuple[int, int]]:
        name = "batch_tokens" if "--batch-tokens" in argv else "batch_size"
        made = remedies(job(*argv), workers)
        return [(each[name], each["grad_accumulation_steps"]) for each in made if name in each]

    assert proposed("--batch-size", "8") == [(4, 2), (2, 4), (1, 8)]
    assert proposed("--batch-size", "12", "--grad-accumulation-steps", "3", workers=2) == [(6, 6)]
    assert proposed("--batch-size", "3") == []
    assert proposed("--batch-tokens", "8192") == [(4096, 2), (2048, 4)]  # an example of max_seq_length must fit
    assert not any("moments" in each for each in remedies(job("--optimizer", "sgd"), 1))
    assert not any("moments" in each for each in remedies(job("--moments", "8bit"), 1))
    assert [each["max_seq_length"] for each in remedies(job(), 1) if "max_seq_length" in each] == [1024, 512, 256, 128]
