"""Two ranks that share every pack train on long video and long audio as one process does: the
tokens of one clip lie in the parts of both.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import save_file
from transformers import WhisperForConditionalGeneration

from mmfusion.data.writer import ShardWriter
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.loggers import read_metrics
from mmfusion.training.resume import by_step
from mmfusion.training.run import RunDirectory
from tests.models.encoders.test_whisper import config
from tests.models.tiny import save_llm
from tests.processing.test_videos import film
from tests.training import jobs
from tests.training.pictures import FULL
from tests.training.tiny import losses, write_recipe

pytestmark = pytest.mark.slow
STEPS = 4
FRAMES, FEATURES = 64, 4
"""Of a clip, and of a frame."""
SECONDS = 6
PACK = 320
GIVEN = {
    "ddp": ["--strategy=ddp"],
    "deepspeed_3": [
        "--trainer.strategy=mmfusion.training.strategies.zero.ZeRO",
        "--trainer.strategy.stage=3",
        "--trainer.strategy.config={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ],
}


class Parts(L.Callback):
    """Writes how many tokens of the media of each pack lie in this rank's part, and of how many."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / str(trainer.global_rank)

        def note(model: Any, args: tuple[Any, ...]) -> None:
            (batch,) = args
            bounds, group = batch.bounds or (0, PACK), model.sequence_group
            first, end = bounds[(place := group.rank if group else 0) : place + 2]
            row = {
                name: [int(((one.slots >= first) & (one.slots < end)).sum()), len(one.slots)]
                for name, one in batch.media.items()
                if not one.idle
            }
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")

        module.model.register_forward_pre_hook(note)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films of 8 seconds, sounds of 6, each long enough for a pack of its own; a random
    EfficientNet and a random Whisper.
    """
    folder = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    (folder / "net").mkdir()
    net = EfficientNet.from_name("efficientnet-lite0")
    save_file(net.state_dict(), folder / "net" / "model.safetensors")
    WhisperForConditionalGeneration(config(50 * (SECONDS + 1))).save_pretrained(folder / "whisper")
    save_llm(folder / "llm", max_position_embeddings=512)
    draw = np.random.default_rng(0)
    with ShardWriter(str(folder / "long-%06d.tar")) as writer:
        for i in range(6):
            words = " ".join(f"w{draw.integers(35)}" for _ in range(12)).encode()
            writer.write(f"film{i}", {"mp4": film(FRAMES + i, fps=8), "txt": words})
            sound = io.BytesIO()
            noise = draw.normal(0, 0.1, 16_000 * SECONDS).astype(np.float32)
            soundfile.write(sound, noise, 16_000, format="wav")
            writer.write(f"sound{i}", {"wav": sound.getvalue(), "txt": words})
    return folder


@pytest.fixture(scope="module")
def recipe(home: Path) -> Path:
    video = {
        "class_path": "mmfusion.models.encoders.efficientnet.EfficientNetLiteVideo",
        "init_args": {"path": f"{home}/net", "frames": FRAMES, "fps": 8, "image_size": 64},
    }
    audio = {
        "class_path": "mmfusion.models.encoders.whisper.WhisperEncoder",
        "init_args": {"path": f"{home}/whisper", "max_seconds": SECONDS},
    }
    linear = {"class_path": "mmfusion.models.projectors.linear.Linear"}
    return write_recipe(
        home,
        trainer__max_steps=STEPS,
        trainer__gradient_clip_val=0.5,
        model__encoders={"video": video, "audio": audio},
        model__input_projectors={"video": linear, "audio": linear},
        model__llm__init_args__gradient_checkpointing=True,
        model__tuning__input_projectors=FULL,
        model__tuning__llm__init_args={"r": 2, "lr": 1e-3, "dropout": 0.0},
        data__sources={
            "long": {
                "shards": f"{home}/long-*.tar",
                "converter": {"class_path": "mmfusion.data.converters.caption.Caption"},
            }
        },
        data__pack_tokens=PACK,
        data__packs_per_step=2,
        data__packs_per_micro_batch=1,
        data__lanes=1,
        data__window=1,
    )


def run(home: Path, recipe: Path, name: str, world: int, *options: str) -> Path:
    parts = {"class_path": f"{__name__}.Parts", "init_args": {"folder": f"{home}/{name}-parts"}}
    args = ["fit", "-c", str(recipe), f"--run_dir={home}/{name}", "--timeout_minutes=1"]
    args += [f"--trainer.callbacks=[{parts}]", f"--trainer.devices={world}", *options]
    log = home / f"{name}.log"
    codes = jobs.run_ranks(args, log, world) if world > 1 else [jobs.run(args, log)]
    assert set(codes) == {0}, "".join(path.read_text() for path in home.glob(f"{name}.[01l]*"))
    return home / name


@pytest.fixture(scope="module")
def alone(home: Path, recipe: Path) -> Path:
    return run(home, recipe, "alone", 1)


@pytest.mark.parametrize("name", GIVEN)
def test_a_clip_in_the_parts_of_two_ranks_trains_as_on_one(home, recipe, alone, name):
    path = run(home, recipe, name, 2, "--sequence_parallel=2", *GIVEN[name])
    ours, theirs = (losses(RunDirectory(one)) for one in (alone, path))
    assert sorted(ours) == sorted(theirs) == [*range(STEPS)]
    for step, loss in ours.items():
        assert float(theirs[step]) == pytest.approx(float(loss), abs=1e-5)
    norms = [
        [row["train/grad_norm"] for row in read_metrics(one / "metrics.csv")]
        for one in (alone, path)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    kept = [read_checkpoint(by_step(one / "checkpoints")[-1]) for one in (path, alone)]
    torch.testing.assert_close(*(one["state_dict"] for one in kept), atol=1e-5, rtol=1e-4)
    states = [one["optimizer_states"][0]["state"] for one in kept]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)
    first, second = (
        [json.loads(line) for line in (home / f"{name}-parts" / rank).open()] for rank in "01"
    )
    assert len(first) == len(second) == 2 * STEPS
    seen = set()
    for one, two in zip(first, second, strict=True):
        for kind in one:
            (here, whole), (there, same) = one[kind], two[kind]
            assert whole == same == here + there >= min(FRAMES * FEATURES, 50 * SECONDS)
            assert min(here, there) > whole // 4
            seen.add(kind)
    assert seen == {"video", "audio"}
