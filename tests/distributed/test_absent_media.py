"""DeepSpeed's ZeRO and FSDP2 on two CPU processes over gloo train as one process does, also where a
rank has no pictures to make, or no media at all.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.distributed.tensor import DTensor

from mmfusion.data.writer import ShardWriter
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.loggers import read_metrics
from mmfusion.training.resume import by_step
from mmfusion.training.run import RunDirectory
from mmfusion.training.strategies.shares import refuse_numbers
from tests.training import jobs
from tests.training.pictures import (
    FULL,
    NEW,
    OUTPUT,
    SMALL,
    aligned_rows,
    objective,
    prepare,
    recipe,
)
from tests.training.tiny import HERE, TINY, losses, recorded, refused, write_recipe

pytestmark = pytest.mark.slow
STEPS = 6
NAMES = ("train/loss", "train/next_token", "train/align", "train/denoise")
ZERO = "--trainer.strategy=mmfusion.training.strategies.zero.ZeRO"
FSDP2 = "mmfusion.training.strategies.fsdp2.FSDP2"
TENSOR = "--trainer.strategy.tensor_parallel=2"
# All weights of a tiny model are below DeepSpeed's threshold, and would not be divided.
DIVIDED = "--trainer.strategy.config={zero_optimization: {stage3_param_persistence_threshold: 0}}"
READS = SMALL | {"layers": [1, -1], "add_embeddings": True, "baseline": "w31"}
CONVERTER = {"class_path": f"{HERE}.TinyConverter"}


def zero(stage: int | str) -> list[str]:
    """Options; of FSDP2 too, as a stage of its own; and with frozen parts that are divided, under
    ZeRO in the host's memory.
    """
    frozen = [f"--trainer.strategy.divide_{parts}=true" for parts in ("encoders", "denoisers")]
    if stage == "3, frozen":
        return [*zero(3), *frozen, "--trainer.strategy.offload=cpu"]
    if stage == "fsdp2, frozen":
        return [f"--trainer.strategy={FSDP2}", *frozen]
    if stage == "fsdp2":
        return ["--strategy=fsdp2"]
    return [ZERO, f"--trainer.strategy.stage={stage}", *([DIVIDED] if stage == 3 else [])]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def mixed(home: Path) -> Path:
    """Stage 2 with pictures that are seen, pictures that are made, and words alone; packs of about
    one sample.
    """
    seen = {"shards": f"{home}/train-*.tar", "converter": CONVERTER, "weight": 2}
    sources = {"train": seen} | yaml.safe_load(recipe(home).read_text())["data"]["sources"]
    return recipe(
        home,
        model__encoders={"image": {"class_path": f"{TINY}.TinyEncoder"}},
        model__input_projectors={"image": {"class_path": f"{HERE}.DropoutProjector"}},
        model__output_projectors={"image": {"class_path": OUTPUT, "init_args": READS}},
        model__tuning={"input_projectors": FULL, "output_projectors": FULL, "llm": NEW},
        model__objectives={
            "next_token": {
                "class_path": "mmfusion.objectives.next_token.NextToken",
                "init_args": {"chunk": 8},  # another number of chunks on each rank
            },
            "align": objective("align", contrastive=0.5),
            "denoise": objective("denoise", drop_condition=0.2),
        },
        trainer__max_steps=STEPS,
        checkpoint__every_n_steps=3,
        data__seed=4,  # see the last lines of the first test
        data__sources=sources,
        data__val_sources=sources,
        data__val_limit=5,
        data__pack_tokens=24,
        data__packs_per_micro_batch=1,
        val_every_n_steps=STEPS // 2,  # training goes on after one
        validation={"generate_samples": 0, "table_samples": 0},
    )


class Shares(L.Callback):
    """Writes which weights are divided among the ranks."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        held = {
            name
            for name, parameter in module.named_parameters()
            if isinstance(parameter, DTensor)
            or (hasattr(parameter, "ds_tensor") and not parameter.ds_persist)
        }
        if trainer.is_global_zero:
            self.file.write_text("\n".join(sorted(held)))


