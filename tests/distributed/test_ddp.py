"""Two processes over gloo train as one."""

import csv
import json
import shutil
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from mmfusion.training.command import RecipeCommand
from mmfusion.training.resume import by_step, find
from mmfusion.training.run import RunDirectory
from tests.training import jobs
from tests.training.tiny import Recorder, losses, recorded, steps, write_recipe, write_shards

CONVERTER = {"class_path": "tests.training.tiny.TinyConverter"}
DDP = ("--trainer.strategy=ddp", "--trainer.devices=2")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def recipe(home):
    return write_recipe(home, trainer__max_steps=8, checkpoint__every_n_steps=4)


def arguments(home, recipe, name, *more):
    """A run directory and a record of packs under ``name``."""
    recorder = {
        "class_path": "tests.training.tiny.Recorder",
        "init_args": {"folder": f"{home}/{name}-packs"},
    }
    run = ["fit", "-c", str(recipe), f"--run_dir={home}/{name}"]
    return [*run, f"--trainer.callbacks={json.dumps([recorder])}", *more]


def one(home, recipe, name, *more):
    code = jobs.run(arguments(home, recipe, name, *more), home / f"{name}.log")
    assert code == 0, (home / f"{name}.log").read_text()
    return curve(home / name)


def two(home, recipe, name, *more):
    codes = jobs.run_ranks(arguments(home, recipe, name, *DDP, *more), home / f"{name}.log", 2)
    assert codes == [0, 0], "".join(p.read_text() for p in home.glob(f"{name}.[01]"))
    return curve(home / name)


def curve(run):
    return {step: float(loss) for step, loss in losses(RunDirectory(run)).items()}


@pytest.fixture(scope="module")
def alone(home, recipe):
    """One process: four packs a step in two micro-batches of two."""
    return one(home, recipe, "alone")


@pytest.fixture(scope="module")
def together(home, recipe):
    """Two processes: one micro-batch each."""
    return two(home, recipe, "together")


def test_two_processes_see_the_same_packs_and_the_same_losses_as_one(home, alone, together):
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(alone) == 8
    assert steps(home / "together-packs") == steps(home / "alone-packs")
    micro_batches = {
        world: max(len(rows) for rows in _by_step_and_rank(home / name).values())
        for world, name in ((1, "alone-packs"), (2, "together-packs"))
    }
    assert micro_batches == {1: 2, 2: 1}


def _by_step_and_rank(folder):
    groups = {}
    for row in recorded(folder):
        groups.setdefault((row["step"], row["rank"]), []).append(row)
    return groups


