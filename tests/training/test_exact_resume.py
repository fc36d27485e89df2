"""A killed run goes on bit for bit."""

import json
import os
import random
import signal
import time
from functools import partial

import pytest

from mmfusion.training import checkpoint
from mmfusion.training.callbacks.checkpointing import RunCheckpoint
from mmfusion.training.resume import by_step, find
from tests.training import jobs
from tests.training.tiny import Recorder, losses, recorded, steps, write_recipe

STEPS = 12
STOPS = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 75, "preempted"),
    (signal.SIGUSR1, 75, "preempted"),
]
"""Signals that stop a run, with its code and what status.json says."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recipe(home):
    return write_recipe(home, checkpoint__every_n_steps=2)


@pytest.fixture(scope="module")
def whole(home, recipe):
    """The uninterrupted run."""
    return run_to_end(home, recipe, "whole")


def options(home, recipe, name):
    recorder = {
        "class_path": "tests.training.tiny.Recorder",
        "init_args": {"folder": f"{home}/{name}-packs"},
    }
    run = ["fit", "-c", str(recipe), f"--run_dir={home}/{name}"]
    return [*run, f"--trainer.callbacks={json.dumps([recorder])}"]


def run_to_end(home, recipe, name, *more):
    code = jobs.run([*options(home, recipe, name), *more], home / f"{name}.log")
    assert code == 0, (home / f"{name}.log").read_text()
    return losses_of(home / name)


def losses_of(path):
    from mmfusion.training.run import RunDirectory

    return losses(RunDirectory(path))


def first_step_after(folder, before):
    """The first step trained after so many recorded micro-batches."""
    rows = [json.loads(line) for line in (folder / "rank0.jsonl").open()]
    return rows[before]["step"]


def die_in_the_third_save():
    """Half the bytes reach the disk, then the process is gone."""
    save, count = checkpoint.torch.save, iter(range(100))

    def dying_save(content, file):
        if next(count) < 2:
            return save(content, file)
        save(content, file)
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.torch.save = dying_save


@pytest.mark.slow
def test_killed_in_mid_save_goes_on_bit_for_bit(home, recipe, whole):
    args = options(home, recipe, "saving")
    assert jobs.run(args, home / "saving.log", prepare=die_in_the_third_save) == -signal.SIGKILL
    folder = home / "saving" / "checkpoints"
    assert [p.name for p in by_step(folder)] == ["step-00000002.ckpt", "step-00000004.ckpt"]
    assert list(folder.glob(".*.tmp")), "the torn file is there, under another name"
    before = len(recorded(home / "saving-packs"))
    assert run_to_end(home, recipe, "saving") == whole
    assert first_step_after(home / "saving-packs", before) == 4
    assert not list(folder.glob(".*.tmp"))
    assert steps(home / "saving-packs").keys() == set(range(STEPS))


@pytest.mark.slow
def test_killed_at_a_random_step_twice_goes_on_bit_for_bit(home, recipe, whole):
    seed = random.randrange(1000)
    print("seed", seed)  # shown where it fails
    draw = random.Random(seed)
    for attempt in (1, 2):
        process = jobs.start(options(home, recipe, "random"), home / "random.log")
        wanted = draw.randrange(5 * attempt - 3, 5 * attempt)
        csv = home / "random" / "metrics.csv"
        while process.is_alive() and (
            not csv.exists() or not losses_of(home / "random").get(wanted)
        ):
            time.sleep(0.01)
        jobs.kill(process)
        saved = by_step(home / "random" / "checkpoints")[-1]
        before = len(recorded(home / "random-packs"))
    assert run_to_end(home, recipe, "random") == whole
    step = first_step_after(home / "random-packs", before)
    assert saved.name == f"step-{step:08d}.ckpt"
    assert step >= 2
    attempts = sorted(p.name for p in (home / "random" / "attempts").iterdir())
    assert attempts == ["0001", "0002", "0003"]


@pytest.mark.slow
def test_a_torn_newest_checkpoint_is_passed_over(home, recipe, whole):
    run_to_end(home, recipe, "torn", "--trainer.max_steps=12")
    newest = find(home / "torn")
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run_to_end(home, recipe, "torn") == whole
    assert "not resuming from step-00000012.ckpt" in (home / "torn.log").read_text()
    logs = [path.read_text() for path in (home / "torn" / "attempts").glob("*/log.txt")]
    assert any("not resumed from step-00000012.ckpt: " in text for text in logs)


def wait_for_the_signal():
    """A group of its own, as a terminal's; the sixth step ends when the signal has come, so that a
    slow machine does not finish the run before.
    """
    os.setsid()
    end = Recorder.on_train_batch_end

    def held(self, trainer, *rest):
        end(self, trainer, *rest)
        keeper = next(c for c in trainer.callbacks if isinstance(c, RunCheckpoint))
        deadline = time.monotonic() + 60
        while trainer.global_step == 6 and not keeper._signal and time.monotonic() < deadline:
            time.sleep(0.001)

    Recorder.on_train_batch_end = held


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "state"), STOPS)
def test_asked_to_stop_it_saves_and_goes_on_bit_for_bit(home, recipe, whole, number, code, state):
    """Loader processes get the signal too, as from a terminal."""
    name = number.name
    args = [*options(home, recipe, name), "--data.num_workers=2"]
    process = jobs.start(args, home / f"{name}.log", prepare=wait_for_the_signal)
    csv = home / name / "metrics.csv"
    while process.is_alive() and (not csv.exists() or not losses_of(home / name).get(4)):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.join()
    log = (home / f"{name}.log").read_text()
    assert process.exitcode == code, log
    assert "the same command goes on from here" in log
    assert json.loads((home / name / "status.json").read_text())["state"] == state
    done = max(losses_of(home / name)) + 1
    assert f"step-{done:08d}.ckpt" in find(home / name).name
    assert run_to_end(home, recipe, name) == whole


def signal_at_step(step, count):
    """To the process itself, so often."""

    def on_train_batch_start(self, trainer, *_):
        for _ in range(count if trainer.global_step == step else 0):
            os.kill(os.getpid(), signal.SIGUSR1)

    Recorder.on_train_batch_start = on_train_batch_start


def test_slurms_warnings_may_come_again_and_again(home, recipe, whole):
    args = options(home, recipe, "warned")
    assert jobs.run(args, home / "warned.log", prepare=partial(signal_at_step, 4, 3)) == 75
    assert run_to_end(home, recipe, "warned") == whole


def test_a_deadline_is_as_good_as_a_signal(home, recipe, whole):
    args, late = options(home, recipe, "late"), {"MMFUSION_DEADLINE": str(time.time() - 1)}
    assert jobs.run(args, home / "late.log", env=late) == 75
    status = json.loads((home / "late" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 1)
    assert run_to_end(home, recipe, "late") == whole


def test_torchruns_agent_takes_a_preempted_rank_for_one_that_is_done(home, recipe):
    late = {"MMFUSION_DEADLINE": str(time.time() - 1)}
    (code,) = jobs.run_ranks(options(home, recipe, "ranked"), home / "ranked.log", 1, env=late)
    assert code == 0
    assert json.loads((home / "ranked" / "status.json").read_text())["state"] == "preempted"


@pytest.mark.slow
def test_loader_processes_change_nothing(home, recipe, whole):
    for workers in (1, 3):
        name = f"workers{workers}"
        assert run_to_end(home, recipe, name, f"--data.num_workers={workers}") == whole
        assert steps(home / f"{name}-packs") == steps(home / "whole-packs")


def signal_at_fit_start(number):
    """Before training starts, when a run's own handlers are set."""

    def on_fit_start(self, trainer, module):
        os.kill(os.getpid(), number)

    Recorder.on_fit_start = on_fit_start


