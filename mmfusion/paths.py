"""Where files are: ``$MMFUSION_CACHE``, paths in recipes, and what ships beside the package."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})", re.ASCII)
_SECRET = re.compile(r"((^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWD)|PASSWORD)$", re.IGNORECASE)


def cache_dir() -> Path:
    """The user cache: ``$MMFUSION_CACHE``, or ``mmfusion`` below ``$XDG_CACHE_HOME``
    (``~/.cache``).
    """
    if chosen := os.environ.get("MMFUSION_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmfusion"


def shipped(folder: str) -> Path:
    """A folder beside the package (``launch``, ``recipes/quickstart``): of the source checkout,
    else as installed.

    Raises:
        FileNotFoundError: it is in neither.
    """
    checkout = Path(__file__).parents[1] / folder
    installed = Path(sysconfig.get_path("data")) / "share" / "mmfusion" / folder
    for place in (checkout, installed):
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"{folder} is neither in {checkout} nor in {installed}; install mmfusion from a source "
        "checkout: pip install -e '.[quickstart]'."
    )


def expand(path: str | Path) -> str:
    """A path from a recipe with ``~`` and environment variables filled in; ``$MMFUSION_CACHE`` has
    a default.

    Raises:
        ValueError: where a variable in the path is not set, or is named like a key, token or
            password: the path is shown in messages.
    """
    text = str(path)
    if secret := [name for name in _VARIABLE.findall(text) if _SECRET.search(name.strip("{}"))]:
        raise ValueError(
            f"path {text!r} names the environment variable {secret[0].strip('{}')}, which by its "
            "name is a secret; a path is written to logs, so give it by another variable."
        )
    if "MMFUSION_CACHE" in text and not os.environ.get("MMFUSION_CACHE"):
        text = text.replace("${MMFUSION_CACHE}", str(cache_dir())).replace(
            "$MMFUSION_CACHE", str(cache_dir())
        )
    text = os.path.expanduser(os.path.expandvars(text))
    if "$" in text:
        raise ValueError(
            f"path {str(path)!r} names an environment variable that is not set "
            f"(got as far as {text!r}); set it."
        )
    return text
