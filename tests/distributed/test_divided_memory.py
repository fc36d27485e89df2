"""An LLM that is divided is whole on no rank: its weights stay in their file until each rank has
taken its share.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny import save_llm, save_tokenizer
from tests.training import jobs
from tests.training.tiny import write_recipe

pytestmark = pytest.mark.slow
MMAP_THRESHOLD = -3
"""Of glibc's mallopt."""


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(L.Callback):
    """The most that building and dividing take, until the first step."""

    def __init__(self, folder: str) -> None:
        self.folder, self.over = Path(folder), threading.Event()

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)  # what is freed is given back
        self.before = self.peak = own_memory()
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()

    def _watch(self) -> None:
        while not self.over.wait(0.005):
            self.peak = max(self.peak, own_memory())

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.over.set()
        self.watch.join()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / str(trainer.global_rank)).write_text(str(self.peak - self.before))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    options = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24}
    save_llm(folder / "large", **options)
    model = AutoModelForCausalLM.from_pretrained(folder / "large")
    model.to(torch.bfloat16).save_pretrained(folder / "half", max_shard_size="40MB")
    save_tokenizer(folder / "half")
    return folder


LORA = {"class_path": "mmfusion.tuning.LoRA", "init_args": {"lr": 1e-2, "targets": ["q_proj"]}}
FULL = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 1e-2}}


def peaks(
    home: Path,
    strategy: str,
    llm: str,
    tuning: object = LORA,
    dtype: str = "float32",
    name: str | None = None,
    options: Sequence[str] = (),
) -> list[int]:
    """Of a run of one step more, by rank."""
    path = write_recipe(
        home,
        trainer__max_steps=1,
        model__llm__init_args={"path": f"{home}/{llm}", "dtype": dtype},
        model__tuning__llm=tuning,
        data__packs_per_micro_batch=1,
        data__packs_per_step=2,
        model__schedule={"warmup_steps": 0},
    )
    name = name or f"{strategy}-{llm}-{dtype}"
    watch = {"class_path": f"{__name__}.Peak", "init_args": {"folder": f"{home}/{name}"}}
    args = ["fit", "-c", str(path), f"--run_dir={home}/run-{name}", "--timeout_minutes=2"]
    args += [f"--trainer.callbacks=[{json.dumps(watch)}]", "--trainer.devices=2"]
    codes = jobs.run_ranks([*args, f"--strategy={strategy}", *options], home / f"{name}.log", 2)
    assert codes == [0, 0], "".join(p.read_text() for p in home.glob(f"{name}.[01]"))
    return [int((home / name / f"{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_3"])
def test_no_rank_holds_the_whole_llm(home, strategy):
    size = (home / "large" / "model.safetensors").stat().st_size
    libraries = min(peaks(home, strategy, "llm"))
    for peak in peaks(home, strategy, "large"):
        assert 0.4 * size < peak - libraries < 0.8 * size, (peak, libraries, size)


def test_no_rank_holds_the_whole_llm_in_float32_where_all_of_it_trains(home):
    """Its files have half precision; each rank has half of it in float32, which is as large. (Under
    DeepSpeed each rank's share has gradients and Adam's state from the beginning.)
    """
    files = list((home / "half").glob("model-*.safetensors"))
    assert len(files) > 2
    size = sum(file.stat().st_size for file in files)
    libraries = min(peaks(home, "fsdp2", "llm", FULL, "bfloat16"))
    for peak in peaks(home, "fsdp2", "half", FULL, "bfloat16"):
        assert 0.8 * size < peak - libraries < 1.6 * size, (peak, libraries, size)


@pytest.mark.parametrize(("strategy", "sharded"), [("fsdp2", False), ("deepspeed_3", True)])
def test_no_rank_holds_the_whole_llm_that_a_checkpoint_has(home, strategy, sharded):
    """Trained whole, then begun from with adapters, and gone on from: with half of Adam's state,
    which is as large as the LLM.
    """
    saving = [f"--checkpoint.sharded={str(sharded).lower()}"]
    name = f"{strategy}-{sharded}"
    size = (home / "large" / "model.safetensors").stat().st_size
    fresh = peaks(home, strategy, "large", FULL, name=f"{name} whole", options=saving)
    run = home / f"run-{name} whole"
    begin = [f"--model.init_from={run}"]
    for peak in peaks(home, strategy, "large", name=f"{name} begun", options=begin):
        assert 0.4 * size < peak < 0.7 * size, (peak, size)
    on = [f"--run_dir={run}", "--trainer.max_steps=2", "--resume=must", "--allow_recipe_change"]
    later = peaks(home, strategy, "large", FULL, name=f"{name} on", options=[*on, *saving])
    for peak, before in zip(later, fresh, strict=True):
        assert 0.9 * size < peak - before < 1.1 * size, (peak, before, size)