@pytest.mark.parametrize(("number", "code", "state"), STOPS)
def test_asked_to_stop_while_it_starts_it_says_so(home, recipe, number, code, state):
    name = f"early-{number.name}"
    prepare = partial(signal_at_fit_start, number)
    process = jobs.start(options(home, recipe, name), home / f"{name}.log", prepare=prepare)
    process.join()
    assert process.exitcode == code, (home / f"{name}.log").read_text()
    status = json.loads((home / name / "status.json").read_text())
    assert status["state"] == state
    assert f"{state} by {number.name} while it started" in status["reason"]


def die_in_validation(number):
    def killed(self, trainer, *_):
        if trainer.global_step == 12 or (trainer.global_step == 4 and number == signal.SIGTERM):
            os.kill(os.getpid(), number)

    Recorder.on_validation_batch_start = killed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_validation_that_was_cut_off_is_made_up_for(home, recipe, whole, number):
    """SIGKILL in the last one; SIGTERM in the first, for each of its batches: the second ends the
    run at once.
    """
    converter = {"class_path": "tests.training.tiny.TinyConverter"}
    val = {"val": {"shards": f"{home}/val-*.tar", "converter": converter}}
    more = ["--val_every_n_steps=4", f"--data.val_sources={json.dumps(val)}"]
    name = f"validated-{number.name}"
    args = [*options(home, recipe, name), *more]
    assert jobs.run(args, home / f"{name}.log", prepare=partial(die_in_validation, number)) != 0
    assert validated_after(home / name) == (set() if number == signal.SIGTERM else {3, 7})
    assert run_to_end(home, recipe, name, *more) == whole
    assert validated_after(home / name) == {3, 7, 11}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_1"])
def test_where_the_model_is_divided_a_last_validation_that_was_cut_off_is_told(
    home, recipe, strategy
):
    """It cannot be divided again, for a validation alone."""
    converter = {"class_path": "tests.training.tiny.TinyConverter"}
    val = {"val": {"shards": f"{home}/val-*.tar", "converter": converter}}
    more = ["--val_every_n_steps=4", f"--data.val_sources={json.dumps(val)}"]
    args = [*options(home, recipe, strategy), *more, f"--strategy={strategy}"]
    log = home / f"{strategy}.log"
    assert jobs.run(args, log, prepare=partial(die_in_validation, signal.SIGKILL)) != 0
    assert jobs.run(args, log) == 0, log.read_text()
    assert validated_after(home / strategy) == {3, 7}
    assert "cannot be made up for under this strategy" in log.read_text()


def validated_after(run):
    from mmfusion.training.loggers import read_metrics

    rows = read_metrics(run / "metrics.csv")
    return {int(row["trainer/global_step"]) for row in rows if "val/loss" in row}
