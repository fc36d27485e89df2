"""Every strategy trains as one process does: losses, gradients, weights, checkpoints; and a run
goes on under another one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import get_args

import pytest
import torch

import mmfusion
from mmfusion.cli import main
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.loggers import read_metrics
from mmfusion.training.resume import by_step, why_incomplete
from mmfusion.training.run import RunDirectory
from mmfusion.training.strategies.names import OURS, Strategy
from mmfusion.training.strategies.zero import ZeRO
from tests.training import jobs
from tests.training.tiny import losses, recorded, steps, write_recipe

pytestmark = pytest.mark.slow
STEPS = 20
DIVIDED = [  # all weights of a tiny model are below DeepSpeed's threshold, and would stay whole
    "--trainer.strategy=mmfusion.training.strategies.zero.ZeRO",
    "--trainer.strategy.stage=3",
    "--trainer.strategy.config={zero_optimization: {stage3_param_persistence_threshold: 0}}",
]
GIVEN = {name: [f"--strategy={name}"] for name in get_args(Strategy)} | {
    "deepspeed_3, all divided": DIVIDED,
    "deepspeed_3_offload, all divided": [*DIVIDED, "--trainer.strategy.offload=cpu"],
    "fsdp2, offloaded": [
        "--trainer.strategy=mmfusion.training.strategies.fsdp2.FSDP2",
        "--trainer.strategy.offload=true",
    ],
}
"""Options of a run on two ranks."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


def recorder(folder: Path) -> list[str]:
    """Has a run write what each rank trained on."""
    one = {"class_path": "tests.training.tiny.Recorder", "init_args": {"folder": str(folder)}}
    return [f"--trainer.callbacks=[{one}]"]


def run(home: Path, recipe: Path, name: str, world: int, *options: str, ends: int = 0) -> Path:
    """A start of a run; where ranks wait for one another it fails after a minute."""
    args = ["fit", "-c", str(recipe), f"--run_dir={home}/{name}", "--timeout_minutes=1"]
    args += [f"--trainer.devices={world}", *recorder(home / f"{name} packs"), *options]
    log = home / f"{name}.log"
    codes = jobs.run_ranks(args, log, world) if world > 1 else [jobs.run(args, log)]
    said = "".join(path.read_text() for path in home.glob(f"{name}.[01l]*"))
    assert set(codes) == {ends}, said
    return home / name


@pytest.fixture(scope="module")
def recipe(home: Path) -> Path:
    """LoRA in a frozen LLM and a whole projector; two micro-batches a rank and step, clipped."""
    return write_recipe(
        home,
        trainer__max_steps=STEPS,
        trainer__gradient_clip_val=0.5,
        model__llm__init_args__gradient_checkpointing=True,
        model__tuning__llm__init_args__lr=3e-2,
        data__packs_per_micro_batch=1,
        checkpoint__every_n_steps=STEPS // 4,
        checkpoint__keep_last=4,
    )


@pytest.fixture(scope="module")
def alone(home: Path, recipe: Path) -> Path:
    return run(home, recipe, "alone", 1)


@pytest.fixture(scope="module")
def together(home: Path, recipe: Path) -> Callable[[str], Path]:
    return cache(lambda name: run(home, recipe, f"on {name}", 2, *GIVEN[name]))


def curve(path: Path) -> list[float]:
    return [float(loss) for _, loss in sorted(losses(RunDirectory(path)).items())]


def rows(path: Path) -> list[dict[str, float]]:
    return read_metrics(path / "metrics.csv")


@pytest.mark.parametrize("name", GIVEN)
def test_losses_gradients_and_weights_are_those_of_one_process(home, alone, together, name):
    ours, theirs = curve(alone), curve(together(name))
    assert len(theirs) == STEPS
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert fmean(ours[-5:]) < fmean(ours[:5]) - 0.3
    first, second = (
        [r["idle"] for r in recorded(home / f"on {name} packs") if r["rank"] == rank]
        for rank in (0, 1)
    )
    assert first != second  # a rank lacks pictures where the other has some
    norms = [
        [row["train/grad_norm"] for row in rows(path) if "train/grad_norm" in row]
        for path in (alone, together(name))
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert len(norms[0]) == STEPS
    one, two = (read_checkpoint(by_step(p / "checkpoints")[-1]) for p in (alone, together(name)))
    assert set(one["state_dict"]) == set(two["state_dict"])
    torch.testing.assert_close(two["state_dict"], one["state_dict"], atol=1e-4, rtol=1e-3)
    states = [kept["optimizer_states"][0] for kept in (two, one)]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], atol=1e-4, rtol=1e-2)
    assert states[0]["param_groups"] == states[1]["param_groups"]


@pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="libaio-dev is not there")
def test_offload_to_disks_changes_nothing(home, recipe, alone):
    """DeepSpeed compiles what reads and writes them, which takes minutes the first time."""
    options = [*DIVIDED, "--trainer.strategy.offload=nvme"]
    options += [f"--trainer.strategy.nvme_path={home}/disks", "--timeout_minutes=10"]
    path = run(home, recipe, "on disks", 2, *options)
    assert curve(path) == pytest.approx(curve(alone), abs=1e-5)
    one, two = (read_checkpoint(by_step(p / "checkpoints")[-1]) for p in (alone, path))
    states = [kept["optimizer_states"][0]["state"] for kept in (two, one)]
    torch.testing.assert_close(*states, atol=1e-4, rtol=1e-2)
    assert any((home / "disks").iterdir())
    again = run(home, recipe, "on disks", 2, *options, "--resume=must")
    assert len(curve(again)) == STEPS


@pytest.fixture(scope="module")
def half(home: Path) -> Path:
    """The LLM in bfloat16, computed in it; what trains in fp32."""
    return write_recipe(
        home,
        trainer__max_steps=8,
        trainer__precision="bf16-mixed",
        model__llm__init_args__dtype="bfloat16",
        model__tuning__llm__init_args__lr=1e-3,
        data__packs_per_micro_batch=1,
    )


HALVES = ["ddp", "deepspeed_1", "deepspeed_2_offload", "deepspeed_3, all divided", "fsdp2"]


@pytest.mark.parametrize("name", HALVES)
def test_bf16_is_that_of_one_process(home, half, name):
    whole = home / "half" if (home / "half").exists() else run(home, half, "half", 1)
    path = run(home, half, f"half on {name}", 2, *GIVEN[name])
    # ZeRO 3 has linear layers of its own, and sums gradients in another order: of rounding in bf16.
    near = 2**-8 if "3" in name else 1e-6
    assert curve(path) == pytest.approx(curve(whole), rel=near)
    norms = [[row["train/grad_norm"] for row in rows(one)] for one in (path, whole)]
    apart = [abs(one / two - 1) for one, two in zip(*norms, strict=True)]
    assert fmean(apart) < max(4 * near, 1e-5), apart
    kept, expected = (read_checkpoint(by_step(p / "checkpoints")[-1]) for p in (path, whole))
    assert {tensor.dtype for tensor in kept["state_dict"].values()} == {torch.float32}
    # All together: Adam makes much of single small gradients. ZeRO 3 was 0.037 away.
    ours, theirs = (
        torch.cat([w.flatten() for key, w in sorted(one["state_dict"].items()) if "lora_B" in key])
        for one in (kept, expected)
    )
    assert (ours - theirs).norm() / theirs.norm() < (2**-4 if "3" in name else 1e-4)


CHAIN = [
    ("ddp", 2),
    ("ddp", 1),
    ("ddp", 2),
    ("deepspeed_2", 2),
    ("deepspeed_2", 1),
    ("deepspeed_3", 1),
    ("deepspeed_3, all divided", 2),
    ("deepspeed_2", 2),
    ("fsdp2", 2),
    ("deepspeed_3", 2),
    ("fsdp2", 1),
    ("ddp", 2),
    ("fsdp2, offloaded", 2),
    ("deepspeed_1", 2),
    ("deepspeed_3_offload", 2),
    ("deepspeed_2_offload", 2),
    ("deepspeed_3, all divided", 3),  # shares are padded
    ("deepspeed_3, all divided", 3),
    ("fsdp2", 3),
    ("deepspeed_1", 3),
]


def test_a_run_goes_on_on_other_ranks_and_under_other_strategies(home, recipe, alone):
    """One optimizer step each: it is to stop from the beginning."""
    for step, (name, world) in enumerate(CHAIN, start=1):
        options = [*GIVEN[name], "--resume=must" if step > 1 else "--resume=auto"]
        path = stopped(home, recipe, "chain", world, *options)
        assert by_step(path / "checkpoints")[-1].name == f"step-{step:08d}.ckpt"
    assert curve(path) == pytest.approx(curve(alone)[: len(CHAIN)], abs=1e-5)
    ours, theirs = (steps(home / f"{name} packs") for name in ("alone", "chain"))
    for step in range(len(CHAIN)):  # a start that stops has seen the next step's first packs
        assert {*map(tuple, theirs[step][0])} == {*map(tuple, ours[step][0])}
        assert {*theirs[step][1]} == {*ours[step][1]}


