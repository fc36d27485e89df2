"""Where a run comes from: its recipe, its data, and the run whose weights it began with.

Kept as ``lineage.json`` in the run directory, in W&B's config, and with every artifact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmfusion.data.source import Source
from mmfusion.paths import expand
from mmfusion.training.checkpoint import FOLDER, replace_text
from mmfusion.training.resume import STEP_NAME, by_step
from mmfusion.training.run import RunDirectory, differences

FILE = "lineage.json"


@dataclass(frozen=True)
class Parent:
    """The run of an earlier stage.

    Attributes:
        id: its own, which is W&B's too.
        name: of its directory.
        step: of the weights that were taken.
    """

    id: str
    name: str
    step: int


@dataclass(frozen=True)
class Lineage:
    """Of a run.

    Attributes:
        recipe: hash of all of it that changes packs or losses.
        data: of each source, the fingerprint of its shards and their samples.
        parent: None where it began with pretrained weights alone.
    """

    recipe: str
    data: dict[str, dict[str, Any]]
    parent: Parent | None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def lineage_of(
    run: RunDirectory,
    recipe: Mapping[str, Any],
    sources: Mapping[str, Source],
    began_with: str | None,
) -> Lineage:
    """Look it up, and write it into the run directory. The parent is that of the first start.

    Args:
        run: whose directory is open.
        recipe: resolved.
        sources: that are trained on.
        began_with: at the first start, the checkpoint of the parent, or its run directory.
    """
    file = run.path / FILE
    text = "\n".join(differences({}, recipe))
    data = {
        name: {"dataset_id": source.shards.dataset_id, "samples": len(source)}
        for name, source in sources.items()
        if source.weight
    }
    if file.exists():
        told = json.loads(file.read_text())["parent"]
        parent = Parent(**told) if told else None
    else:
        parent = _parent(began_with)
    found = Lineage(hashlib.sha256(text.encode()).hexdigest()[:16], data, parent)
    replace_text(file, json.dumps(found.plain(), indent=2))
    return found


def _parent(began_with: str | None) -> Parent | None:
    if not began_with:
        return None
    checkpoint = Path(expand(began_with)).resolve()
    if not STEP_NAME.fullmatch(checkpoint.name):
        checkpoint = next(reversed(by_step(checkpoint / FOLDER)), checkpoint)
    run = RunDirectory(checkpoint.parent.parent)
    step = STEP_NAME.fullmatch(checkpoint.name)
    known = run.identity.is_file()  # a checkpoint may have been copied out of its run
    return Parent(run.id if known else "", run.path.name, int(step[1]) if step else -1)
