"""DeepSpeed's configuration: what the recipe gives of it, and what DeepSpeed would pass over."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfusion.paths import expand

SECTIONS = ("zero_optimization", "fp16", "bf16", "torch_autocast")
"""Those that are read here."""


def fields(config: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    """As given, or of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not isinstance(config, str):
        return config or {}
    path = Path(expand(config))
    if not path.is_file():
        raise FileNotFoundError(f"ZeRO: config {path} is not a file.")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"ZeRO: config {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"ZeRO: config {path} holds a {type(found).__name__}; expected an object.")
    return found


def lay_over(own: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Replace field by field, section by section."""
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(own.get(key), dict):
            lay_over(own[key], value)
        else:
            own[key] = value


def refuse_sections(config: Mapping[str, Any], stage: int) -> None:
    """Refuse what is said elsewhere in a recipe.

    Raises:
        ValueError: another stage, a precision of DeepSpeed's own, or a section that is none.
    """
    for name in SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            raise ValueError(f"ZeRO: config.{name} is {config[name]!r}; expected its fields.")
    if config["zero_optimization"].get("stage") != stage:
        raise ValueError("ZeRO: give the stage as stage, not in config.zero_optimization.")
    for name in SECTIONS[1:]:
        if config.get(name, {}).get("enabled"):
            raise ValueError(
                f"ZeRO: config.{name} is enabled, which would take every part's weights into "
                "half precision; set trainer.precision: bf16-mixed instead."
            )


class _Watched(dict[str, Any]):
    """Knows which of its keys somebody looked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.sought: set[object] = set()

    def __contains__(self, key: object) -> bool:
        self.sought.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.sought.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.sought.add(key)
        return super().get(key, default)


def refuse_unread(config: Mapping[str, Any]) -> None:
    """Have DeepSpeed read it: it passes over top-level fields that it does not know.

    Raises:
        ValueError: a field that DeepSpeed does not look for, or does not take.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    watched = _Watched(config)
    try:
        DeepSpeedConfig(watched)
    except Exception as error:  # its own, pydantic's, TypeErrors of what it computes with
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"ZeRO: DeepSpeed does not take config: {told}") from error
    for key in sorted(config.keys() - watched.sought):
        near = difflib.get_close_matches(key, map(str, watched.sought), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"ZeRO: config.{key} is no field that DeepSpeed knows.{hint}")