def stopped(home: Path, recipe: Path, name: str, world: int, *options: str) -> Path:
    args = ["fit", "-c", str(recipe), f"--run_dir={home}/{name}", "--timeout_minutes=1"]
    args += [f"--trainer.devices={world}", *recorder(home / f"{name} packs"), *options]
    log, env = home / f"{name}.log", {"MMFUSION_DEADLINE": "1"}
    codes = (
        jobs.run_ranks(args, log, world, env=env) if world > 1 else [jobs.run(args, log, env=env)]
    )
    assert set(codes) <= {0, 75}, "".join(p.read_text() for p in home.glob(f"{name}.[01l]*"))
    return home / name


def test_every_weight_of_an_llm_trains_divided(home):
    """Embeddings, head and all, tied and not."""
    full = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 3e-3, "weight_decay": 0.1}}
    path = write_recipe(
        home,
        trainer__max_steps=6,
        model__tuning={"input_projectors": full, "llm": full},
        data__packs_per_micro_batch=1,
    )
    ours = curve(run(home, path, "full", 1))
    for name in ("fsdp2", "deepspeed_3, all divided", "deepspeed_2"):
        found = run(home, path, f"full on {name}", 2, *GIVEN[name])
        assert curve(found) == pytest.approx(ours, abs=2e-5)


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_3, all divided"])
def test_an_llm_of_half_precision_trains_whole_in_float32(home, name):
    """It is made so as it is divided, and goes on with the values of its checkpoint; a later stage
    has them too, whether it trains them or adapters beside them.
    """
    full = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 3e-3}}
    path = write_recipe(
        home,
        trainer__max_steps=4,
        model__llm__init_args__dtype="bfloat16",
        model__tuning={"input_projectors": full, "llm": full},
        data__packs_per_micro_batch=1,
    )
    ours = curve(run(home, path, f"whole beside {name}", 1))
    for step in range(1, 4):  # from a file, then from shards
        options = [*GIVEN[name], "--resume=must" if step > 1 else "--resume=auto"]
        options += [f"--checkpoint.sharded={'true' if step > 1 else 'false'}"]
        found = stopped(home, path, f"whole on {name}", 2, *options)
        newest = by_step(found / "checkpoints")[-1]
        assert newest.is_dir() == (step > 1)
        kept = read_checkpoint(newest)["state_dict"]
        assert {weight.dtype for weight in kept.values()} == {torch.float32}
    assert curve(found) == pytest.approx(ours[:3], abs=2e-5)
    adapters = write_recipe(home, trainer__max_steps=4, model__llm__init_args__dtype="bfloat16")
    for later in (path, adapters):
        begin = [f"--model.init_from={found}"]
        one = stopped(home, later, f"{later.stem} later beside {name}", 1, *begin)
        two = stopped(home, later, f"{later.stem} later on {name}", 2, *GIVEN[name], *begin)
        assert curve(two) == pytest.approx(curve(one), abs=2e-5)
        assert curve(one) != pytest.approx(ours[:1], abs=1e-2)


@pytest.mark.parametrize("name", ["deepspeed_2_offload", "deepspeed_3, all divided", "fsdp2"])
def test_what_a_strategy_wrote_is_loaded_and_begun_from(home, recipe, alone, together, name):
    ours, theirs = (mmfusion.load(path) for path in (alone, together(name)))
    states = [
        {key: weight for key, weight in chat.model.state_dict().items() if "lora_" in key}
        for chat in (theirs, ours)
    ]
    assert states[0]
    torch.testing.assert_close(*states, atol=1e-4, rtol=1e-3)
    begun = [
        curve(stopped(home, recipe, f"{which} from {name}", 1, f"--model.init_from={path}"))
        for which, path in (("ours", alone), ("theirs", together(name)))
    ]
    assert begun[1] == pytest.approx(begun[0], abs=1e-4)
    assert begun[0] != pytest.approx(curve(alone)[:1], abs=1e-2)


def test_names_are_lightnings_too(home, recipe, capsys):
    assert set(OURS) | {"ddp"} == set(get_args(Strategy))
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(recipe), "--strategy=ddp", "--trainer.strategy=fsdp2"])
    said = capsys.readouterr().err
    assert "strategy is ddp and trainer.strategy is set as well" in said
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(recipe), "--strategy=deepspeed_4"])
    assert "deepspeed_2_offload" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["ddp", "deepspeed_2", "deepspeed_3", "deepspeed_3, all divided", "fsdp2"]
)
def test_shards_are_the_checkpoint_of_one_process(home, recipe, alone, together, name):
    """Written by both ranks, read whole, and gone on from on one rank."""
    options = [*GIVEN[name], "--checkpoint.sharded=true"]
    path = stopped(home, recipe, f"shards on {name}", 2, *options)
    folder = path / "checkpoints" / "step-00000001"
    assert {file.name for file in folder.iterdir()} == {
        "manifest.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "rest.ckpt",
    }
    assert why_incomplete(folder) is None
    shards = read_checkpoint(folder)
    single = stopped(home, recipe, f"single on {name}", 2, *GIVEN[name])
    whole = read_checkpoint(by_step(single / "checkpoints")[-1])
    assert set(shards) == set(whole)
    torch.testing.assert_close(shards["state_dict"], whole["state_dict"], atol=0, rtol=0)
    (one,), (two,) = shards["optimizer_states"], whole["optimizer_states"]
    torch.testing.assert_close(one["state"], two["state"], atol=0, rtol=0)
    assert one["param_groups"] == two["param_groups"]
    assert read_checkpoint(folder, "meta")["state_dict"].keys() == whole["state_dict"].keys()
    stopped(home, recipe, f"shards on {name}", 1, "--resume=must", "--checkpoint.sharded=true")
    stopped(home, recipe, f"shards on {name}", 2, *options, "--resume=must")
    assert curve(path) == pytest.approx(curve(alone)[:3], abs=1e-5)


