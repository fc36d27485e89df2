"""A step that would do harm is left out or gone back from, on any number of ranks alike."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfusion.tools.data_at_step import at_step, samples_at
from mmfusion.training import rewind
from mmfusion.training.callbacks.guard import Guard, highest
from mmfusion.training.checkpoint import AtomicCheckpointIO, read_checkpoint
from mmfusion.training.command import RecipeCommand
from mmfusion.training.loggers import read_metrics
from mmfusion.training.resume import find
from mmfusion.training.run import RunDirectory
from tests.training import jobs
from tests.training.tiny import HERE, Recorder, fit, losses, refused, write_recipe

STEPS = 12
BAD = 6
"""The step with the broken sample. Checkpoints are at 4 and 8."""
SPIKE = 9
ZERO = "--trainer.strategy=mmfusion.training.strategies.zero.ZeRO"
DIVIDED = "--trainer.strategy.config={zero_optimization: {stage3_param_persistence_threshold: 0}}"
DDP = ["--trainer.strategy=ddp"]
OFFLOAD = "--trainer.strategy.offload=cpu"
SHARED = "--sequence_parallel=2"
TENSOR = [
    "--trainer.strategy=mmfusion.training.strategies.fsdp2.FSDP2",
    "--trainer.strategy.tensor_parallel=2",
]
NEAR = 5e-5
"""Of weights, where learning rates are 1e-2: Adam makes much of gradients that are next to nothing
(1.1e-5 of one weight under tensor parallelism).
"""
TOGETHER = ("still", "shared", "tensor")
"""Without dropout, which ranks that share a pack draw for themselves; the first on one process."""


def zero(stage: int) -> list[str]:
    return [ZERO, f"--trainer.strategy.stage={stage}", *([DIVIDED] if stage == 3 else [])]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guard")


@pytest.fixture(scope="module")
def samples(home: Path) -> list[list[str]]:
    """Of each step, where nothing is left out."""
    recipe = RecipeCommand("", ["--config", str(write_recipe(home))])
    recipe.datamodule.attach(recipe.model.model.processor())
    return [names_of(samples_at(recipe.datamodule, step)) for step in range(20)]


def names_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    return sorted(f"{row['source']}/{row['epoch']}/{row['index']}" for row in rows)


def broken(
    home: Path, samples: list[list[str]], *steps: int, still: bool = False, **arguments: object
) -> Path:
    """A recipe in which a sample of each of these steps is broken; ``still``: without dropout."""
    init = {"samples": [samples[step][0] for step in steps], **arguments}
    objective = {"class_path": f"{HERE}.Broken", "init_args": init}
    changes: dict[str, object] = {
        "model__input_projectors__image__init_args": {"dropout": 0.0},
        "model__tuning__llm__init_args__dropout": 0.0,
    }
    return write_recipe(
        home,
        model__objectives={"next_token": objective},
        trainer__max_steps=STEPS,
        **(changes if still else {}),
    )


def run(home: Path, recipe: Path, name: str, *options: str, world: int = 0) -> Path:
    """A run, of so many ranks under torchrun's environment, that ends as it should."""
    codes = start(home, recipe, name, *options, world=world)
    assert set(codes) == {0}, "".join(p.read_text() for p in home.glob(f"{name}.[01l]*"))
    return home / name


def start(
    home: Path,
    recipe: Path,
    name: str,
    *options: str,
    world: int = 0,
    prepare: Callable[[], None] | None = None,
) -> list[int | None]:
    """Its exit codes. What it sees, and none before it, is recorded beside its directory."""
    shutil.rmtree(home / f"{name}-packs", ignore_errors=True)
    recorder = {
        "class_path": "tests.training.tiny.Recorder",
        "init_args": {"folder": f"{home}/{name}-packs"},
    }
    args = ["fit", "-c", str(recipe), f"--run_dir={home}/{name}", "--timeout_minutes=1"]
    args += [f"--trainer.callbacks={json.dumps([recorder])}", *options]
    log = home / f"{name}.log"
    if not world:
        return [jobs.run(args, log, prepare=prepare)]
    ranks = jobs.start_ranks([*args, f"--trainer.devices={world}"], log, world, prepare=prepare)
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


def curve(path: Path) -> dict[int, float]:
    return {step: float(loss) for step, loss in losses(RunDirectory(path)).items()}


