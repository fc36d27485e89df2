"""What a run says on the terminal: our messages, and no noise of libraries."""

from __future__ import annotations

import logging
import re
import sys
import warnings

MESSAGES = logging.StreamHandler()
UNASKED = re.compile(r"Tip: .*litlogger|TPU available: False|Seed set to")
"""Messages of Lightning that say nothing about the run."""
NOISE = (
    r".*Total length of `list` across ranks is zero",  # no validation data
    r".*module\(s\) in eval mode at the start of training",  # frozen parts
    r".*isinstance\(treespec, LeafSpec\)",
    r".*does not have many workers",
)
"""Warnings of libraries about what is meant here."""


def show_messages(leads: bool) -> None:
    """Show our log messages: on the rank that ``leads`` all, on the others warnings."""
    ours = logging.getLogger("mmfusion")
    ours.setLevel(logging.INFO if leads else logging.WARNING)
    MESSAGES.stream = sys.stderr  # setStream would flush the old one, which may be closed
    if MESSAGES not in ours.handlers:
        ours.addHandler(MESSAGES)
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if not handler.filters:
                handler.addFilter(lambda record: not UNASKED.search(record.getMessage()))
