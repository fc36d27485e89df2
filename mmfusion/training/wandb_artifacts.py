"""Artifacts of a run in W&B, and what they were made of.

``model-ID`` holds the trained weights as `mmfusion.load` takes them, ``checkpoint-ID`` what a run
goes on from. Both name the run's recipe, data and parent. These are the run's inputs as well, so
W&B draws the graph: ``recipe-ID``, ``data-SOURCE`` (the same version for the same shards) and,
online, the parent's ``model-ID``.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmfusion.training.checkpoint import FOLDER, AtomicCheckpointIO, read_checkpoint
from mmfusion.training.lineage import Lineage, Parent
from mmfusion.training.run import RunDirectory
from mmfusion.training.secrets import hide_secrets

log = logging.getLogger(__name__)
PATIENCE = 20.0
"""Seconds that a start waits for the server to know the parent."""
SLOWEST = 2 * 2**20
"""Bytes a second that an upload at the end of a run is waited for."""
OF_TRAINING = ("optimizer_states", "lr_schedulers")


def use_inputs(run: Any, directory: RunDirectory, lineage: Lineage) -> None:
    """Tell W&B what the run is made of. Nothing is waited for; offline it is told at the sync."""
    recipe = _artifact(f"recipe-{run.id}", "recipe", {"fingerprint": lineage.recipe})
    recipe.add_file(str(directory.config))
    _use(run, recipe)
    for source, about in lineage.data.items():
        data = _artifact(f"data-{source}", "dataset", about)
        with data.new_file("data.json") as file:
            file.write(json.dumps(about, indent=1))
        _use(run, data)
    if lineage.parent is not None:
        _use_parent(run, lineage.parent)


def _use(run: Any, artifact: Any) -> None:
    """As ``run.use_artifact``, which refuses offline and waits for the server online."""
    run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)


def _use_parent(run: Any, parent: Parent) -> None:
    """By name, for which the server must be asked."""
    if run.settings._offline:
        return
    reasons: list[str] = []

    def ask() -> None:
        for name in (f"model-{parent.id}:step-{parent.step}", f"checkpoint-{parent.id}:latest"):
            try:
                run.use_artifact(name)
                return reasons.clear()
            except Exception as error:  # the parent was logged without artifacts
                reasons.append(hide_secrets(str(error)))

    reasons.append(f"no answer within {PATIENCE:g} s")
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if reasons:
        log.info(
            "W&B has no artifact of %s (%s), so it cannot draw that this run began with it; "
            "lineage.json has it", parent.name, reasons[-1],
        )  # fmt: skip


def log_checkpoint(run: Any, checkpoint: Path, lineage: Lineage) -> Any:
    """What a run goes on from, with its optimizer's state."""
    step = _step(checkpoint)
    artifact = _artifact(f"checkpoint-{run.id}", "checkpoint", {"step": step, **lineage.plain()})
    add = artifact.add_dir if checkpoint.is_dir() else artifact.add_file
    add(str(checkpoint), f"{FOLDER}/{checkpoint.name}")
    return run.log_artifact(artifact, aliases=["latest", f"step-{step}"])


def log_model(run: Any, directory: RunDirectory, checkpoint: Path, lineage: Lineage) -> Any:
    """The trained weights and the recipe, as a directory that `mmfusion.load` takes."""
    step = _step(checkpoint)
    artifact = _artifact(f"model-{run.id}", "model", {"step": step, **lineage.plain()})
    with weights_alone(checkpoint, directory.path / "wandb" / "model") as weights:
        artifact.add_file(str(weights), f"{FOLDER}/{weights.name}")
    for file in (directory.config, directory.identity):
        artifact.add_file(str(file))
    return run.log_artifact(artifact, aliases=["latest", f"step-{step}"])


@contextmanager
def weights_alone(checkpoint: Path, folder: Path) -> Iterator[Path]:
    """A checkpoint without what only training needs, in a folder that is removed again."""
    content = read_checkpoint(checkpoint)
    name = f"{checkpoint.stem}.ckpt"  # of one file, whatever it was
    folder.mkdir(parents=True, exist_ok=True)
    try:
        AtomicCheckpointIO().save_checkpoint(
            {**content, **{key: [] for key in OF_TRAINING}}, folder / name
        )
        yield folder / name
    finally:
        shutil.rmtree(folder)


def wait_for(run: Any, artifacts: list[Any], most: float) -> None:
    """Until they are there, as long as their size can take; offline they are on the disk."""
    if run.settings._offline:
        return
    deadline = time.monotonic() + most
    for artifact in artifacts:
        seconds = min(60 + artifact.size / SLOWEST, deadline - time.monotonic())
        try:
            artifact.wait(timeout=max(int(seconds), 1))
        except Exception as error:
            told = hide_secrets(f"{type(error).__name__}: {error}")
            log.warning("%s has not reached W&B (%s)", artifact.name, told)


def _artifact(name: str, kind: str, metadata: dict[str, Any]) -> Any:
    import wandb

    return wandb.Artifact(re.sub(r"[^\w.-]", "-", name), kind, metadata=metadata)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))