def history(folder: Path) -> list[tuple[int, list[str]]]:
    """Steps with their samples as they were taken, one after another, ranks together."""
    found: list[tuple[int, list[str]]] = []
    ranks = [[json.loads(x) for x in path.open()] for path in sorted(folder.glob("rank*.jsonl"))]
    if all([r["samples"] for r in rank] == [r["samples"] for r in ranks[0]] for rank in ranks):
        ranks = ranks[:1]  # they share their packs
    micro_batches = 2 // len(ranks)
    for number, rows in enumerate(zip(*ranks, strict=True)):
        if number % micro_batches == 0:
            found.append((rows[0]["step"], []))
        assert {row["step"] for row in rows} == {found[-1][0]}
        found[-1][1].extend(f"{s}/{e}/{i}" for row in rows for s, e, i in row["samples"])
    return [(step, sorted(names)) for step, names in found]


def checkpoint(path: Path, step: int) -> dict:
    return read_checkpoint(path / "checkpoints" / f"step-{step:08d}.ckpt")


# ---- what a spike is


def test_the_limit_is_that_of_a_slow_reference():
    draw = random.Random(0)
    for deviations in (0.5, 3.0, 8.0):
        found = [draw.lognormvariate(0, 0.2) for _ in range(33)]
        ordered = sorted(found)
        distances = sorted(abs(x - ordered[16]) for x in found)
        expected = ordered[16] + deviations * 1.4826 * distances[16]
        assert highest(found, deviations) == pytest.approx(expected, rel=1e-12)
    assert highest([2.0] * 8, 8.0) == pytest.approx(2.0 * 1.08)


class Asked(Guard):
    """Says which losses it takes for spikes, and does nothing."""

    def _leave_out(self, *_):
        pass


def test_spikes_are_those_of_a_slow_reference():
    """Only a full window judges, and what was a spike is no part of it."""

    class Module:
        global_step = 0

    draw, guard, good = random.Random(1), Asked(spike="skip", deviations=4.0, window=9), []
    spikes = 0
    for step in range(300):
        loss = draw.gauss(2, 0.1) + (draw.random() < 0.1) * draw.random()
        last = good[-9:]
        spike = False
        if len(last) == 9:
            middle = statistics.median(last)
            distance = statistics.median([abs(x - middle) for x in last])
            spike = loss > middle + 4 * max(1.4826 * distance, 0.01 * middle)
        good += [] if spike else [loss]
        spikes += spike
        assert guard.judge(Module(), loss) == spike, step
        if step % 7 == 0:  # as after a resume
            state, guard = guard.state_dict(), Asked(spike="skip", deviations=4.0, window=9)
            guard.load_state_dict(json.loads(json.dumps(state)))
    assert 5 < spikes < 60
    assert not guard.judge(Module(), float("nan"))  # the gradients tell
    assert not Asked().judge(Module(), 1e9)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"deviations": 0}, "guard.deviations is 0; expected a number above 0"),
        ({"deviations": float("nan")}, "guard.deviations is nan"),
        ({"window": 3}, "guard.window is 3; expected 8 or more"),
        ({"most": -1}, "guard.most is -1; expected 0 or more"),
        ({"within": 0}, "guard.within is 0; expected 1 or more"),
    ],
)
def test_odd_numbers_are_refused(option, said):
    with pytest.raises(ValueError, match=said):
        Guard(**option)


# ---- skip


SKIPS = {
    "alone": (0, []),
    "bf16": (0, ["--trainer.precision=bf16-mixed"]),
    "ddp": (2, DDP),
    "zero1": (2, zero(1)),
    "zero2": (2, zero(2)),
    "zero3": (2, zero(3)),
    "fsdp2": (2, ["--strategy=fsdp2"]),
    "offload2": (2, ["--strategy=deepspeed_2_offload"]),
    "offload3": (2, [*zero(3), OFFLOAD]),
    "still": (0, []),
    "shared": (2, [SHARED, *DDP]),
    "tensor": (2, TENSOR),
}


