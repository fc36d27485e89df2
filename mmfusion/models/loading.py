"""Where pretrained weights come from, and the refusal of incomplete ones."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open

from mmfusion.paths import cache_dir, expand

DAMAGE = (
    json.JSONDecodeError,
    UnicodeDecodeError,
    SafetensorError,
    LookupError,
    OSError,
    RecursionError,
    pickle.UnpicklingError,
)
"""What loaders raise on files that are damaged or pickled."""


def checked_path(path: str, needed_file: str) -> str:
    """A recipe's ``path`` as a folder or a hub id.

    Raises:
        FileNotFoundError: where it is a folder without ``needed_file``, or looks like one that is
            not there.
    """
    text = expand(path)
    if Path(text).is_file():
        raise FileNotFoundError(
            f"{text} is a file; give its folder as path (and, for a GGUF file, its name as "
            "gguf_file)."
        )
    if Path(text).is_dir():
        if not (Path(text) / needed_file).exists():
            found = sorted(file.name for file in Path(text).iterdir())[:8]
            raise FileNotFoundError(f"{text} has no {needed_file}; it holds {found}.")
        return text
    if text.startswith(("/", ".", "~")) or text != path or text.count("/") > 1:
        fetched = Path(text).is_relative_to(cache_dir() / "weights")
        hint = " `mmfusion quickstart` fetches its own weights to there." if fetched else ""
        raise FileNotFoundError(
            f"no folder {text} (from path: {path}); give a folder or a hub id such as org/name."
            + hint
        )
    return text


@contextmanager
def fetching(path: str) -> Iterator[None]:
    """Names the hub id that cannot be had; what the hub's library says then is of hosts alone."""
    try:
        yield
    except OSError as error:
        if path in str(error) or Path(path).exists():
            raise
        raise OSError(f"{path} cannot be had: {error}") from error


class reading:  # noqa: N801 (reads as a statement: `with reading(path)`)
    """Names the damaged file where loading from a folder fails; other errors pass.

    Args:
        path: the folder, or a hub id.
        gguf_file: name of a GGUF file in the folder, which is read then.

    Raises:
        ValueError: instead of what the readers of JSON, tokenizers and safetensors raise, which
            name no file.
    """

    def __init__(self, path: str | Path, gguf_file: str | None = None) -> None:
        self._path, self._gguf_file = path, gguf_file

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The tokenizers package raises plain Exceptions, the gguf package plain ValueErrors.
        plain = kind is Exception or (kind is ValueError and self._gguf_file is not None)
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            raise ValueError(
                f"the weights in {self._path} have other shapes than its config.json says (see the "
                "report above)."
            ) from error
        if not isinstance(error, DAMAGE) and not plain:
            return
        for file, why in damaged_files(Path(self._path), self._gguf_file):
            raise ValueError(
                f"{file} ({file.stat().st_size} bytes) cannot be read: {why}. Is it cut off? Get "
                "it again."
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"the weights in {self._path} hold pickled objects, which are never run; convert "
                "them to safetensors."
            ) from error
        if not isinstance(error, OSError) and kind is not ValueError:
            raise ValueError(
                f"{self._path} cannot be loaded: {type(error).__name__}: {error}"
            ) from error


def damaged_files(folder: Path, gguf_file: str | None = None) -> Iterator[tuple[Path, str]]:
    """JSON, safetensors and the GGUF file that cannot be read, and why."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    if gguf_file is not None and folder.is_dir():
        files.append(folder / gguf_file)
    for file in files:
        try:
            _read(file)
        except (ValueError, LookupError, OSError, RecursionError, SafetensorError) as error:
            yield file, str(error)


def _read(file: Path) -> None:
    if file.suffix == ".json":
        json.loads(file.read_bytes())
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass
    else:
        from gguf import GGUFReader

        GGUFReader(file)


def refuse_missing(info: dict[str, Any], path: str, model: str) -> None:
    """Fail where ``from_pretrained`` left weights at random (it only logs them)."""
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights of {model}, which would stay random: "
            f"{missing[:8]}{' ...' if len(missing) > 8 else ''}. Is it a checkpoint of this model?"
        )


def refuse_not_finite(model: Any, path: str) -> None:
    """Fail where weights hold what is no number: whatever they touch would be none.

    Args:
        model: a module, loaded.
        path: where it is from.
    """
    weights = model.state_dict().items()
    odd = [name for name, w in weights if w.is_floating_point() and not w.isfinite().all()]
    if odd:
        raise ValueError(
            f"{len(odd)} weights of {type(model).__name__} in {path} are not finite: {odd[:4]}"
            f"{' ...' if len(odd) > 4 else ''}. Get them again, or take others."
        )
