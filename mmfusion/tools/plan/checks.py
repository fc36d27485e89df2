"""What would otherwise fail in a run's first hour. Every check runs, whatever the others found."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mmfusion.data.source import Source
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.diffusers_pipeline import DiffusersPipeline
from mmfusion.models.loading import damaged_files
from mmfusion.paths import expand
from mmfusion.training.callbacks.checkpointing import RunCheckpoint
from mmfusion.training.command import RecipeCommand
from mmfusion.training.resume import complete_checkpoint
from mmfusion.training.wandb_segment import server, why_not_online
from mmfusion.types import DataError

BESIDES = 1 << 30
"""Bytes of a run directory for W&B, logs and sample pages."""
GIB = 1 << 30
HUB_SECONDS = 10.0


class CheckError(ValueError):
    """What was looked at, what is there, what was expected, what to do."""

    def __init__(self, what: str, got: str, expected: str, do: str) -> None:
        super().__init__(f"{what}: {got}. Expected: {expected}. Do this: {do}.")


@dataclass(frozen=True)
class Checked:
    """A check that was run.

    Attributes:
        name: of it.
        passed: whether it did.
        said: what was found, or the whole of what is wrong.
    """

    name: str
    passed: bool
    said: str


def run_checks(checks: Iterable[tuple[str, Callable[[], str]]]) -> list[Checked]:
    """Run all of them, each a function that says what it found or raises."""
    found = []
    for name, check in checks:
        try:
            found.append(Checked(name, True, check()))
        except (ValueError, OSError) as error:
            found.append(Checked(name, False, str(error)))
    return found


def recipe_checks(command: RecipeCommand, world: int) -> Iterator[tuple[str, Callable[[], str]]]:
    """Those that need the recipe alone."""
    module, data, config = command.model, command.datamodule, command.config
    together = data.ranks_per_pack
    yield "batch", lambda: batch(data.packs_per_step, data.packs_per_micro_batch, world, together)
    yield "lanes", lambda: lanes(data.lanes, world, together)
    yield "schedule", lambda: schedule(command)
    yield "tokenizer", lambda: tokenizer(module.model)
    for name, part in module.model.parts():
        if getattr(part, "path", None):
            yield f"weights of {name}", lambda part=part: weights(part, module.model)  # type: ignore[misc]
    if module.init_from:
        yield "model.init_from", lambda: earlier(module.init_from)
    for section, sources in (("sources", data.sources), ("val_sources", data.val_sources)):
        for name, source in sources.items():
            if source.weight:
                yield f"data.{section}.{name}", lambda source=source: shards(source)  # type: ignore[misc]
    yield "W&B", lambda: wandb(config.run_dir, config.wandb, config.wandb_project)


def batch(packs: int, micro: int, world: int, together: int = 1) -> str:
    """Whether a step divides evenly over ranks and micro-batches.

    Args:
        packs: of a step.
        micro: of a micro-batch.
        world: ranks.
        together: neighbouring ranks that are given the same packs.
    """
    if world % together:
        raise CheckError(
            "ranks",
            f"{world}, of which groups of {together} share their packs (sequence_parallel, or the "
            "strategy's tensor_parallel)",
            f"a multiple of {together}",
            "change nodes or GPUs, or how many ranks share",
        )
    takers, who = world // together, _takers(world, together)
    if packs % (takers * micro):
        each = max(1, packs // (takers * micro)) * takers * micro
        raise CheckError(
            "data.packs_per_step",
            f"{packs} packs on {who}, {micro} in a micro-batch: some ranks have nothing to do at "
            "the end of each step",
            f"a multiple of {takers} x {micro} = {takers * micro}",
            f"set data.packs_per_step to {each}, or change data.packs_per_micro_batch, nodes or "
            "GPUs",
        )
    return f"{packs} packs = {who} x {packs // takers // micro} micro-batches of {micro}"


def lanes(count: int, world: int, together: int = 1) -> str:
    """Whether each rank, or group of ranks that are given the same packs, has a lane of its own to
    plan.
    """
    takers, who = max(1, world // together), _takers(world, together)
    if count < takers:
        raise CheckError(
            "data.lanes",
            f"{count} lanes for {who}: those that share a lane plan the same samples, each "
            f"{math.ceil(takers / count)} times",
            f"{takers} or more",
            f"set data.lanes to {2 ** math.ceil(math.log2(takers))}; a run that has begun cannot "
            "change it",
        )
    return f"{count} for {who}"


def _takers(world: int, together: int) -> str:
    """Those that are given packs of their own."""
    return f"{world} ranks" if together == 1 else f"{world // together} groups of {together} ranks"


def schedule(command: RecipeCommand) -> str:
    """Whether the run's length suits its learning rate."""
    steps = int(command.config.trainer.max_steps)
    command.model.schedule.check(steps)
    return f"{steps:,} steps"


def tokenizer(model: AnyToAnyModel) -> str:
    """Whether the tokenizer and what else the processor needs can be read."""
    processor = model.processor()
    return f"{len(processor.tokenizer):,} tokens"


def shards(source: Source) -> str:
    """Whether the shards and their indexes are there, fit, and can be read at both ends."""
    found = source.shards
    for index in {0, len(found) - 1}:
        record, shard, key = found.read(index)
        try:
            source.converter(record, shard, key)
        except DataError as error:
            raise CheckError(
                f"{shard}, sample {key}", str(error), "a sample that the converter takes",
                "look at the shard, or give the source the converter of its records",
            ) from error  # fmt: skip
    return f"{len(found):,} samples in {len(found.paths):,} shards"