@pytest.fixture(scope="module")
def left_out(home: Path, samples: list[list[str]]) -> Callable[[str, int], Path]:
    """A run with NaN in step 6, or with a spike in step 9: two micro-batches a step on one rank,
    clipped; the broken sample is on one of two ranks, of those that share it in the first's part.
    """

    @cache
    def made(name: str, bad: int) -> Path:
        world, options = SKIPS[name]
        adds = 1e6 if bad == SPIKE else None
        recipe = broken(home, samples, bad, adds=adds, still=name in TOGETHER)
        options = [*options, "--checkpoint.every_n_steps=1", "--checkpoint.keep_last=99"]
        if bad == SPIKE:
            options += ["--guard.spike=skip", "--guard.window=8"]
        return run(home, recipe, f"{name}-{bad}", *options, world=world)

    return made


@pytest.mark.slow
@pytest.mark.parametrize("bad", [BAD, SPIKE])
@pytest.mark.parametrize("name", SKIPS)
def test_a_step_left_out_changes_neither_weights_nor_momentum(samples, left_out, name, bad):
    path = left_out(name, bad)
    before, after, later = (checkpoint(path, step) for step in (bad, bad + 1, bad + 2))
    assert after["global_step"] == bad + 1
    same(after["state_dict"], before["state_dict"])
    one, two, three = (found["optimizer_states"][0]["state"] for found in (before, after, later))
    assert len(one) == len(two) > 3
    for place in one:
        same(two[place], one[place])
    assert any(not torch.equal(three[i]["exp_avg"], two[i]["exp_avg"]) for i in two)
    rates = [f["optimizer_states"][0]["param_groups"][0]["lr"] for f in (before, after, later)]
    assert rates[0] > rates[1] > rates[2]
    packs = [found["callbacks"]["mmfusion.stream"]["packs"] for found in (before, after)]
    assert packs == [4 * bad, 4 * bad + 4]
    assert [names for _, names in history(Path(f"{path}-packs"))] == samples[:STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [BAD, SPIKE])
@pytest.mark.parametrize("name", sorted(set(SKIPS) - {"alone", "bf16", "still"}))
def test_ranks_leave_out_what_one_process_leaves_out(left_out, name, bad):
    one, two = left_out("still" if name in TOGETHER else "alone", bad), left_out(name, bad)
    ours, theirs = curve(one), curve(two)
    assert sorted(ours) == sorted(theirs) == [*range(STEPS)]
    assert math.isnan(ours[BAD]) == math.isnan(theirs[BAD]) == (bad == BAD)
    assert (ours[SPIKE] > 100) == (bad == SPIKE)
    assert theirs == pytest.approx(ours, rel=1e-5, nan_ok=True)
    for step in (bad + 1, STEPS):
        states = [checkpoint(path, step)["state_dict"] for path in (two, one)]
        torch.testing.assert_close(*states, atol=NEAR, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [BAD, SPIKE])
def test_a_step_left_out_is_told(samples, left_out, bad):
    path = left_out("ddp", bad)
    rows = read_metrics(path / "metrics.csv")
    assert [row["trainer/global_step"] for row in rows if "train/skipped_steps" in row] == [bad]
    status = json.loads((path / "status.json").read_text())
    assert status["reason"] == f"steps left out: 1, the last was {bad}"
    (line,) = [
        entry for entry in re.split(r"\n(?=\d{4}-)", (path / "attempts/0001/log.txt").read_text())
        if f"optimizer step {bad} " in entry
    ]  # fmt: skip
    assert ("(the median of 8 steps is" if bad == SPIKE else "are not finite (the losses") in line
    assert "it is left out" in line
    for sample in samples[bad]:  # of all ranks
        source, _, index = sample.split("/")
        assert f"{source}: {path.parent}/{source}-" in line
        assert f"{source}{int(index):05d}" in line