def test_both_world_sizes_end_with_the_same_weights(home, alone, together):
    a, b = (torch.load(find(home / name), weights_only=True) for name in ("alone", "together"))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        torch.testing.assert_close(tensor, b["state_dict"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_both_world_sizes_report_the_same_validation(home):
    """Of 13 samples one rank has more; their tokens are an odd number."""
    write_shards(home, "odd", 13, seed=7)
    source = {"shards": f"{home}/odd-*.tar", "converter": CONVERTER}
    recipe = write_recipe(
        home,
        trainer__max_steps=2,
        val_every_n_steps=1,
        validation={"generate_samples": 5, "max_new_tokens": 2},
        data__val_sources={"odd": source},
    )
    one(home, recipe, "val-one")
    two(home, recipe, "val-two")
    alone, together = (validations(home / name) for name in ("val-one", "val-two"))
    assert len(alone) == 2
    for a, b in zip(alone, together, strict=True):
        assert {"val/loss", "val/next_token", "val/next_token/odd", "val/exact_match/odd"} <= {*a}
        assert "val/shuffled_gap/image" in a
        assert b == pytest.approx(a, abs=1e-5)
        assert a["val/loss"] == pytest.approx(a["val/next_token"], abs=1e-7)


def validations(run):
    """``val/...`` of every row that has any."""
    rows = [
        {key: float(value) for key, value in row.items() if value and key.startswith("val/")}
        for row in csv.DictReader((run / "metrics.csv").open())
    ]
    return [row for row in rows if row]


def wait_in_step_6():
    begin = Recorder.on_train_batch_start

    def held(self, trainer, *rest):
        begin(self, trainer, *rest)
        time.sleep(600 if trainer.global_step == 6 else 0)

    Recorder.on_train_batch_start = held


def kill_in_step_6(home, recipe, name, world):
    args = arguments(home, recipe, name, *(DDP if world == 2 else ()))
    ranks = jobs.start_ranks(args, home / f"{name}.log", world, prepare=wait_in_step_6)
    files = [home / f"{name}-packs" / f"rank{rank}.jsonl" for rank in range(world)]
    while all(process.is_alive() for process in ranks):
        if all(path.exists() and '"step": 6' in path.read_text() for path in files):
            break
        time.sleep(0.05)
    assert all(process.is_alive() for process in ranks)
    for process in ranks:
        jobs.kill(process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [pytest.param(one, two, marks=pytest.mark.slow), (two, one)]
)
def test_a_run_goes_on_with_another_number_of_processes(home, recipe, alone, first, then):
    name = f"{first.__name__}-then-{then.__name__}"
    kill_in_step_6(home, recipe, name, world={one: 1, two: 2}[first])
    assert [p.name for p in by_step(home / name / "checkpoints")] == ["step-00000004.ckpt"]
    packs = home / f"{name}-packs"
    for path in packs.iterdir():
        path.unlink()
    assert then(home, recipe, name) == pytest.approx(alone, abs=1e-5)
    whole = steps(home / "alone-packs")
    assert steps(packs) == {step: whole[step] for step in range(4, 8)}
    assert [p.name for p in by_step(home / name / "checkpoints")][-1] == "step-00000008.ckpt"


@pytest.mark.slow
def test_a_rank_without_media_does_not_hang_and_changes_nothing(home):
    second = {"class_path": "tests.models.tiny.TinyEncoder", "init_args": {"modality": "audio"}}
    image = {"class_path": "tests.models.tiny.TinyEncoder"}
    projector = {"class_path": "mmfusion.models.projectors.linear.Linear"}
    recipe = write_recipe(
        home,
        trainer__max_steps=8,
        model__encoders={"image": image, "audio": second},
        model__input_projectors={"image": projector, "audio": projector},
        data__sources__train__weight=1,
        data__sources__words__weight=6,
        data__packs_per_step=2,
        data__packs_per_micro_batch=1,
        data__pack_tokens=32,
    )
    assert two(home, recipe, "idle-two") == pytest.approx(one(home, recipe, "idle-one"), abs=1e-5)
    rows = recorded(home / "idle-two-packs")
    idle = [["image" in row["idle"] for row in rows if row["step"] == step] for step in range(8)]
    assert [True, False] in idle or [False, True] in idle, "one rank has pictures, the other none"
    assert all("audio" in row["idle"] for row in rows), "no rank ever hears anything"


@pytest.mark.slow
def test_rank_0_chooses_the_checkpoint_for_all(home, recipe, alone):
    """The other rank looks into an empty folder, as a slow network disk may show it."""
    shutil.copytree(home / "alone", home / "leads")
    (home / "leads" / "checkpoints" / "step-00000008.ckpt").unlink()
    args = arguments(home, recipe, "leads", *DDP, "--allow_recipe_change")  # the recorder's folder
    assert jobs.run_ranks(args, home / "leads.log", 2, [f"--run_dir={home}/empty"]) == [0, 0]
    assert curve(home / "leads") == pytest.approx(alone, abs=1e-5)
    assert min(row["step"] for row in recorded(home / "leads-packs")) == 4


@pytest.mark.slow
def test_rank_0_chooses_what_all_ranks_start_from(home, recipe, alone):
    """The other rank is told of a run that it cannot see."""
    args = arguments(home, recipe, "warm", *DDP, f"--model.init_from={home}/alone")
    assert jobs.run_ranks(args, home / "warm.log", 2, ["--model.init_from=nowhere"]) == [0, 0]
    cold, warm = alone[0], curve(home / "warm")[0]
    assert warm < cold - 0.1


class Made(RecipeCommand):
    """A command that ends when its trainer is made."""

    def made(self) -> None:
        pass


def test_the_timeout_reaches_the_strategy(recipe):
    assert hasattr(DDPStrategy(), "_timeout")  # a private field
    options = ["--timeout_minutes=3", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    command = Made("made", ["-c", str(recipe), *options])
    assert command.trainer.strategy._timeout == timedelta(minutes=3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_loader_processes_change_nothing_on_two_ranks(home, recipe, alone, workers):
    name = f"workers{workers}"
    found = two(home, recipe, name, f"--data.num_workers={workers}")
    assert found == pytest.approx(alone, abs=1e-5)
    assert steps(home / f"{name}-packs") == steps(home / "alone-packs")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, "-m", "mmfusion"],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
         "--nproc-per-node=2", "-m", "mmfusion"],
    ],
    ids=["lightning", "torchrun"],
)  # fmt: skip
def test_real_launchers_start_resume_and_end(home, recipe, alone, launcher, request):
    name = request.node.callspec.id
    shutil.copytree(home / "alone", home / name)
    (home / name / "checkpoints" / "step-00000008.ckpt").unlink()
    command = [*launcher, *arguments(home, recipe, name, *DDP, "--allow_recipe_change")]
    done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert curve(home / name) == pytest.approx(alone, abs=1e-5)
    assert min(row["step"] for row in recorded(home / f"{name}-packs")) == 4
    assert len(list((home / name / "attempts").iterdir())) == 2
