"""Two ranks that share every pack train as one process does: each a part of its tokens, under every
strategy; or each a part of the LLM's layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mmfusion.cli import main
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.loggers import read_metrics
from mmfusion.training.resume import by_step
from mmfusion.training.run import RunDirectory
from tests.training import jobs
from tests.training.pictures import prepare
from tests.training.pictures import recipe as pictures
from tests.training.tiny import losses, refused, save_llm, write_recipe

pytestmark = pytest.mark.slow
STEPS = 20
SHARED = "--sequence_parallel=2"
TENSOR = [
    "--trainer.strategy=mmfusion.training.strategies.fsdp2.FSDP2",
    "--trainer.strategy.tensor_parallel=2",
]
GIVEN = {
    "ddp": [SHARED, "--strategy=ddp"],
    "deepspeed_2": [SHARED, "--strategy=deepspeed_2"],
    "deepspeed_3": [
        SHARED,
        "--trainer.strategy=mmfusion.training.strategies.zero.ZeRO",
        "--trainer.strategy.stage=3",
        "--trainer.strategy.config={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ],
    "fsdp2": [SHARED, "--strategy=fsdp2"],
    "tensor": TENSOR,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequence")


def run(home: Path, recipe: Path, name: str, world: int, *options: str) -> Path:
    args = ["fit", "-c", str(recipe), f"--run_dir={home}/{name}", "--timeout_minutes=1"]
    args += [f"--trainer.devices={world}", *options]
    log = home / f"{name}.log"
    codes = jobs.run_ranks(args, log, world) if world > 1 else [jobs.run(args, log)]
    said = "".join(path.read_text() for path in home.glob(f"{name}.[01l]*"))
    assert set(codes) == {0}, said
    return home / name


def a_recipe(home: Path, **changes: object) -> Path:
    """Without dropout, which ranks that share a pack draw for themselves."""
    return write_recipe(
        home,
        trainer__max_steps=STEPS,
        trainer__gradient_clip_val=0.5,
        model__input_projectors__image__init_args={"dropout": 0.0},
        model__llm__init_args__gradient_checkpointing=True,
        model__tuning__llm__init_args={"r": 2, "lr": 3e-2, "dropout": 0.0},
        data__val_sources={
            "val": {
                "shards": str(home / "val-*.tar"),
                "converter": {"class_path": "tests.training.tiny.TinyConverter"},
            }
        },
        data__packs_per_micro_batch=1,
        val_every_n_steps=STEPS,
        validation={"generate_samples": 0, "table_samples": 0},
        checkpoint__every_n_steps=STEPS // 2,
        **changes,
    )


@pytest.fixture(scope="module")
def recipe(home: Path) -> Path:
    return a_recipe(home)


@pytest.fixture(scope="module")
def alone(home: Path, recipe: Path) -> Path:
    return run(home, recipe, "alone", 1)


def curve(path: Path) -> list[float]:
    return [float(loss) for _, loss in sorted(losses(RunDirectory(path)).items())]


def logged(path: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(path / "metrics.csv") if name in row]


@pytest.mark.parametrize("name", GIVEN)
def test_losses_gradients_and_weights_are_those_of_one_process(home, recipe, alone, name):
    path = run(home, recipe, f"on {name}", 2, *GIVEN[name])
    ours, theirs = curve(alone), curve(path)
    assert len(theirs) == STEPS
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert fmean(ours[-5:]) < fmean(ours[:5]) - 0.3
    for figure in ("train/grad_norm", "val/loss", "val/shuffled_gap/image"):
        assert logged(path, figure) == pytest.approx(logged(alone, figure), rel=1e-4, abs=1e-5)
        assert logged(alone, figure)
    for figure in ("data/train/samples", "data/words/tokens", "throughput/padding_share"):
        assert logged(path, figure) == pytest.approx(logged(alone, figure), abs=1e-9)
    one, two = (read_checkpoint(by_step(p / "checkpoints")[-1]) for p in (alone, path))
    torch.testing.assert_close(two["state_dict"], one["state_dict"], atol=1e-4, rtol=1e-3)
    states = [kept["optimizer_states"][0]["state"] for kept in (two, one)]
    torch.testing.assert_close(*states, atol=1e-4, rtol=1e-2)
    streams = [kept["callbacks"]["mmfusion.stream"] for kept in (two, one)]
    assert streams[0] == streams[1]


@pytest.mark.parametrize(("heads", "keys"), [(3, 3), (6, 3), (4, 1)])
def test_heads_need_not_divide_evenly(home, heads, keys):
    llm = save_llm(
        home / f"{heads} of {keys}",
        num_attention_heads=heads,
        num_key_value_heads=keys,
        hidden_size=48,
    )
    path = a_recipe(home, model__llm__init_args__path=llm)
    steps = "--trainer.max_steps=3"
    ours = curve(run(home, path, f"alone {heads} {keys}", 1, steps))
    theirs = curve(run(home, path, f"shared {heads} {keys}", 2, steps, SHARED))
    assert theirs == pytest.approx(ours, abs=1e-5)


class Apart(L.Callback):
    """One rank computes a little else, as a GPU might; at the end each writes its weights."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        for parameter in module.model.input_projectors.parameters():
            parameter.grad += 1e-3 * trainer.global_rank

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        kept = {name: p.to_local() for name, p in module.model.input_projectors.named_parameters()}
        save_file(kept, self.folder / str(trainer.global_rank))


