"""Programs by which one speaks to a scheduler."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


def said(command: Sequence[str], given: str | None = None) -> str:
    """What a program prints.

    Args:
        command: the program and its arguments.
        given: on its standard input.

    Raises:
        ValueError: with what it says, in one line, where it fails, or where it is not there.
    """
    done = asked(command, given)
    if done.returncode:
        raise ValueError(f"{command[0]} failed with code {done.returncode}: {reason(done)}")
    return done.stdout


def asked(command: Sequence[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    """What becomes of a program that may fail.

    Raises:
        ValueError: where it is not there.
    """
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        raise ValueError(
            f"there is no {command[0]} on this machine; launch from one that has it."
        ) from None


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why it failed, in one line."""
    return " ".join(done.stderr.split())