def run(home: Path, path: Path, name: str, world: int, *options: str) -> Path:
    """A whole run; where ranks wait for one another it fails after a minute."""
    recorder = {
        "class_path": "tests.training.tiny.Recorder",
        "init_args": {"folder": f"{home}/{name}-packs"},
    }
    args = ["fit", "-c", str(path), f"--run_dir={home}/{name}", "--timeout_minutes=1"]
    shares = {"class_path": f"{__name__}.Shares", "init_args": {"file": f"{home}/{name}.shares"}}
    args += [f"--trainer.callbacks=[{recorder}, {shares}]", f"--trainer.devices={world}", *options]
    log = home / f"{name}.log"
    codes = jobs.run_ranks(args, log, world) if options else [jobs.run(args, log)]
    assert set(codes) == {0}, "".join(p.read_text() for p in home.glob(f"{name}.[01l]*"))
    return home / name


def figures(path: Path) -> list[dict[str, float]]:
    """Losses of each step, then what the validations found."""
    rows = read_metrics(path / "metrics.csv")
    found = [{key: row[key] for key in NAMES if key in row} for row in rows if NAMES[0] in row]
    validations = [row for row in rows if "val/loss" in row]
    return found + [{k: x for k, x in row.items() if k.startswith("val/")} for row in validations]


@pytest.fixture(scope="module")
def alone(home: Path, mixed: Path) -> Path:
    return run(home, mixed, "alone", 1)


@pytest.fixture(scope="module")
def divided(home: Path, mixed: Path) -> Callable[[int | str], Path]:
    """The same run on two ranks, by stage."""
    return cache(lambda stage: run(home, mixed, f"zero{stage}", 2, *zero(stage)))