@pytest.mark.parametrize("name", ["ddp", "deepspeed_3, all divided", "fsdp2"])
def test_shards_written_behind_are_what_was_trained_when_they_were_due(
    home, recipe, alone, together, name
):
    """One rank is slow: no step waits for it, what is due meanwhile is left out, and the folder
    counts once all have written theirs."""
    slow = {"class_path": "tests.training.tiny.HeldShards", "init_args": {"until": 16}}
    saving = ["--checkpoint.sharded=true", "--checkpoint.behind=true"]
    path = run(
        home,
        recipe,
        f"behind on {name}",
        2,
        *GIVEN[name],
        *saving,
        f"--trainer.callbacks+={slow}",
    )
    first, *later = by_step(path / "checkpoints")
    assert first.name == "step-00000005"
    assert [one.name for one in later] == ["step-00000020"]
    said = (path / "attempts/0001/log.txt").read_text()
    assert "step 10 is not saved" in said
    assert "step 15 is not saved" in said
    assert [why_incomplete(one) for one in (first, *later)] == [None, None]
    assert (path / "checkpoints/latest").read_text().strip() == "step-00000020"
    assert curve(path) == pytest.approx(curve(alone), abs=1e-5)
    known, *_, last = by_step(together(name) / "checkpoints")
    for one, other in ((first, known), (later[0], last)):
        ours, theirs = read_checkpoint(one), read_checkpoint(other)
        torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], atol=0, rtol=0)
        (mine,), (its,) = ours["optimizer_states"], theirs["optimizer_states"]
        torch.testing.assert_close(mine["state"], its["state"], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [("NAdam", "deepspeed_1"), ("NAdam", "deepspeed_3, all divided"), ("SGD", "deepspeed_3")],
)
def test_other_optimizers_go_on_from_one_process(home, recipe, optimizer, name):
    """NAdam has a second number beside the step, SGD no state at all."""
    given = [f"--model.optimizer=torch.optim.{optimizer}", "--trainer.max_steps=3"]
    ours = curve(run(home, recipe, f"{optimizer} beside {name}", 1, *given))
    for world, options in ((1, []), (2, GIVEN[name]), (2, GIVEN[name])):
        path = stopped(home, recipe, f"{optimizer} on {name}", world, *given, *options)
    assert curve(path) == pytest.approx(ours, abs=1e-5)
    last = [
        read_checkpoint(by_step(home / f"{optimizer} {which} {name}" / "checkpoints")[-1])
        for which in ("on", "beside")
    ]
    torch.testing.assert_close(*(one["state_dict"] for one in last), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ddp", "deepspeed_3", "fsdp2"])
def test_weights_of_another_shape_are_refused(home, recipe, name):
    path = stopped(home, recipe, f"rank 2 on {name}", 1, *GIVEN[name])
    more = ["--model.tuning.llm.init_args.r=4", "--allow_recipe_change"]
    run(home, recipe, path.name, 1, *GIVEN[name], *more, ends=1)
    said = (home / f"{path.name}.log").read_text()
    assert "tensors of the checkpoint have another shape in this recipe" in said


@pytest.mark.parametrize("name", ["deepspeed_1", "fsdp2"])
def test_optimizers_of_whole_matrices_are_refused(home, recipe, name):
    options = [*GIVEN[name], "--model.optimizer=torch.optim.Adafactor"]
    run(home, recipe, f"matrices on {name}", 1, *options, ends=1)
    said = (home / f"matrices on {name}.log").read_text()
    assert "model.optimizer is Adafactor, which computes with whole matrices" in said


@pytest.mark.parametrize("fields", [{"zero_optimization": "x"}, {"bf16": True}, {"fp16": None}])
def test_sections_of_zeros_configuration_hold_fields(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"ZeRO: config\.{name} is .*; expected its fields"):
        ZeRO(config=fields)