def earlier(path: str | None) -> str:
    """Whether the run that this one starts from has a whole checkpoint."""
    return f"{complete_checkpoint(str(path), 'model.init_from')}"


def weights(part: nn.Module, model: AnyToAnyModel) -> str:
    """Whether the files of a part's weights are there and whole, by their headers."""
    path, revision = str(getattr(part, "path", "")), getattr(part, "revision", None)
    path = expand(path)
    source = getattr(part, "_source", {})
    gguf, revision = source.get("gguf_file"), source.get("revision", revision)
    folders = [""]
    if isinstance(part, DiffusersPipeline):
        modality = next(m for m, own in model.generators.items() if own is part)
        needed = model.needs[modality]
        components = part.components.items()
        folders = [c.folder for n, c in components if c.part in needed and n in part.configs]
    if Path(path).is_file():
        return f"{path}, {Path(path).stat().st_size / 2**20:,.0f} MiB"
    if not Path(path).is_dir() and (cached := _cached(path, revision, folders)) is None:
        return _on_hub(path, revision, folders)
    elif not Path(path).is_dir():
        path = str(cached)
    sizes = [_whole_files(Path(path) / folder, gguf) for folder in folders]
    return f"{path}, {sum(sizes) / 2**20:,.0f} MiB"


def _whole_files(folder: Path, gguf: str | None) -> int:
    """Bytes of a folder's weights."""
    again = f"get the weights of {folder} again"
    for index in folder.glob("*.safetensors.index.json"):
        named = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            some = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
            raise CheckError(
                str(folder), f"{len(missing)} of {len(named)} files are missing ({some})",
                f"all that {index.name} names", again,
            )  # fmt: skip
    found = [folder / gguf] if gguf else sorted(folder.glob("*.safetensors"))
    if not found or not all(file.is_file() for file in found):
        there = sorted(file.name for file in folder.glob("*"))[:8]
        raise CheckError(str(folder), f"no weights among {there}", gguf or "*.safetensors", again)
    for file, why in damaged_files(folder, gguf):
        raise CheckError(str(file), f"it cannot be read ({why})", "a whole file", again)
    return sum(file.stat().st_size for file in found)


def _cached(repo: str, revision: str | None, folders: list[str]) -> Path | None:
    """The hub's cache of a repository, where it holds the weights."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "model_index.json"):
        file = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(file, str):
            home = Path(file).parent
            if all(any((home / folder).glob("*.safetensors")) for folder in folders):
                return home
    return None


def _on_hub(repo: str, revision: str | None, folders: list[str]) -> str:
    """Whether the hub has the weights."""
    from huggingface_hub import HfApi, constants

    what = f"weights of {repo}"
    fetch = f"`hf download {repo}` where there is a network, or name a folder"
    if constants.HF_HUB_OFFLINE:
        raise CheckError(
            what, "not in the hub's cache, and HF_HUB_OFFLINE is set", "*.safetensors", fetch
        )
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=HUB_SECONDS)
    except Exception as error:  # requests' and the hub's own have no common class
        raise CheckError(
            what, f"the hub did not give them ({error})", "an answer", fetch
        ) from error
    names = [sibling.rfilename for sibling in info.siblings or ()]
    for folder in folders:
        inside = [n for n in names if Path(n).parent == Path(folder) and n.endswith(".safetensors")]
        if not inside:
            raise CheckError(
                what, f"none in safetensors in {folder or 'the repository'}", "*.safetensors",
                "take another revision or repository, or convert them once and name the folder",
            )  # fmt: skip
    return f"{repo} on the hub; fetched when the run starts"


def wandb(run_dir: str, choice: Any, project: str) -> str:
    """Whether W&B will be online. In ``auto`` it is enough that it is offline by itself."""
    if choice == "off":
        return "off"
    host = server()
    missing = why_not_online("auto", host, HUB_SECONDS)
    mode, reason = ("offline", missing) if missing else ("online", host)
    if choice == "online" and missing:
        raise CheckError(
            "--wandb online", missing, f"a login that {host} can be asked with",
            "`wandb login` or WANDB_API_KEY, and a way to the server; or --wandb auto",
        )  # fmt: skip
    return f"{'offline' if choice == 'offline' else mode} ({reason})"


def disk(run_dir: str, checkpoint: int, saving: RunCheckpoint, steps: int | None) -> str:
    """Whether the run directory can be made and holds the checkpoints, one more while it is
    written, and W&B's files.

    Args:
        run_dir: may not be there yet.
        checkpoint: bytes of one.
        saving: which of them stay.
        steps: of the run.
    """
    folder = Path(run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise CheckError(
            "run_dir", f"{folder} is a file", "a folder, or a place for one", "change --run_dir"
        )
    kept = saving.keep_last + 1
    if (every := saving.keep_every_n_steps) and steps:
        kept += steps // math.lcm(every, saving.every_n_steps)
    needed, free = kept * checkpoint + BESIDES, shutil.disk_usage(folder).free
    asked = f"{kept} checkpoints of {checkpoint / GIB:,.2f} GiB, and 1 GiB for the rest"
    if needed > free:
        raise CheckError(
            f"disk of {folder}",
            f"{free / GIB:,.1f} GiB are free",
            f"{needed / GIB:,.1f} GiB: {asked}",
            "free some, change --run_dir, or keep fewer (checkpoint.keep_last, "
            "checkpoint.keep_every_n_steps)",
        )
    return f"{free / GIB:,.1f} GiB free, {needed / GIB:,.1f} needed: {asked}"