@pytest.mark.parametrize("stage", [1, 2, 3, "fsdp2", "3, frozen", "fsdp2, frozen"])
def test_a_rank_without_media_changes_nothing(home, alone, divided, stage):
    ours, theirs = figures(alone), figures(divided(stage))
    assert len(ours) == STEPS + 2
    for one, two in zip(ours, theirs, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert {"val/cosine/image", "val/denoising/image/ours", "val/denoise"} <= set(ours[-1])
    made, seen = media(home / f"zero{stage}-packs")
    assert lacking(made) - lacking({key: made[key] + seen[key] for key in made})
    assert lacking({key: made[key] + seen[key] for key in made})


@pytest.mark.parametrize("stage", [3, "fsdp2"])
def test_frozen_parts_are_divided_where_the_recipe_says_so(home, divided, stage):
    def shared(which: int | str) -> set[str]:
        divided(which)
        names = (home / f"zero{which}.shares").read_text().split()
        return {
            re.match(r"model\.(llm|\w+\.image\.?(vae|text_encoder|denoiser)?)", n)[0] for n in names
        }

    frozen = {"model.encoders.image.", "model.generators.image.denoiser"}
    assert not shared(stage) & frozen
    assert shared(f"{stage}, frozen") == shared(stage) | frozen
    assert "model.llm" in shared(stage)


def media(folder: Path) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """By step and rank: pictures to make, and micro-batches with pictures to see."""
    rows = recorded(folder)
    made = {(row["step"], row["rank"]): 0 for row in rows}
    seen = dict(made)
    for row in rows:
        made[row["step"], row["rank"]] += sum(sample[0] == "pairs" for sample in row["samples"])
        seen[row["step"], row["rank"]] += "image" not in row["idle"]
    return made, seen


def lacking(counts: dict[tuple[int, int], int]) -> set[int]:
    """Steps in which one rank has none, and the other has some."""
    return {step for step, _ in counts if bool(counts[step, 0]) != bool(counts[step, 1])}


def test_a_rank_without_pictures_reaches_the_llm_without_next_token_too(home):
    path = aligned_rows(home, data__packs_per_micro_batch=1)
    ours, *theirs = (
        losses(RunDirectory(run(home, path, name, world, *options)))
        for name, world, options in (
            ("align1", 1, []),
            ("align2", 2, zero(3)),
            ("align3", 2, zero("fsdp2")),
        )
    )
    made, _ = media(home / "align2-packs")
    assert lacking(made)
    for found in theirs:
        assert {k: float(x) for k, x in found.items()} == pytest.approx(
            {k: float(x) for k, x in ours.items()}, rel=1e-5
        )


def test_a_checkpoint_is_that_of_one_process(alone, divided):
    """Weights, optimizer and all."""
    whole = read_checkpoint(by_step(alone / "checkpoints")[-1])
    for stage in (2, 3, "fsdp2"):
        found = read_checkpoint(by_step(divided(stage) / "checkpoints")[-1])
        assert set(found) == set(whole)
        assert set(found["state_dict"]) == set(whole["state_dict"])
        one, two = (kept["optimizer_states"][0] for kept in (whole, found))
        for ours, theirs in zip(one["param_groups"], two["param_groups"], strict=True):
            assert theirs == ours
        torch.testing.assert_close(two["state"], one["state"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("before", "stage"), [(2, 3), (3, "fsdp2"), ("fsdp2", 2)])
def test_a_run_goes_on_in_another_stage(home, mixed, alone, divided, before, stage):
    start = divided(before) / "checkpoints" / f"step-{STEPS // 2:08d}.ckpt"
    options = [*zero(stage)[:2], f"--resume={start}", f"--val_every_n_steps={STEPS + 1}"]
    rest = losses(RunDirectory(run(home, mixed, f"on{stage}", 2, *options)))
    expected = losses(RunDirectory(alone))
    assert sorted(rest) == [*range(STEPS // 2, STEPS)]
    for step, loss in rest.items():
        assert float(loss) == pytest.approx(float(expected[step]), rel=1e-5)


def test_a_step_without_targets_moves_neither_weights_nor_momentum(home):
    """Accumulated over two micro-batches, with clipping and LoRA."""
    path = write_recipe(
        home,
        trainer__max_steps=400,
        model__schedule={"warmup_steps": 0},
        data__epochs=1,
        data__sources={"train": {"shards": f"{home}/val-*.tar", "converter": CONVERTER}},
        data__pack_tokens=24,
        data__lanes=5,  # of 12 samples: some are used up first
        data__packs_per_step=2,
        data__packs_per_micro_batch=1,
        checkpoint__every_n_steps=1,
    )
    plain, divided = run(home, path, "plain", 1), run(home, path, "divided", 1, *zero(3))
    ours, theirs = (losses(RunDirectory(path)) for path in (plain, divided))
    one, two = (read_checkpoint(by_step(path / "checkpoints")[-1]) for path in (plain, divided))
    assert one["global_step"] == two["global_step"] == 6
    assert set(ours) == {0, 1, 2, 3, 5}
    assert {k: float(x) for k, x in theirs.items()} == pytest.approx(
        {k: float(x) for k, x in ours.items()}, rel=1e-5
    )
    states = (found["optimizer_states"][0]["state"] for found in (two, one))
    torch.testing.assert_close(*states, atol=1e-6, rtol=1e-4)


def test_the_gradient_of_the_step_before_is_not_counted_again(home):
    """Of weights that a step does not use. Nothing moves, so that the gradients of all steps are
    those of the same weights.
    """
    still = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 0.0}}
    path = write_recipe(
        home,
        trainer__max_steps=STEPS,
        model__input_projectors={"image": {"class_path": f"{HERE}.NowAndThen"}},
        model__tuning={"input_projectors": still},
        data__packs_per_step=2,
        data__packs_per_micro_batch=2,
    )
    norms = [
        [row["train/grad_norm"] for row in read_metrics(run(home, path, *of) / "metrics.csv")]
        for of in (("once", 1), ("again", 1, *zero(3)))
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_numbers_without_a_dimension_are_refused():
    model = torch.nn.Linear(2, 2)
    refuse_numbers(model)
    model.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"1 parameters have no dimension \(scale, ...\)"):
        refuse_numbers(model)


@pytest.fixture(scope="module")
def in_turn(home: Path, mixed: Path) -> Path:
    """Pictures that are seen, pictures that are made, sounds that are heard and words, one after
    the other in a single lane: the two packs of a step never have the same.
    """
    draw = random.Random(3)
    for name, kind in (("pictures", "image"), ("sounds", "audio"), ("talk", None)):
        with ShardWriter(f"{home}/{name}-%06d.tar") as writer:
            for i in range(60):
                words = " ".join(f"w{draw.randrange(35)}" for _ in range(14))
                media = {kind: bytes([1 + i % 4])} if kind else {}
                writer.write(f"{name}{i:03d}", {"txt": words.encode(), **media})
    recipe = yaml.safe_load(mixed.read_text())
    recipe["model"]["encoders"]["audio"] = recipe["model"]["encoders"]["image"]
    recipe["model"]["input_projectors"]["audio"] = recipe["model"]["input_projectors"]["image"]
    pairs = recipe["data"]["sources"]["pairs"]
    own = {
        name: {"shards": f"{home}/{name}-*.tar", "converter": CONVERTER}
        for name in ("pictures", "sounds", "talk")
    }
    recipe["data"] |= {"sources": {"pairs": pairs, **own}, "lanes": 1, "window": 1}
    recipe["data"] |= {"packs_per_step": 2, "val_sources": {}}
    path = home / "in_turn.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("stage", [3, "fsdp2"])
def test_two_hundred_steps_in_which_ranks_differ_in_modalities(home, in_turn, stage):
    """Nothing waits for what does not come, and nothing is lost on the way."""
    more = ["--trainer.max_steps=200", "--checkpoint.every_n_steps=100"]
    path = run(home, in_turn, f"long{stage}", 2, *zero(stage), *more)
    assert len(losses(RunDirectory(path))) == 200
    held = {
        (row["step"], row["rank"]): {source for source, *_ in row["samples"]}
        for row in recorded(home / f"long{stage}-packs")
    }
    assert {step for step, _ in held} == set(range(200))
    assert all(len(one) == 1 for one in held.values())  # one pack is of one kind
    assert all(held[step, 0] != held[step, 1] for step in range(200))
    assert len({(*held[step, 0], *held[step, 1]) for step in range(200)}) > 1


class Idle(L.Callback):
    """Writes what of each micro-batch is idle as the model is given it: of packs that ranks share,
    in this rank's part.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / str(trainer.global_rank)

        def note(model: Any, args: tuple[Any, ...]) -> None:
            if not model.training:
                return
            (batch,) = args
            row = {f"in {name}": one.idle for name, one in batch.media.items()}
            row |= {f"out {name}": one.idle for name, one in batch.targets.items()}
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")

        module.model.register_forward_pre_hook(note)


TURNS = 8
TOGETHER = {
    "shared by two": (2, ["--sequence_parallel=2", *zero(3)]),
    "layers of two of four": (4, [f"--trainer.strategy={FSDP2}", TENSOR]),
    "deepspeed_2_offload": (2, ["--strategy=deepspeed_2_offload"]),
    "deepspeed_3_offload": (2, [*zero(3), "--trainer.strategy.offload=cpu"]),
}
"""Ranks and options."""


@pytest.fixture(scope="module")
def turns(in_turn: Path) -> Callable[[int, list[str], str], Path]:
    """A few steps, without dropout, which ranks that share a pack draw for themselves."""
    recipe = yaml.safe_load(in_turn.read_text())
    for projector in recipe["model"]["input_projectors"].values():
        projector["init_args"] = {"dropout": 0.0}
    path = in_turn.with_name("turns.yaml")
    path.write_text(yaml.safe_dump(recipe))

    def made(world: int, options: list[str], name: str) -> Path:
        folder = {"folder": f"{path.parent}/{name}-idle"}
        idle = {"class_path": f"{__name__}.Idle", "init_args": folder}
        more = [f"--trainer.max_steps={TURNS}", f"--trainer.callbacks+=[{idle}]"]
        return run(path.parent, path, name, world, *options, *more)

    return made


@pytest.fixture(scope="module")
def in_turn_alone(turns: Callable[[int, list[str], str], Path]) -> Path:
    return turns(1, [], "turns")


@pytest.mark.parametrize("name", TOGETHER)
def test_parts_that_nothing_is_there_for_change_nothing(turns, in_turn_alone, name):
    """Packs of one kind each: ranks without pictures to see or to make, without sounds, with words
    alone, and parts of a pack without what is in the other part of it.
    """
    world, options = TOGETHER[name]
    path = turns(world, options, name)
    ours, theirs = figures(in_turn_alone), figures(path)
    assert len(ours) == TURNS
    assert {key for row in ours for key in row} == set(NAMES)
    for one, two in zip(ours, theirs, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    norms = [
        [row["train/grad_norm"] for row in read_metrics(p / "metrics.csv") if NAMES[0] in row]
        for p in (in_turn_alone, path)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4, abs=1e-5)
    kept = [read_checkpoint(by_step(p / "checkpoints")[-1]) for p in (path, in_turn_alone)]
    weights = [without_key_biases(one["state_dict"]) for one in kept]
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)
    states = [one["optimizer_states"][0]["state"] for one in kept]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)
    files = [Path(f"{path}-idle") / str(rank) for rank in range(world)]
    rows = [[json.loads(line) for line in file.open()] for file in files]
    for kind in ("in image", "in audio", "out image"):  # each at a time here and not there
        given = [tuple(row[kind] for row in now) for now in zip(*rows, strict=True)]
        assert any(any(now) and not all(now) for now in given), (kind, given)
    assert any(all(row.values()) for one in rows for row in one)  # words alone


def without_key_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Softmax does not see what is added to all keys: the gradient is what rounding leaves, of
    which Adam makes steps.
    """
    found = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in found.items():
        if name.endswith("in_proj_bias"):
            weight.chunk(3)[1].zero_()
    return found


def refused_by(home: Path, name: str, *args: str) -> str:
    """What is said by a process of its own that does not go on."""
    log = home / f"{name}.log"
    assert jobs.run_ranks([*args, f"--run_dir={home}/{name}"], log, 1) == [1]
    return log.with_suffix(".0").read_text()


def test_gradients_that_are_not_finite_are_refused(home):
    broken = {
        "class_path": f"{HERE}.NotANumber",
        "init_args": {"from_step": 3, "gradient_only": True},
    }
    path = write_recipe(home, model__objectives={"next_token": broken}, checkpoint__every_n_steps=1)
    fail = [*zero(2), "--guard.not_finite=fail"]
    said = refused_by(home, "broken", "fit", "-c", str(path), *fail)
    assert "gradients of optimizer step 1 are not finite" in said
    assert [p.name for p in by_step(home / "broken" / "checkpoints")] == ["step-00000001.ckpt"]


def test_what_cannot_be_done_under_zero_is_refused(home, mixed, alone, capsys):
    said = refused(
        capsys, mixed, *zero(2), "--trainer.precision=16-mixed", f"--run_dir={home}/half"
    )
    assert "trainer.precision is 16-mixed; ZeRO trains in 32-true or bf16-mixed" in said
    recipe = yaml.safe_load(mixed.read_text()) | {"run_dir": str(alone)}
    again = home / "again.yaml"
    again.write_text(yaml.safe_dump(recipe))
    said = refused_by(home, "validates", "validate", "-c", str(again), "--resume=none", *zero(3))
    assert "ZeRO, which only trains" in said


@pytest.mark.parametrize("stage", [3, "fsdp2"])
def test_a_divided_llm_is_asked_nothing_and_it_is_said(home, mixed, stage):
    options = [*zero(stage), "--validation.generate_samples=3", "--validation.table_samples=0"]
    path = run(home, mixed, f"asked{stage}", 2, *options)
    said = (home / f"asked{stage}.0").read_text()
    assert "validations leave out {'generate_samples': 3}" in said
    assert any("val/loss" in row for row in read_metrics(path / "metrics.csv"))
