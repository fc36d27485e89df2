"""Going back to the last checkpoint, and on behind the packs that came after it.

A run goes back by ending its attempt and beginning another one in the same processes
(:func:`mmfusion.training.command.run_command`): what a resumed run restores is what this one
restores. Which packs are left out is in ``left_out.json`` of the run directory before that begins,
and in the state of the data stream of every later checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.state import LeftOut, StreamState
from mmfusion.training.checkpoint import read_checkpoint, replace_text
from mmfusion.training.resume import by_step, step_of, why_incomplete
from mmfusion.training.run import RunDirectory

FILE = "left_out.json"
STREAM = "mmfusion.stream"
"""Where a checkpoint keeps the state of the data stream."""


class Rewind(Exception):  # noqa: N818 (no error)
    """The run is to go back to its last checkpoint. Every rank raises it in the same step.

    Args:
        until: the step because of which.
        end_pack: behind which the run is to go on.
        why: what is wrong with that step.
    """

    def __init__(self, until: int, end_pack: int, why: str) -> None:
        super().__init__(f"step {until}: {why}")
        self.until, self.end_pack, self.why = until, end_pack, why


def read_left_out(run_dir: str | Path) -> list[LeftOut]:
    """What a run leaves out, in order.

    Raises:
        ValueError: where the file is damaged.
    """
    file = Path(run_dir) / FILE
    if not file.exists():
        return []
    try:
        rows = [LeftOut(**row) for row in json.loads(file.read_text())]
        for row in rows:
            if not 0 <= row.first_pack <= row.end_pack or not 0 <= row.step <= row.until:
                raise ValueError(row)
        return rows
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}), so it is not known which packs the run left out; "
            "restore it (the checkpoints' data state holds the same), or remove it to train on "
            "them again."
        ) from None


def go_back(
    run: RunDirectory, data: MultimodalData, start: Path | None, begun: int, rewind: Rewind
) -> tuple[Path | None, LeftOut]:
    """Note what is left out (on rank 0).

    Args:
        run: the run.
        data: of the run.
        start: the checkpoint that this attempt went on from; None: its beginning.
        begun: the step of that.
        rewind: why.

    Returns:
        The checkpoint to go on from, and what comes after it no more.
    """
    saved = [path for path in by_step(run.checkpoints) if step_of(path) > begun]
    target = next((path for path in reversed(saved) if why_incomplete(path) is None), start)
    state = StreamState.start(data.state.spec)
    if target is not None:
        state = StreamState.from_json(read_checkpoint(target, "meta")["callbacks"][STREAM])
    state.leave_out(read_left_out(run.path), data.packs_per_step)
    past = [x for x in state.left_out if x.step <= state.step]
    new = LeftOut(state.step, rewind.until, state.packs, rewind.end_pack, rewind.why)
    write_left_out(run.path, [*past, new])
    return target, new


def write_left_out(run_dir: str | Path, left_out: Sequence[LeftOut]) -> None:
    """Replace the list, whole or not at all."""
    rows = [asdict(x) for x in left_out]
    replace_text(Path(run_dir) / FILE, json.dumps(rows, indent=2) + "\n")


def forget_left_out(run_dir: str | Path, attempt: Path) -> None:
    """Move the list to an attempt that starts the run over."""
    if (file := Path(run_dir) / FILE).exists():
        os.replace(file, attempt / FILE)
