"""The time a start of a run may take: ``trainer.max_time``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Timer


class StartTimer(Timer):
    """Counts from each start of the run. Lightning's goes on counting over resumes, so a run that
    was out of time once would stop after every further step.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take over."""
