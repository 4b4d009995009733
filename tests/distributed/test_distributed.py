"""Several processes are one big batch: they are really started, and talk over loopback with MLX's ring backend."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import numpy as np
import pytest
from compiled_adam.distributed import reduce

from tests import launch
from tests.conftest import ROOT
from tests.nets import linear_net, squared_error

# The net of tests/step_worker.py has leaves of these sizes, 49 parameters.
SIZES = [32, 8, 8, 1]
JOBS: dict[str, dict] = {
    "plain": {},
    "accumulated": {"accumulate": 3, "batches": 8},  # the last window has two of three
    "poisoned": {"accumulate": 2, "poisoned": 2},
    "without targets": {"empty": 2},  # the update has the gradient 0: it is not skipped, nor left out
    "packed": {"limit": 12},
    "half": {"dtype": "bfloat16", "reduce_dtype": "param"},
    "half, exact": {"dtype": "bfloat16"},
}


def loaded(file: Path) -> dict[str, np.ndarray]:
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return {path: np.array(array.astype(mx.float32)) for path, array in arrays.items()}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, dict]]]]:
    """For 1, 2 and 4 workers: where they wrote, and what each printed for each job."""
    folder = tmp_path_factory.mktemp("steps")
    program = ("tests.step_worker", json.dumps(JOBS))
    launch.warm("steps", folder / "warm", *program)
    found = {}
    for count in (1, 2, 4):
        printed = launch.run(count, folder / str(count), "-m", *program)
        rows = [dict(zip(JOBS, map(json.loads, text.splitlines()), strict=True)) for text in printed]
        found[count] = folder / str(count), rows
    return found


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("count", [2, 4])
def test_workers_are_one_big_batch(job: str, count: int, steps) -> None:
    alone = loaded(steps[1][0] / f"{job}-0.safetensors")
    together = [loaded(steps[count][0] / f"{job}-{rank}.safetensors") for rank in range(count)]
    # What is communicated in bfloat16 is rounded to eight bits at each worker.
    tolerance = 2e-2 if job == "half" else 1e-5
    if job == "half, exact":
        tolerance = 4e-3  # forward and backward passes are bfloat16 themselves
    for path in alone:
        np.testing.assert_allclose(together[0][path], alone[path], rtol=tolerance, atol=tolerance, err_msg=path)
        for other in together[1:]:
            assert np.array_equal(other[path], together[0][path], equal_nan=True), path
    skipped = [printed[job]["skipped"] for printed in (*steps[1][1], *steps[count][1])]
    assert skipped == [1 if job == "poisoned" else 0] * (count + 1)
    if job in ("poisoned", "without targets"):
        assert np.isnan(alone["losses"]).sum() == 1


@pytest.mark.parametrize("count", [2, 4])
def test_one_pass_over_the_bytes(count: int, steps) -> None:
    for job, options in JOBS.items():
        dtypes = [mx.bfloat16 if options.get("reduce_dtype") == "param" else mx.float32] * len(SIZES)
        expected = reduce.buffers(SIZES, dtypes, options.get("limit", reduce.LIMIT))
        for printed in steps[count][1]:
            # The bytes of the one trace of the update; after it the window is summed for the checkpoint.
            assert printed[job]["calls"] == [len(expected)]
            assert printed[job]["bytes"][: len(expected)] == [buffer.nbytes for buffer in expected]
            assert printed[job]["traces"]["update"] == 1
    assert [printed["plain"]["bytes"] for printed in steps[1][1]] == [[]]
    assert steps[count][1][0]["plain"]["bytes"] == [4 * (sum(SIZES) + reduce.SCALARS)]
    assert steps[count][1][0]["half"]["bytes"] == [4 * reduce.SCALARS, 2 * sum(SIZES)]
    assert steps[count][1][0]["packed"]["bytes"] == [12, 128, 32, 32, 4]


def test_votes_are_summed(steps) -> None:
    assert [printed["plain"]["votes"] for printed in steps[4][1]] == [[0, 10, 0, 0, 0, 0]] * 4
    assert steps[1][1][0]["plain"]["votes"] == [None] * 6


def test_a_window_in_a_checkpoint_is_the_sum_of_all(steps) -> None:
    windows = [loaded(steps[count][0] / "accumulated-checkpoint" / "window.safetensors") for count in (1, 2, 4)]
    assert windows[0]["batches"] == 2
    for window in windows[1:]:
        for path in windows[0]:
            np.testing.assert_allclose(window[path], windows[0][path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_what_differs_is_an_error_that_names_the_rank(tmp_path: Path) -> None:
    jobs = {what: {"differs": what} for what in ("parameters", "settings")}
    for printed in launch.run(4, tmp_path, "-m", "tests.step_worker", json.dumps(jobs)):
        parameters, settings = (json.loads(line)["error"] for line in printed.splitlines())
        assert "rank 1 differs from rank 0" in parameters and "layers.0.bias" in parameters
        assert "layers.0.weight" not in parameters
        assert "rank 1 differs from rank 0" in settings and "learning_rate  0.02    0.03" in settings


def test_under_mlx_launch(tmp_path: Path, steps) -> None:
    command = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "-p", str(launch.free_ports(1)[0]), "--"]
    environment = f"PYTHONPATH={ROOT}"
    done = subprocess.run(
        [*command[:-1], "--env", environment, "--", sys.executable, "-m", "tests.step_worker", '{"plain": {}}'],
        cwd=tmp_path,
        input="",
        capture_output=True,
        text=True,
        timeout=100,
        env={**launch.os.environ, "TMPDIR": str(launch.CACHES / "0")},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = (loaded(folder / "plain-1.safetensors") for folder in (tmp_path, steps[2][0]))
    for path in expected:
        assert np.array_equal(found[path], expected[path]), path


def test_an_error_of_one_worker_is_one_of_all(tmp_path: Path) -> None:
    """Or else the others go on alone: into a wait, or with another state."""
    program = """