def same(one: dict, two: dict) -> None:
    """To the last bit."""
    assert set(one) == set(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.slow
def test_running_statistics_are_left_as_they_were(home, samples):
    recipe = broken(home, samples, BAD)
    projector = {"class_path": f"{HERE}.NormProjector"}
    options = [f"--model.input_projectors={json.dumps({'image': projector})}"]
    options += ["--checkpoint.every_n_steps=1", "--checkpoint.keep_last=99"]
    path = run(home, recipe, "norms", *options)
    states = [checkpoint(path, step)["state_dict"] for step in (BAD, BAD + 1, BAD + 2)]
    assert sum("running" in name for name in states[0]) == 2
    same(states[1], states[0])
    assert all(not torch.equal(states[2][n], states[1][n]) for n in states[0] if "running" in n)


@pytest.mark.slow
def test_too_many_steps_to_leave_out_end_the_run(home, samples, capsys):
    recipe = broken(home, samples, 2, 3, 8)
    most = ["--guard.most=2", "--guard.within=6"]
    path = run(home, recipe, "few", *most)  # step 2 is forgotten by then
    assert sum("train/skipped_steps" in row for row in read_metrics(path / "metrics.csv")) == 3
    said = refused(capsys, recipe, f"--run_dir={home}/many", most[0], "--guard.within=7")
    assert "gradients of optimizer step 8 are not finite" in said
    assert "Of 7 steps 3 were to be left out, at most 2 may (guard.most)" in said
    # Also where it goes on in between.
    again = [f"--run_dir={home}/many", "--guard.within=7"]
    assert "Of 7 steps 3 were" in refused(capsys, recipe, *again, most[0])
    fit(recipe, *again)


# ---- rewind


WINDOW = {"step": 4, "until": BAD, "first_pack": 16, "end_pack": 28}
"""Steps 4 to 6 of four packs each."""
REWIND = ["--guard.not_finite=rewind", "--guard.spike=rewind", "--guard.window=8"]


@pytest.fixture(scope="module")
def planned(home: Path, samples: list[list[str]]) -> dict[int, float]:
    """The curve of a run that leaves the same packs out from its start, without an accident."""
    return curve(as_planned(home, samples, "planned"))


def as_planned(home: Path, samples: list[list[str]], name: str) -> Path:
    recipe = broken(home, samples, BAD, still="still" in name)
    (home / name).mkdir()
    (home / name / "left_out.json").write_text(json.dumps([WINDOW | {"why": "as planned"}]))
    path = run(home, recipe, name)
    order = [(step, samples[step + 3 * (step > 3)]) for step in range(STEPS)]
    assert history(home / f"{name}-packs") == order
    return path


def noted(path: Path) -> list[dict]:
    """What is left out, without why."""
    rows = json.loads((path / "left_out.json").read_text())
    return [{key: x for key, x in row.items() if key != "why"} for row in rows]


def back_and_on(samples: list[list[str]]) -> list[tuple[int, list[str]]]:
    """Steps of a run that goes back from step 6 to step 4."""
    before = [(step, samples[step]) for step in range(BAD + 1)]
    return before + [(step, samples[step + 3]) for step in range(4, STEPS)]


RANKS = {
    "one": (0, []),
    "two": (2, DDP),
    "divided2": (2, zero(2)),
    "divided3": (2, zero(3)),
    "divided": (2, ["--strategy=fsdp2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_a_run_goes_back_and_on_behind_the_packs(home, samples, planned, name):
    world, options = RANKS[name]
    path = run(home, broken(home, samples, BAD), name, *REWIND, *options, world=world)
    assert history(home / f"{name}-packs") == back_and_on(samples)
    assert noted(path) == [WINDOW]
    if name == "one":
        assert curve(path) == planned
    else:
        assert curve(path) == pytest.approx(planned, rel=1e-5)
    assert checkpoint(path, STEPS)["callbacks"]["mmfusion.stream"]["left_out"][0]["until"] == BAD
    assert sorted(attempt.name for attempt in (path / "attempts").iterdir()) == ["0001", "0002"]
    rows = read_metrics(path / "metrics.csv", all_attempts=True)
    assert [r["trainer/global_step"] for r in rows if "train/rewinds" in r] == [4]
    status = json.loads((path / "status.json").read_text())
    assert (status["state"], status["reason"]) == (
        "finished",
        f"gone back: 1 times, the last from step {BAD}",
    )
    logs = [(path / "attempts" / f"000{i}" / "log.txt").read_text() for i in (1, 2)]
    assert f"optimizer step {BAD} are not finite" in logs[0]
    assert "went back from step 6 to 4; packs 16 to 27 are left out" in logs[0]


OTHERS = ("offload2", "offload3", "shared", "tensor")
"""Of :data:`SKIPS`."""


def slow_disk() -> None:
    """A checkpoint is being written until long after the next steps."""
    for name in ("_write", "_write_shards"):
        write = getattr(AtomicCheckpointIO, name)

        def slowly(*args: Any, write: Any = write) -> Any:
            time.sleep(4)
            return write(*args)

        setattr(AtomicCheckpointIO, name, slowly)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sharded"), [("two", True), ("divided", False), ("divided", True)]
)
def test_it_goes_back_to_what_is_still_being_written(home, samples, planned, name, sharded):
    world, options = RANKS[name]
    options = [*options, "--checkpoint.behind=true", f"--checkpoint.sharded={str(sharded).lower()}"]
    path, recipe = home / f"slow-{name}-{sharded}", broken(home, samples, BAD)
    codes = start(home, recipe, path.name, *REWIND, *options, world=world, prepare=slow_disk)
    assert set(codes) == {0}
    assert history(home / f"{path.name}-packs") == back_and_on(samples)
    assert noted(path) == [WINDOW]
    assert curve(path) == pytest.approx(planned, rel=1e-5)


@pytest.fixture(scope="module")
def planned_still(home: Path, samples: list[list[str]]) -> Path:
    return as_planned(home, samples, "planned, still")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_ranks_that_offload_or_share_go_back_alike(home, samples, planned_still, name):
    world, options = SKIPS[name]
    recipe = broken(home, samples, BAD, still=True)
    path = run(home, recipe, f"back-{name}", *REWIND, *options, world=world)
    assert history(home / f"back-{name}-packs") == back_and_on(samples)
    assert noted(path) == [WINDOW]
    assert curve(path) == pytest.approx(curve(planned_still), rel=1e-5)
    found, expected = (checkpoint(one, STEPS) for one in (path, planned_still))
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], atol=NEAR, rtol=1e-4)
    states = [one["optimizer_states"][0]["state"] for one in (found, expected)]
    torch.testing.assert_close(*states, atol=NEAR, rtol=1e-4)


@pytest.mark.slow
def test_at_step_tells_what_is_left_out(samples, planned, home, capsys):
    for step in range(STEPS):
        from_8 = [{"checkpoint": str(home / "planned")}] if step >= 8 else []
        for more in ({}, *from_8):
            at_step(str(home / "planned"), step, as_json=True, **more)
            rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert names_of(rows) == samples[step + 3 * (step > 3)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_it_is_noted() -> None:
    rewind.write_left_out = lambda *_: die()


def once_it_is_noted() -> None:
    RunDirectory.release = lambda *_: die()


def behind_it() -> None:
    _die_at(BAD, attempt=2)


def behind_the_next_checkpoint() -> None:
    _die_at(10, attempt=2)


def _die_at(step: int, attempt: int) -> None:
    def end(self, trainer, *_):
        begun = len([*(Path(trainer.default_root_dir) / "attempts").iterdir()])
        if (trainer.global_step, begun) == (step, attempt):
            die()

    Recorder.on_train_batch_end = end


@pytest.mark.slow
@pytest.mark.parametrize("world", [0, 2])
@pytest.mark.parametrize(
    "killed", [before_it_is_noted, once_it_is_noted, behind_it, behind_the_next_checkpoint]
)
def test_a_run_killed_around_going_back_goes_on_the_same(home, samples, planned, killed, world):
    """On one process or on two."""
    recipe, name = broken(home, samples, BAD), f"{killed.__name__}{world}"
    options = [*REWIND, *(DDP if world else [])]
    assert start(home, recipe, name, *REWIND, prepare=killed) == [-signal.SIGKILL]
    assert (home / name / "left_out.json").exists() != (killed is before_it_is_noted)
    path = run(home, recipe, name, *options, world=world)
    assert noted(path) == [WINDOW]
    assert curve(path) == (pytest.approx(planned, rel=1e-5) if world else planned)
    first = 8 if killed is behind_the_next_checkpoint else 4
    whole = [(step, samples[step + 3]) for step in range(first, STEPS)]
    again = [(step, samples[step]) for step in range(4, BAD + 1)]
    found = history(home / f"{name}-packs")
    assert found == (again + whole if killed is before_it_is_noted else whole)


def asked_to_stop_before_the_step() -> None:
    def begin(self, trainer, *_):
        if trainer.global_step == BAD:
            os.kill(os.getpid(), signal.SIGUSR1)

    Recorder.on_train_batch_start = begin


def asked_to_stop_within_the_step() -> None:
    def end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == BAD and batch_idx % 2 == 0:
            os.kill(os.getpid(), signal.SIGUSR1)

    Recorder.on_train_batch_end = end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "saved"), [(asked_to_stop_before_the_step, 4), (asked_to_stop_within_the_step, 5)]
)
def test_a_run_that_goes_back_can_be_asked_to_stop(home, samples, planned, asked, saved):
    """At once where the ranks had agreed to, else after the first step behind the packs."""
    recipe, name = broken(home, samples, BAD), asked.__name__
    assert start(home, recipe, name, *REWIND, prepare=asked) == [75]
    assert f"step-{saved:08d}.ckpt" in find(home / name).name
    assert json.loads((home / name / "status.json").read_text())["state"] == "preempted"
    path = run(home, recipe, name, *REWIND)
    assert curve(path) == planned
    assert noted(path) == [WINDOW]


