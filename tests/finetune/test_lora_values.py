"""What the values of a job may be, from the command line and from YAML; none of it needs a model."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import compiled_adam as ca
import mlx.optimizers as optim
import pytest
from compiled_adam.base.errors import InputError
from compiled_adam.commands import lora as lora_command
from compiled_adam.commands import lora_options, lora_together
from compiled_adam.finetune.options import TrainOptions


def from_yaml(folder: Path, text: str, *argv: str):
    (folder / "job.yaml").write_text(text + "\n")
    return lora_options.settings(["-c", str(folder / "job.yaml"), *argv])


def notes(args) -> list[str]:
    return lora_together.check_together(args)


def test_a_default_is_written_once() -> None:
    """The keywords of `train` are the fields of `TrainOptions`, in this order; flags of the same name have the same."""
    keywords = [each for each in inspect.signature(ca.train).parameters.values() if each.kind is each.KEYWORD_ONLY]
    fields = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    assert [(each.name, each.default) for each in keywords] == list(fields.items())
    args = vars(lora_options.settings([]))
    shared = {name: args[name] for name in fields if name in lora_options.OURS}
    assert shared == {name: fields[name] for name in shared} | {"keep_checkpoints": None, "nonfinite_limit": 20}
    assert len(shared) == 9


RANGES = [
    ("num_layers", ["0", "-2", "-16"], "a whole number of at least 1, or -1 for all layers"),
    ("batch_size", ["0", "-1"], "a whole number of at least 1"),
    ("iters", ["0", "-1"], "a whole number of at least 1"),
    ("val_batches", ["0", "-2"], "a whole number of at least 1, or -1 for the whole validation set"),
    ("test_batches", ["0", "-5"], "a whole number of at least 1, or -1 for the whole test set"),
    ("learning_rate", ["-1", "nan", "inf", "-0.001", "1e39"], "a finite number of at least 0"),
    ("steps_per_report", ["0", "-1"], "a whole number of at least 1"),
    ("steps_per_eval", ["0", "-1"], "a whole number of at least 1"),
    ("save_every", ["0", "-1"], "a whole number of at least 1"),
    ("grad_accumulation_steps", ["0", "-1"], "a whole number of at least 1"),
    ("max_seq_length", ["1", "0", "-1"], "a whole number of at least 2"),
    ("seed", ["-1", str(2**32)], f"a whole number from 0 to {2**32 - 1}"),
    ("max_grad_norm", ["0", "-1", "nan", "inf"], "a number above 0"),
    ("weight_decay", ["-1", "nan", "inf"], "a finite number of at least 0"),
    ("max_traces", ["0", "-1"], "a whole number of at least 1"),
    (
        "bucket",
        ["1", "0", "-2", "nan", "inf", "1e9", "1.0000001"],
        "the ratio of the lengths must be from 1.01 to 1000",
    ),
    ("keep_checkpoints", ["-1"], "a whole number of at least 0"),
    ("early_stop_patience", ["0", "-1"], "a whole number of at least 1"),
    ("nonfinite_limit", ["0", "-1"], "a whole number of at least 1"),
    ("worker_timeout", ["0", "-1", "nan", "inf", "1e300"], "a number of seconds above 0"),
]


@pytest.mark.parametrize(("name", "values", "allowed"), RANGES, ids=[name for name, *_ in RANGES])
def test_numbers_out_of_their_range(name: str, values: list[str], allowed: str, tmp_path: Path) -> None:
    flag = "--" + name.replace("_", "-")
    for value in values:
        yaml = {"nan": ".nan", "inf": ".inf", "1e39": "1.0e+39"}.get(value, value)
        for read in (
            lambda value=value: lora_options.settings([f"{flag}={value}"]),
            lambda yaml=yaml: from_yaml(tmp_path, f"{name}: {yaml}"),
        ):
            with pytest.raises(InputError) as error:
                read()
            assert f"{name} ({flag}) is " in str(error.value) and allowed in str(error.value), error.value


def test_the_ends_of_the_ranges(tmp_path: Path) -> None:
    line = (
        "--num-layers -1 --val-batches -1 --test-batches -1 --learning-rate 0 --keep-checkpoints 0 --seed 4294967295"
        " --weight-decay 0 --iters 1 --clear-cache-threshold 0 --max-seq-length 2 --bucket 1.01"
    )
    found = lora_options.settings(line.split())
    assert (found.num_layers, found.learning_rate, found.seed, found.keep_checkpoints) == (-1, 0.0, 2**32 - 1, 0)
    with pytest.raises(InputError, match="clear_cache_threshold is -5; it must be a size such as 500MB"):
        from_yaml(tmp_path, "clear_cache_threshold: -5")
    with pytest.raises(InputError, match="a size such as 500MB or 4GB, not ''"):
        lora_options.settings(["--clear-cache-threshold", ""])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0, alpha: 128}",
            "has the key 'alpha'.*scale, which is alph",
        ),
        (
            "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0, drop_out: 0.5}",
            "has the key 'drop_out'; the keys are",
        ),
        ("lora_parameters: {rank: 8, scale: 20.0}", "has no dropout; it needs rank, scale, dropout"),
        ("lora_parameters: {}", "has no rank"),
        *(
            (
                f"lora_parameters: {{rank: {rank}, scale: 20.0, dropout: 0.0}}",
                "rank is .*; it must be a whole number from 1",
            )
            for rank in ("0", "-1", "1.5", "true", "many", ".inf", "[8]")
        ),
        *(
            (f"lora_parameters: {{rank: 8, scale: {scale}, dropout: 0.0}}", "scale is .*; it must be a finite number")
            for scale in (".nan", "-.inf", "0", "true", "'20'")
        ),
        *(
            (f"lora_parameters: {{rank: 8, scale: 20.0, dropout: {dropout}}}", r"dropout is .*; it must be in \[0, 1\)")
            for dropout in ("1", "1.0", "-0.1", ".nan", "'0.1'", "false")
        ),
        *(
            (
                f"lora_parameters: {{rank: 8, scale: 20.0, dropout: 0.0, keys: {keys}}}",
                "keys is .*; it must be a list of",
            )
            for keys in ("[]", "self_attn.q_proj", "[1]", "{a: b}")
        ),
        ("optimizer_config: {AdamW: {weight_decay: 5.0}}", "has the key 'AdamW'; the keys are adam, .*: write adamw"),
        ("{optimizer: adamw, optimizer_config: {weight_decay: 5.0}}", r"\{adamw: \{weight_decay: 5.0\}\}"),
        ("optimizer_config: {rprop: {}}", "has the key 'rprop'; the keys are adam, adamw, muon, sgd, lion, adafactor"),
        ("optimizer_config: {adam: 3}", "adam is 3; it must be a mapping"),
        (
            "optimizer_config: {adam: {weight_decay: 0.1}}",
            "of adam has the key 'weight_decay'; the keys are betas, eps",
        ),
        ("optimizer_config: {adamw: {learning_rate: 0.1}}", "has the key 'learning_rate'.*an option of its own"),
        ("optimizer_config: {adamw: {betas: [0.9, .nan]}}", "optimizer_config of adamw: beta2 of betas is nan"),
        ("optimizer_config: {adamw: {betas: 0.9}}", "optimizer_config of adamw: betas is 0.9; it must be two numbers"),
        ("optimizer_config: {adamw: {groups: {lora_b: {lr: 2}}}}", "of adamw: groups\\['lora_b'\\] has the key 'lr'"),
        ("optimizer_config: {adam: {groups: {b: {weight_decay: 0}}}}", "adam: groups.*; weight decay is in AdamW"),
        ("optimizer_config: {adamw: {weight_decay: '0.1'}}", "weight_decay is '0.1'.*write it without quotes"),
        ("optimizer_config: {sgd: {momentum: .inf}}", "optimizer_config of sgd: momentum is inf"),
        ("optimizer_config: {sgd: {momentum: -1}}", "optimizer_config of sgd: momentum is -1"),
        ("optimizer_config: {sgd: {nesterov: true}}", "optimizer_config of sgd: Nesterov"),
        ("optimizer_config: {sgd: {nesterov: 1}}", "nesterov is 1; it must be true or false"),
        ("optimizer_config: {muon: {ns_steps: 1.5}}", "ns_steps is 1.5; it must be a whole number of at least 1"),
        ("optimizer_config: {muon: {adamw_rate_factor: 0}}", "of muon: adamw_rate_factor is 0; it must be above 0"),
        (
            "optimizer_config: {muon: {adamw_rate_factor: -0.1}}",
            "adamw_rate_factor is -0.1; it must be a finite number",
        ),
        ("optimizer_config: {muon: {adamw_rate_factor: .inf}}", "adamw_rate_factor is inf; it must be a finite number"),
        ("optimizer_config: {muon: {adamw_rate_factor: '1'}}", "adamw_rate_factor is '1'.*write it without quotes"),
        ("optimizer_config: {adamw: {adamw_rate_factor: 1}}", "of adamw has the key 'adamw_rate_factor'; the keys are"),
        ("optimizer_config: {adafactor: {eps: 1.0e-3}}", "eps is 0.001; it must be a list of 2 numbers"),
        ("lr_schedule: {name: cosine_decay, arguments: [.nan, 10]}", r"lr_schedule: arguments\[0\] is nan"),
        ("lr_schedule: {name: cosine_decay, arguments: ['1e-5', 10]}", "'1e-5'.*write it without quotes"),
        (
            "lr_schedule: {name: Cosine, arguments: [1.0, 10]}",
            "lr_schedule: name is 'Cosine'; it must be one of cosine",
        ),
        ("lr_schedule: {name: cosine, arguments: [1.0, 10], warmup: 2.5}", "lr_schedule: warmup is 2.5"),
        ("lr_schedule: {name: cosine, arguments: [1.0, 10], warmup: -1}", "lr_schedule: warmup is -1"),
        ("lr_schedule: {}", "lr_schedule: name is None"),
        ("lr_schedule: {name: exponential_decay, arguments: [1.0e-3, 3.0]}", "gives the learning rate inf at update 8"),
        (
            "lr_schedule: {name: cosine_decay, arguments: [1.0e-3, 0]}",
            "lr_schedule: decay_steps must be greater than 0",
        ),
        (
            "hf_dataset: {name: billsum}",
            "hf_dataset has the key 'name'; the keys are path, .*that of a data set is path",
        ),
        ("hf_dataset: {path: billsum, prompt: text}", "hf_dataset has the key 'prompt'"),
        ("hf_dataset: {path: billsum, mask_prompt: true}", "mask_prompt is an option of its own"),
        ("hf_dataset: [{path: a}, {train_split: train}]", r"hf_dataset\[1\] has no path"),
        ("hf_dataset: []", "hf_dataset is an empty list"),
        ("hf_dataset: [billsum]", r"hf_dataset\[0\] is 'billsum'; it must be a mapping"),
        ("hf_dataset: {path: 3}", "hf_dataset: path is 3; it must be text"),
        ("hf_dataset: {path: }", "hf_dataset: path is None; it must be text"),
        ("hf_dataset: {path: a, config: main}", "hf_dataset: config is 'main'; it must be a mapping"),
        ("{test: true, hf_dataset: {path: a}}", "hf_dataset has no test_split, which --test needs"),
        ("prompt_feature: 3", "prompt_feature is 3; it must be text"),
        ("learning_rate: '1e-5'", "learning_rate is '1e-5'; it must be a number, without quotes"),
        ("learning_rate: true", "learning_rate is True; it must be a number"),
        ("learning-rate: 0.1", "unknown key 'learning-rate'; did you mean learning_rate"),
        ("config: other.yaml", "unknown key 'config'"),
        ("iters: 3\niters: 4", "the key 'iters' is there twice"),
        ("lora_parameters: {rank: 8, scale: 1.0, dropout: 0.0, rank: 4}", "the key 'rank' is there twice"),
    ],
)
def test_nested_keys_and_their_values(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        from_yaml(tmp_path, text)


def test_what_mlx_lm_takes_is_taken(tmp_path: Path) -> None:
    found = from_yaml(
        tmp_path,
        "optimizer: AdamW\noptimizer_config: {adamw: {betas: [0.9, 0.98], eps: 1e-6}, sgd: {momentum: 0.9}, adam: }\n"
        "lora_parameters: {rank: 8.0, scale: -1, dropout: 0, keys: [self_attn.q_proj]}\ntrust_remote_code: true\n"
        "hf_dataset:\n- {path: a, train_split: 'train[:10]', config: {name: main}}\n- {path: b, chat_feature: m}",
    )
    assert (found.optimizer, found.trust_remote_code) == ("adamw", True)
    assert repr(found.lora_parameters["rank"]) == "8"
    made = lora_command.make_optimizer(found)
    assert type(made) is ca.AdamW and (list(made.betas), made.eps) == ([0.9, 0.98], 1e-6)
    assert lora_options.settings(["--optimizer", "AdamW"]).optimizer == "adamw"
    adafactor = from_yaml(tmp_path, "optimizer: adafactor\noptimizer_config: {adafactor: {decay_rate: -0.5}}")
    wrapped = lora_command.make_optimizer(adafactor).wrapped
    assert isinstance(wrapped, optim.Adafactor) and wrapped.decay_rate == -0.5
    # A merge key of YAML has what the mapping overrides.
    text = "lora_parameters: {<<: {rank: 4, scale: 1.0}, rank: 8, dropout: 0.0}"
    assert from_yaml(tmp_path, text).lora_parameters == {"rank": 8, "scale": 1.0, "dropout": 0.0}


SCHEDULE = "lr_schedule: {name: cosine_decay, arguments: [1.0e-3, 1000]}"  # as long as the run


def test_a_learning_rate_beside_a_schedule(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"learning_rate \(--learning-rate\) is given beside lr_schedule"):
        notes(from_yaml(tmp_path, SCHEDULE, "--train", "--learning-rate", "1e-4"))
    assert notes(from_yaml(tmp_path, SCHEDULE, "--train")) == []  # the default is not given
    both = from_yaml(tmp_path, f"{SCHEDULE}\nlearning_rate: 1e-5", "--train")  # mlx-lm's example file has both
    assert notes(both) == ["learning_rate is not used, because there is lr_schedule, which sets the learning rate"]
    # float32's rounding of the first value
    assert lora_command.make_optimizer(both).learning_rate.item() == pytest.approx(1e-3, rel=1e-6)


def test_data_beside_a_data_set_of_hugging_face(tmp_path: Path) -> None:
    text = "hf_dataset: {path: billsum}"
    with pytest.raises(InputError, match=r"data \(--data\) is given beside hf_dataset"):
        notes(from_yaml(tmp_path, text, "--train", "--data", "mine"))
    found = notes(from_yaml(tmp_path, f"{text}\ndata: mine\nprompt_feature: question", "--train"))
    assert [note.split(" is not")[0] for note in found] == ["data", "prompt_feature"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train", "--test-batches", "5"], "test_batches .* is an option of testing, but there is no --test"),
        (["--test", "--resume-adapter-file", "a"], "resume_adapter_file .* no --train; --adapter-path says what is"),
        (["--train", "--resume", ""], r"resume \(--resume\) is empty"),
        (["--train", "--resume-adapter-file", ""], "resume_adapter_file .* is empty"),
    ],
)
def test_what_is_given_for_nothing(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        notes(lora_options.settings(argv))


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    (note,) = notes(lora_options.settings(["--test", "--num-layers", "4", "--iters", "9", "--batch-size", "2"]))
    assert note.startswith("num_layers (--num-layers), iters (--iters): not used by --test")
    assert notes(from_yaml(tmp_path, "test_batches: 5", "--train")) == []
    (note,) = notes(from_yaml(tmp_path, "optimizer_config: {sgd: {momentum: 0.9}}", "--train"))
    assert note == "optimizer_config of sgd is not used: the optimizer is adam"
    assert notes(from_yaml(tmp_path, "{optimizer: muon, optimizer_config: {adamw: {eps: 1.0e-8}}}", "--train")) == []
    (note,) = notes(lora_options.settings(["--train", "--optimizer", "adafactor", "--learning-rate", "1e-3"]))
    assert note.startswith("learning_rate is not used: adafactor computes a rate of its own")
    text = "{optimizer: adafactor, optimizer_config: {adafactor: {relative_step: false}}, learning_rate: 1.0e-3}"
    assert notes(from_yaml(tmp_path, text, "--train")) == []
    (note,) = notes(from_yaml(tmp_path, "lora_parameters: {rank: 4}\nfine_tune_type: full", "--train"))
    assert note == "lora_parameters is not used: fine_tune_type is full"


def test_a_restart_loop_has_one_command_line() -> None:
    assert notes(lora_options.settings(["--train", "--resume", "--resume-adapter-file", "a"])) == []


def test_whole_numbers_beyond_64_bits_are_floats(tmp_path: Path) -> None:
    """MLX's bindings raise "std::bad_cast" for them, in the middle of a run."""
    large = 10**23
    rates = f"learning_rate: {large}\nmax_grad_norm: {large}"
    sgd = f"optimizer: sgd\noptimizer_config: {{sgd: {{momentum: {large}}}}}"
    lora = f"lora_parameters: {{rank: 8, scale: {large}, dropout: 0.0}}"
    (tmp_path / "job.yaml").write_text(f"{rates}\n{sgd}\n{lora}\n")
    found = lora_options.settings(["-c", str(tmp_path / "job.yaml")])
    values = found.learning_rate, found.max_grad_norm, found.optimizer_config["sgd"]["momentum"]
    assert [(type(each), each) for each in (*values, found.lora_parameters["scale"])] == [(float, 1e23)] * 4


@pytest.mark.parametrize(
    "text",
    [
        *("learning_rate: N", "max_grad_norm: N", "weight_decay: N", "iters: N", "seed: N", "bucket: N", "epochs: N"),
        *("optimizer_config: {adamw: {eps: N}}", "lora_parameters: {rank: 8, dropout: 0.0, scale: N}"),
    ],
)
def test_whole_numbers_that_no_float_can_hold_are_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text.replace("N", f"1{'0' * 400}"))
    with pytest.raises(InputError, match="must be"):
        lora_options.settings(["-c", str(tmp_path / "job.yaml"), "--optimizer", "adamw", "--max-seq-length", "64"])
