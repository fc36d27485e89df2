"""mmfusion: train any-to-any multimodal LLMs from one YAML recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfusion.inference import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """``mmfusion.load`` is imported when asked for, so that ``import mmfusion`` stays cheap."""
    if name == "load":
        from mmfusion.inference import load

        return load
    raise AttributeError(f"module 'mmfusion' has no attribute {name!r}")
