"""`mmfusion data at-step RECIPE STEP`: which samples an optimizer step trains on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.state import StreamState
from mmfusion.data.stream import Stream
from mmfusion.paths import expand
from mmfusion.training.checkpoint import FOLDER, read_checkpoint
from mmfusion.training.resume import by_step, complete_checkpoint, step_of, why_incomplete
from mmfusion.training.rewind import STREAM, read_left_out


def at_step(
    recipe: str,
    step: int,
    checkpoint: str | None = None,
    as_json: bool = False,
    overrides: list[str] | None = None,
) -> None:
    """Print the samples of an optimizer step, without training and without decoding media.

    Samples whose media turn out broken only when they are decoded are listed too. The step's lanes
    are planned from the start of the run, or from a checkpoint to be quicker (and right, where
    packs_per_step was changed on the way). Packs that the run left out (left_out.json of its
    directory) are in no step.

    Args:
        recipe: the run's recipe, or its run directory; of several files, -c A -c B.
        step: the optimizer step, counted from 0.
        checkpoint: a checkpoint of the run at or before this step; of a run directory, its newest
            such.
        as_json: one JSON object a line.
        overrides: a list of keys of the recipe with other values; they may also stand on the
            command line as they do for `mmfusion fit`, e.g. --data.pack_tokens=512.
    """
    from mmfusion.training.command import RecipeCommand

    if step < 0:
        raise ValueError(f"step is {step}; steps are counted from 0.")
    command = RecipeCommand("", ["--config", recipe, *(overrides or [])])
    if 0 <= (end := command.config.trainer.max_steps) <= step:
        raise ValueError(
            f"step {step} is never trained: the recipe's trainer.max_steps is {end}, and steps are "
            "counted from 0."
        )
    data = command.datamodule
    data.attach(command.model.model.processor())
    if checkpoint is not None:
        data.restore(load_stream_state(checkpoint, step))
    run_dir = expand(recipe) if Path(expand(recipe)).is_dir() else command.config.run_dir
    data.leave_out(read_left_out(run_dir))
    for row in samples_at(data, step):
        print(json.dumps(row) if as_json else _line(row))


def samples_at(data: MultimodalData, step: int) -> Iterator[dict[str, Any]]:
    """One row for every sample of a step, pack by pack.

    Args:
        data: with a processor; its state is where planning starts.
        step: counted from 0.
    """
    state, count = data.state, data.packs_per_step
    if step < state.step:
        raise ValueError(
            f"step {step} lies before the given checkpoint's step {state.step}; "
            "use an earlier checkpoint, or none."
        )
    assert data.processor is not None
    stream = Stream(state, data.sources, data.processor)
    first = state.first_pack(step, count)
    packs = [stream.pack(q) for q in range(first, first + count)]
    if not any(pack.items for pack in packs):
        raise ValueError(f"step {step} is never trained: the data end before it.")
    for q, pack in enumerate(packs, first):
        for item in pack.items:
            shards = data.sources[item.ref.source].shards
            _, shard, key = shards.read(item.ref.index)
            yield {
                "step": step, "pack": q, "lane": q % state.spec.lanes, "source": item.ref.source,
                "epoch": item.ref.epoch, "index": item.ref.index, "shard": shard, "key": key,
                "tokens": len(item.planned),
            }  # fmt: skip


def load_stream_state(checkpoint: str | Path, step: int) -> StreamState:
    """The data stream's state in a checkpoint, or in a run's newest one at or before a step."""
    earlier = [
        path
        for path in by_step(Path(checkpoint) / FOLDER)
        if step_of(path) <= step and why_incomplete(path) is None
    ]
    path = complete_checkpoint(earlier[-1] if earlier else checkpoint, "--checkpoint")
    callbacks = read_checkpoint(path, "meta").get("callbacks", {})
    if STREAM not in callbacks:
        raise ValueError(
            f"{path} holds no state of the data stream (callbacks: {sorted(callbacks)}); expected "
            "a checkpoint that training saved."
        )
    return StreamState.from_json(callbacks[STREAM])


def _line(row: dict[str, Any]) -> str:
    return (
        f"pack {row['pack']}  lane {row['lane']}  {row['source']}  epoch {row['epoch']}  "
        f"{row['shard']}  {row['key']}  {row['tokens']} tokens"
    )