def test_ranks_that_compute_alike_stay_alike(home, recipe):
    callback = {"class_path": f"{__name__}.Apart", "init_args": {"folder": f"{home}/apart"}}
    options = [*TENSOR, "--trainer.max_steps=3", f"--trainer.callbacks={json.dumps([callback])}"]
    run(home, recipe, "alike", 2, *options)
    one, two = (load_file(home / "apart" / rank) for rank in "01")
    torch.testing.assert_close(one, two, atol=0, rtol=0)


DDP = ["--strategy=ddp"]
CHAIN = [GIVEN["ddp"], DDP, TENSOR, TENSOR, GIVEN["fsdp2"], TENSOR, DDP]


@pytest.mark.parametrize(
    ("world", "legs"),
    [(2, CHAIN), *((4, [GIVEN[name]] * 3) for name in ("tensor", "fsdp2", "deepspeed_2"))],
)
def test_a_run_goes_on_with_packs_shared_or_not(home, recipe, alone, world, legs):
    """One optimizer step each. Of four ranks two groups share a step's packs, and the model."""
    name = f"chain {world} {legs[0][-1].rpartition('=')[2]}"
    for step, options in enumerate(legs, start=1):
        stop = {"MMFUSION_DEADLINE": "1"}
        args = ["fit", "-c", str(recipe), f"--run_dir={home}/{name}", "--timeout_minutes=1"]
        args += [f"--trainer.devices={world}", *options]
        codes = jobs.run_ranks(args, home / f"{name}.log", world, env=stop)
        assert set(codes) <= {0, 75}, "".join(p.read_text() for p in home.glob(f"{name}.[0-3]"))
        assert len(curve(home / name)) == step
    assert curve(home / name) == pytest.approx(curve(alone)[: len(legs)], abs=1e-5)


def test_what_cannot_share_is_refused(home, recipe, capsys):
    for command, *options, told in (
        ("fit", "--data.pad_rows=true", "only packs laid end to end can be shared"),
        ("fit", *TENSOR, "set one of them"),
        ("predict", "add --sequence_parallel=1"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([command, "-c", str(recipe), SHARED, *options])
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
    assert "1 processes cannot share packs in groups of 2" in refused(capsys, recipe, SHARED)


def test_pictures_are_made_from_shared_packs(tmp_path):
    """Targets are summed where their signal tokens are."""
    prepare(tmp_path)
    path = pictures(
        tmp_path,
        trainer__max_steps=6,
        data__packs_per_micro_batch=2,
        data__packs_per_step=2,
        data__val_sources=yaml.safe_load(pictures(tmp_path).read_text())["data"]["sources"],
        data__val_limit=9,
        val_every_n_steps=6,
        validation={"generate_samples": 0, "table_samples": 0},
    )
    one = run(tmp_path, path, "one", 1)
    two = run(tmp_path, path, "two", 2, *GIVEN["ddp"])
    names = [f"train/{name}" for name in ("loss", "next_token", "align", "denoise")]
    names += ["val/loss", "val/align", "val/retrieval@1/image", "val/denoising_gain/image"]
    for name in names:
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4, abs=1e-5)
    assert len(logged(one, "train/denoise")) >= 5