import mlx.core as mx, compiled_adam as ca
from tests.nets import linear_net, squared_error, batch
group = mx.distributed.init()
step = ca.make_step(linear_net(), squared_error, ca.Adam(0.1), group=group)
step(*batch())
ca.save_checkpoint("good", step)
for function in (
    lambda: ca.save_checkpoint("/proc/nothing", step),
    lambda: ca.save_checkpoint("other", step, {"what": object()}),
    lambda: ca.load_checkpoint("good" if group.rank() == 0 else "missing", step),
):
    try:
        function()
    except (OSError, ValueError, TypeError) as error:
        print(type(error).__name__, error)
mx.eval(step(*batch()).loss)
"""
    for rank, text in enumerate(launch.run(2, tmp_path, "-c", program)):
        # MLX says when the other one has gone first, at the end.
        disk, extra, missing = [line for line in text.splitlines() if not line.startswith("[ring]")]
        assert disk.startswith(("FileNotFoundError", "OSError")[rank]) and "/proc" in disk
        assert extra.startswith("TypeError") and "not JSON serializable" in extra
        assert missing.removeprefix("InputError ") == ["rank 1: ", ""][rank] + (
            "missing is not a checkpoint: there is no such folder"
        )


def test_reduce_dtype_is_checked() -> None:
    with pytest.raises(ValueError, match="reduce_dtype is 'int8'; it must be one of float32, bfloat16, param"):
        ca.make_step(linear_net(), squared_error, reduce_dtype="int8")


# Fine-tuning.

KINDS = ("lora", "full")
ITERS = 10
SAMPLES = ("--sample-prompts", "1")


class Fine:
    """The tiny model on pieces of uneven length, by several workers; ``whole`` has what was not interrupted."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        from compiled_adam.commands.small_model import texts

        chance, text = random.Random(0), texts()[1].replace("~", "-")
        pieces = [text[200 * i : 200 * i + chance.randrange(10, 190)] for i in range(48)]
        pieces[17] += "~"  # whose loss is not a number
        data = folder / "data"
        data.mkdir()
        for name, part in (("train", pieces[:32]), ("valid", pieces[32:40]), ("test", pieces[40:])):
            (data / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": piece}) for piece in part) + "\n")
        (folder / "lora.yaml").write_text("lora_parameters: {rank: 4, dropout: 0.0, scale: 10.0}\n")

    def arguments(self, kind: str, out: str, *more: str) -> list[str]:
        return [
            *[
                "lora",
                "--model",
                str(self.model),
                "--data",
                str(self.folder / "data"),
                "-c",
                str(self.folder / "lora.yaml"),
            ],
            *["--train", "--fine-tune-type", kind, "--adapter-path", str(self.folder / out), "--iters", str(ITERS)],
            *["--batch-size", "8", "--num-layers", "2", "--learning-rate", "1e-4", "--max-grad-norm", "0.5"],
            *["--grad-accumulation-steps", "3", "--val-batches", "1", "--steps-per-eval", "6"],
            *["--steps-per-report", "4", "--save-every", "5", *more],
        ]

    def program(self, *commands: list[str]) -> tuple[str, ...]:
        return "-m", "tests.lora_worker", json.dumps(commands)

    def assert_same(self, one: str, other: str) -> None:
        """Weights, and what was logged of every step and validation, to 1e-5."""
        a, b = (loaded(self.folder / out / "adapters.safetensors") for out in (one, other))
        assert a.keys() == b.keys()
        for path in a:
            np.testing.assert_allclose(a[path], b[path], rtol=0, atol=1e-5, err_msg=path)
        lines = [
            [json.loads(line) for line in (self.folder / out / "log.jsonl").read_text().splitlines()]
            for out in (one, other)
        ]
        assert len(lines[0]) == len(lines[1])
        for x, y in zip(*lines, strict=True):
            for name in ("iteration", "loss", "val_loss", "tokens", "grad_norm", "learning_rate", "skipped"):
                same = pytest.approx(y.get(name), rel=1e-5, abs=1e-5) if y.get(name) is not None else None
                assert x.get(name) == same, (x, y)

    def last_checkpoint(self, out: str) -> int:
        return int(ca.latest_checkpoint(self.folder / out / "checkpoints").name)


@pytest.fixture(scope="module")
def fine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Fine:
    made = Fine(tmp_path_factory.mktemp("fine"), tiny_model)
    launch.warm("fine", made.folder, *made.program(*(made.arguments(kind, f"{kind}-warm") for kind in KINDS))[1:])
    launch.run(1, made.folder, *made.program(*(made.arguments(kind, f"{kind}-1") for kind in KINDS)))
    return made


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_fine_tuning_by_workers_is_that_of_one(count: int, fine: Fine) -> None:
    # One lets its model answer prompts, which changes no number. The other workers wait for the first one.
    commands = [
        fine.arguments(kind, f"{kind}-{count}", *samples) for kind, samples in zip(KINDS, (SAMPLES, ()), strict=True)
    ]
    printed = launch.run(count, fine.folder, *fine.program(*commands))
    for kind in KINDS:
        fine.assert_same(f"{kind}-1", f"{kind}-{count}")
    samples = json.loads((fine.folder / f"lora-{count}" / "run.json").read_text())["samples"]
    assert [(each["iteration"], len(each["answers"])) for each in samples] == [(0, 1), (ITERS, 1)]
    log = (fine.folder / "lora-1" / "log.jsonl").read_text()
    assert '"loss": null' in log and '"skipped": 1' in log
    for rank, text in enumerate(printed):
        assert text.count("all_sum in the update: [1]") == 2  # LoRA, and a full model of less than 32 MiB
        assert ("validation loss" in text) == (rank == 0)


def test_sharded_state_in_fine_tuning_and_resuming(fine: Fine) -> None:
    """From 2 workers that share the state to one that has all of it, and the other way."""
    sharded = [fine.arguments(kind, f"{kind}-sharded", "--shard-state") for kind in KINDS]
    shutil.copytree(fine.folder / "full-1", fine.folder / "from-1")
    half = fine.folder / "from-1" / "checkpoints" / f"{5:07d}"
    resumed = fine.arguments("full", "from-1", "--shard-state", "--resume", str(half))
    launch.run(2, fine.folder, *fine.program(*sharded, resumed))
    shutil.copytree(fine.folder / "full-sharded", fine.folder / "to-1")
    half = fine.folder / "to-1" / "checkpoints" / f"{5:07d}"
    launch.run(1, fine.folder, *fine.program(fine.arguments("full", "to-1", "--resume", str(half))))
    for one, other in (("lora-1", "lora-sharded"), *(("full-1", out) for out in ("full-sharded", "from-1", "to-1"))):
        fine.assert_same(one, other)


def text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_a_killed_worker_stops_the_others_and_they_resume(fine: Fine) -> None:
    program = """
import os, runpy, signal
from mlx_lm.tuner.callbacks import TrainingCallback
from compiled_adam.commands import lora as lora_command
class Killing(TrainingCallback):
    def on_train_loss_report(self, info):
        if info["iteration"] == 8 and os.environ["MLX_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
lora_command.get_reporting_callbacks = lambda *_, **__: Killing()
runpy.run_module("tests.lora_worker", run_name="__main__")
"""
    job = json.dumps([fine.arguments("lora", "killed")])
    with launch.workers(2, fine.folder, "-c", program, job) as processes:
        ended = launch.outputs(processes)
    assert [code for code, _ in ended] == [1, -signal.SIGKILL], ended
    assert "another worker has ended" in ended[0][1] and "--resume goes on from iteration" in ended[0][1], ended[0][1]
    assert fine.last_checkpoint("killed") == 5
    # Its window had two of three micro-batches. First with one worker, then the same again with two.
    subprocess.run(["cp", "-r", "killed", "killed-2"], cwd=fine.folder, check=True)
    for count, out in ((1, "killed"), (2, "killed-2")):
        launch.run(count, fine.folder, *fine.program(fine.arguments("lora", out, "--resume")))
        fine.assert_same("lora-1", out)


def test_a_callback_that_fails_at_one_worker(fine: Fine) -> None:
    program = """
import os, sys
from mlx_lm.tuner.callbacks import TrainingCallback
from compiled_adam import cli
from compiled_adam.commands import lora as lora_command
class Failing(TrainingCallback):
    def on_train_loss_report(self, info):
        if info["iteration"] == 8:
            raise LookupError("no such project")
lora_command.get_reporting_callbacks = lambda *_, **__: Failing() if os.environ["MLX_RANK"] == "0" else None
sys.exit(cli.main(sys.argv[1:]))
"""
    with launch.workers(2, fine.folder, "-c", program, *fine.arguments("lora", "callback")) as processes:
        (code, out), (other_code, other) = launch.outputs(processes)
    assert code == other_code == 1, out + other
    assert "iteration 9: no such project; there is a checkpoint" in out and "from iteration 5" in out, out
    assert "another worker has ended" in other, other


def test_a_killed_worker_under_mlx_launch(fine: Fine) -> None:
    """The launcher ends the others, which say what there is, and shows that."""
    out = fine.folder / "launched"
    mine = {**launch.os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(launch.CACHES / "0")}
    suicide = f"""
import os, pathlib, signal, sys, threading, time
def wait():
    while not pathlib.Path({str(out / "checkpoints" / f"{5:07d}")!r}).exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["MLX_RANK"] == "1":
    threading.Thread(target=wait, daemon=True).start()
from compiled_adam import cli
sys.exit(cli.main({fine.arguments("lora", "launched", "--iters", "2000")!r}))
"""
    command = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "-p", str(launch.free_ports(1)[0])]
    done = subprocess.run(
        [*command, "--env", f"PYTHONPATH={ROOT}", "--", sys.executable, "-c", suicide],
        cwd=fine.folder,
        input="",
        capture_output=True,
        text=True,
        timeout=120,
        env=mine,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "another worker has ended" in said and "--resume goes on from iteration" in said, said
    assert fine.last_checkpoint("launched") >= 5


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_worker_that_ends_in_the_test_ends_the_others(how: str, fine: Fine) -> None:
    program = f"""
import os, signal, sys, time
from compiled_adam import cli, losses
default_loss = losses.next_token
def loss(*batch):
    if os.environ["MLX_RANK"] == "1":
        os.kill(os.getpid(), signal.{how})
    return default_loss(*batch)
losses.next_token = loss
sys.exit(cli.main(sys.argv[1:]))
"""
    command = ["--model", str(fine.model), "--data", str(fine.folder / "data"), "--batch-size", "4"]
    more = ["--test", "--adapter-path", "", "--worker-timeout", "1", "--no-chunked-loss"]
    with launch.workers(2, fine.folder / how, "-c", program, "lora", *command, *more) as processes:
        out, _ = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 1 and "there is no test loss" in out, out


def test_a_signal_at_one_worker_stops_all_at_the_same_step(fine: Fine) -> None:
    with launch.workers(2, fine.folder, *fine.program(fine.arguments("lora", "asked", "--iters", "2000"))) as processes:
        until((fine.folder / "asked" / "log.jsonl").exists)
        processes[1].send_signal(signal.SIGTERM)
        ended = launch.outputs(processes)
    assert [code for code, _ in ended] == [143, 143], ended
    stopped = fine.last_checkpoint("asked")
    assert f"stopped by SIGTERM after iteration {stopped}" in ended[0][1] and stopped < 2000


def test_a_silent_worker_is_noticed(fine: Fine) -> None:
    # A second and a half would do, were both workers sure to get a core each.
    command = fine.arguments("lora", "silent", "--iters", "2000", "--worker-timeout", "6")
    with launch.workers(2, fine.folder, *fine.program(command)) as processes:
        # Between two saves: during one, a worker is given ten times as long.
        until(lambda: '"iteration": 7,' in text(fine.folder / "silent" / "log.jsonl"))
        processes[1].send_signal(signal.SIGSTOP)
        out, _ = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 1 and "no answer from the other workers" in out, out
    assert fine.last_checkpoint("silent") >= 5


def test_workers_that_were_started_differently(fine: Fine) -> None:
    commands = [fine.arguments("lora", "differs", "--seed", str(seed)) for seed in (0, 1)]
    folder = fine.folder / "different"
    with launch.workers(
        2,
        folder,
        "-c",
        f"import os, runpy, sys\nsys.argv = ['x', {json.dumps([commands[0]])!r}"
        f" if os.environ['MLX_RANK'] == '0' else {json.dumps([commands[1]])!r}]\n"
        "runpy.run_module('tests.lora_worker', run_name='__main__')",
    ) as processes:
        ended = launch.outputs(processes)
    for code, out in ended:
        assert code == 2 and "rank 1 differs from rank 0" in out and "lora_a" in out, out
