"""`mmfusion data encode RECIPE`: what frozen parts give for every sample, computed once into shards
(:mod:`mmfusion.data.features`).

Shard after shard is written into a folder of unfinished work and skipped by a start that goes on.
The shards get their place, and then the manifest, when all are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.features import Features, StoredPart, StoredSet, contents_of, shards_of
from mmfusion.data.source import Source
from mmfusion.data.whole_file import alone
from mmfusion.paths import expand
from mmfusion.tools.data_rewriter import MediaOption, Rewriter, Runner
from mmfusion.tools.encoded_folder import (
    LOCK,
    finish,
    refuse_sources_inside,
    refuse_to_replace,
    unfinished,
)
from mmfusion.training.callbacks.audit import warn_of_half
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.command import RecipeCommand
from mmfusion.training.module import MultimodalModule
from mmfusion.training.resume import complete_checkpoint
from mmfusion.training.stored_parts import (
    SECTIONS,
    converter_of,
    identity_of,
    modules_of,
    policy_on,
    precision_of,
    storable_parts,
)


def encode(
    recipe: str,
    out: str | None = None,
    media: MediaOption = "beside",
    parts: list[str] | None = None,
    batch_size: PositiveInt = 16,
    threads: PositiveInt = 2,
    overwrite: bool = False,
    overrides: list[str] | None = None,
) -> None:
    """Compute what the frozen parts of a recipe give for its samples, once.

    Writes the samples of all sources and validation sources again, each with the features of its
    input media, and the moments of the latents and the text encodings of its targets, as far as the
    recipe's objectives read them. With `data.features` set to the folder, the recipe then trains on
    these, and does not build the parts. A run that was broken off goes on with its next shard.

    Args:
        recipe: the recipe's YAML file, or a run directory; of several files, -c A -c B.
        out: folder to make; by default the recipe's data.features.
        media: keep the media beside their features, or put the features instead of them (then
            stored parts cannot be encoded again, or run live, from these shards).
        parts: which to store, e.g. [encoders.image,generators.image.vae]; by default all that are
            frozen.
        batch_size: items that go through a part together.
        threads: that decode media.
        overwrite: replace features that an earlier start made there, and nothing else.
        overrides: a list of keys of the recipe with other values; they may also stand on the
            command line as they do for `mmfusion fit`, e.g. --trainer.accelerator=cpu.
    """
    command = RecipeCommand("", ["--config", recipe, *(overrides or [])], stored=False)
    module, plain = command.model, command.recipe()
    chosen = chosen_parts(module, parts)
    folder = _folder(out or command.datamodule.features)
    refuse_to_replace(folder, overwrite)
    sources = _sources(command.datamodule)
    refuse_sources_inside(folder, sources.values())
    runner = Runner(module.model, chosen, _trainer(plain), batch_size)
    warn_of_half(module.model, precision_of(plain), runner.device)
    planned = Features(
        {
            part: StoredPart(identity_of(part, module.model, plain), runner.specs(part))
            for part in chosen
        },
        {
            name: StoredSet(
                source.shards.dataset_id, contents_of(source.shards), converter_of(plain, name)
            )
            for name, source in sources.items()
        },
    )
    with alone(str(folder / LOCK), f"making features in {folder}"):
        work = unfinished(folder, planned, media)
        _write_shards(work, sources, runner, media, threads)
        runner.write_empty(work)
        finish(work, folder, planned, overwrite)
    total = sum(len(source) for source in sources.values())
    size = sum(file.stat().st_size for file in folder.rglob("*.tar"))
    print(
        f"{total:,} samples, {size:,} bytes in {folder}, with what {', '.join(chosen)} give. To "
        f"train on them: data.features: {folder}"
    )


def _write_shards(
    work: Path, sources: Mapping[str, Source], runner: Runner, media: MediaOption, threads: int
) -> None:
    """Those that are not there yet."""
    total = sum(len(source) for source in sources.values())
    with ThreadPoolExecutor(threads) as pool, tqdm(total=total, unit=" samples") as progress:
        for name, source in sources.items():
            rewriter = Rewriter(source, runner, media, pool)
            for number, count in enumerate(source.shards.counts):
                shard = shards_of(work, name) / f"{number:06d}-0.tar"
                if shard.is_file():
                    progress.update(count)
                else:
                    rewriter.write(number, str(shard.parent / f"{number:06d}-%d.tar"), progress)


def _sources(data: MultimodalData) -> dict[str, Source]:
    """All of a recipe, by section and name."""
    data.open_shards()
    sources = {
        f"{section}.{name}": source
        for section in SECTIONS
        for name, source in getattr(data, section).items()
    }
    if odd := [name for name, source in sources.items() if type(source) is not Source]:
        raise ValueError(
            f"data.{odd[0]} is a {type(sources[odd[0]]).__name__}, which gives its samples in a "
            "way of its own; features are stored of a mmfusion.data.source.Source."
        )
    return sources


def _trainer(recipe: dict[str, Any]) -> L.Trainer:
    """For the recipe's device and precision."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    given: dict[str, Any] = {"precision": precision_of(recipe), **dict.fromkeys(off, False)}
    return L.Trainer(accelerator=recipe["trainer"]["accelerator"], devices=1, **given)


def chosen_parts(module: MultimodalModule, asked: Sequence[str] | None) -> list[str]:
    """The parts to store.

    Args:
        module: of the recipe, not built.
        asked: None: all that are frozen.

    Raises:
        ValueError: for a part that is not there, is not read, or trains; where none is left.
    """
    there = storable_parts(module.model)
    if unknown := [part for part in asked or () if part not in there]:
        raise ValueError(f"--parts names {unknown}; the recipe runs {there} without training.")
    reasons = {part: _not_storable(part, module) for part in there}
    if asked and (refused := {part: reasons[part] for part in asked if reasons[part]}):
        raise ValueError(
            "; ".join(f"{part} cannot be stored: {why}" for part, why in refused.items()) + "."
        )
    chosen = [part for part in asked or there if not reasons[part]]
    if not chosen:
        raise ValueError(f"no part of the recipe can be stored: {reasons or 'it runs none'}.")
    for part, why in reasons.items():
        if why and not asked:
            print(f"{part} stays live: {why}")
    return chosen


def _not_storable(part: str, module: MultimodalModule) -> str:
    if key := policy_on(part, module):
        return f"{key} trains it"
    if module.init_from:
        path = complete_checkpoint(module.init_from, "model.init_from")
        names = read_checkpoint(path, "meta")["state_dict"]
        left = tuple(f"model.{name}." for name in module.init_drop)
        taken = [name for name in names if not name.startswith(left)]
        own = tuple(f"model.{name}." for name in modules_of(part, module.model))
        if any(name.startswith(own) for name in taken):
            return f"an earlier stage trained it ({path})"
    return ""


def _folder(out: str | None) -> Path:
    if not out:
        raise ValueError("where to? Give --out, or data.features in the recipe.")
    return Path(expand(out))