@pytest.mark.slow
def test_it_goes_back_again_and_to_the_start(home, samples):
    """From step 1 to the start, twice, then from step 6; and on from an older checkpoint over the
    packs that are left out then.
    """
    recipe = broken(home, samples, 1, 3, 10)
    options = [*REWIND, "--checkpoint.every_n_steps=2", "--checkpoint.keep_last=99"]
    assert start(home, recipe, "again", *options, "--guard.most=2") == [1]
    said = (home / "again.log").read_text()
    assert "Of 100 steps 3 were to be left out, at most 2 may (guard.most)" in said
    path = run(home, recipe, "again", *options)
    windows = [(0, 1, 0, 8), (0, 1, 8, 16), (6, 6, 40, 44)]
    assert [tuple(row.values()) for row in noted(path)] == windows
    assert history(home / "again-packs") == [
        (6, samples[10]),
        *[(step, samples[step + 5]) for step in range(6, STEPS)],
    ]
    whole, saved = curve(path), checkpoint(path, STEPS)
    older = f"--resume={path}/checkpoints/step-00000004.ckpt"
    run(home, recipe, "again", *options, older)
    assert history(home / "again-packs") == [
        (step, samples[step + (4 if step < 6 else 5)]) for step in range(4, STEPS)
    ]
    assert curve(path) == whole
    assert checkpoint(path, STEPS)["callbacks"] == saved["callbacks"]
    assert [tuple(row.values()) for row in noted(path)] == windows
    over = ["--resume=none", "--guard.not_finite=skip"]
    run(home, recipe, "again", *over)
    assert history(home / "again-packs") == [(step, samples[step]) for step in range(STEPS)]
    assert not (path / "left_out.json").exists()


@pytest.mark.slow
def test_the_command_itself_goes_back_and_so_do_its_ranks(home, samples, planned):
    """Two ranks that Lightning starts; the process is the command's."""
    recipe, path = broken(home, samples, BAD), home / "command"
    args = ["fit", "-c", str(recipe), f"--run_dir={path}", *REWIND, *DDP, "--trainer.devices=2"]
    env = {"PYTHONPATH": jobs.ROOT, **os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "mmfusion", *args], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert noted(path) == [WINDOW]
    assert curve(path) == pytest.approx(planned, rel=1e-5)


def room_for_one_model() -> None:
    made: list[weakref.ref[Any]] = []
    begin = RecipeCommand.fit

    def watched(self: RecipeCommand) -> None:
        assert [model() for model in made] == [None] * len(made)
        made.append(weakref.ref(self.model))
        begin(self)

    RecipeCommand.fit = watched


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(RANKS) - {"divided3"}))
def test_what_went_back_is_gone_before_it_begins_again(home, samples, name):
    world, options = RANKS[name]
    recipe, options = broken(home, samples, BAD), [*REWIND, *options]
    codes = start(home, recipe, f"room-{name}", *options, world=world, prepare=room_for_one_model)
    assert set(codes) == {0}


@pytest.mark.parametrize(
    "row",
    [
        {"step": 1},
        {"step": 1, "until": 2, "first_pack": 8, "end_pack": 4, "why": ""},
        {"step": 3, "until": 2, "first_pack": 4, "end_pack": 8, "why": ""},
        {"step": "1", "until": 2, "first_pack": 4, "end_pack": 8, "why": ""},
    ],
)
def test_a_damaged_list_is_refused(home, samples, capsys, tmp_path, row):
    (tmp_path / "left_out.json").write_text(json.dumps([row]))
    said = refused(capsys, broken(home, samples, BAD), f"--run_dir={tmp_path}")
    assert "left_out.json is damaged" in said
