"""What a checkpoint keeps, and how it is read and written.

It keeps what cannot be downloaded again: what trains now, and what an earlier stage trained though
it is frozen now. So a checkpoint of stage 1 is as small as its projectors. Everything in it is
plain tensors, numbers and strings: loading one from a stranger runs no code.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor, nn

from mmfusion.data.whole_file import write_whole
from mmfusion.training import manifest, sharded

FOLDER = "checkpoints"
LATEST = "latest"
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
"""Types of values that are read without running code, beside tensors and their containers."""
UNFINISHED = ".*.tmp"
"""What a killed save leaves behind."""
REQUIRED_KEYS = (
    "state_dict",
    "global_step",
    "loops",
    "callbacks",
    "optimizer_states",
    "pytorch-lightning_version",
)


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints, written whole or not at all, read without unpickling objects: single files, and
    a rank's part of a folder (:class:`mmfusion.training.shard_saves.ShardSaves`).

    Attributes:
        behind: training goes on while a checkpoint is written; only its copy in the host's memory
            is waited for.
        about: what its manifest says (:class:`mmfusion.training.manifest.Manifest`).
        done: called when a checkpoint has its name, in the thread that wrote it.
        failed: what kept the last one from being written. Where ``raises`` is not set, it is only
            found here: one rank writes, and the others would wait for it.
    """

    def __init__(self) -> None:
        self.behind = False
        self.about: dict[str, Any] = {}
        self.done: Callable[[Path], None] = lambda path: None
        self.raises = True
        self.failed: OSError | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` aside with its manifest, flush it, rename it to ``path``.

        Raises:
            ValueError: where it holds a value that could not be read back without running code.
            OSError: naming the file, where it cannot be written (a full disk); with ``behind`` of
                the checkpoint before.
        """
        _check_plain(checkpoint, "")
        try:
            self.wait()
            if self.behind:
                given = _copy(checkpoint), Path(path), self.about
                self._writing = self._thread.submit(self._write, *given)
            else:
                self._write(checkpoint, Path(path), self.about)
        except OSError as error:
            self.failed = error
            if self.raises:
                raise

    def _write(self, checkpoint: dict[str, Any], path: Path, about: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(str(path)) as file:
            _save(checkpoint, file)
            weights = sum(tensor.numel() for tensor in checkpoint.get("state_dict", {}).values())
            manifest.add(file, {**about, "weights": weights})
        self.done(path)

    def save_shards(
        self, checkpoint: Mapping[str, Any], folder: Path, rank: int, world: int
    ) -> Future[dict[str, manifest.Entry]]:
        """Write what this rank holds of a checkpoint, and on rank 0 the rest of it.

        Returns:
            What has the entries of these files for the manifest, once they are written, or an
            OSError. Where ``behind`` is not set it has to be waited for before training goes on.

        Raises:
            ValueError: as :meth:`save_checkpoint`.
        """
        rest, shares = sharded.split(checkpoint, rank, world)
        given = rest if rank == 0 else None
        _check_plain(given, "")
        if self.behind:
            given = _copy(given)
            shares = [replace(share, values=_copy(share.values)) for share in shares]
        return self._thread.submit(self._write_shards, folder, rank, shares, given)

    def _write_shards(
        self, folder: Path, rank: int, shares: list[sharded.Share], rest: dict[str, Any] | None
    ) -> dict[str, manifest.Entry]:
        names = [sharded.write(folder, rank, shares)]
        if rest is not None:
            names.append(sharded.REST)
            with write_whole(str(folder / sharded.REST)) as file:
                _save(rest, file)
        return {name: manifest.entry(folder / name) for name in names}

    def finish_shards(self, folder: Path, entries: Mapping[str, manifest.Entry]) -> None:
        """Write the manifest of what all ranks have written, as a checkpoint of one file is
        written: :meth:`wait` says how it went.
        """
        self._writing = self._thread.submit(self._finish, folder, entries, self.about)

    def _finish(
        self, folder: Path, entries: Mapping[str, manifest.Entry], about: Mapping[str, Any]
    ) -> None:
        manifest.write(folder, entries, about)
        self.done(folder)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Until what is being written is there.

        Raises:
            OSError: where it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def teardown(self) -> None:
        """End with what is being written."""
        self.wait()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to ``map_location`` (the CPU); always ``weights_only``."""
        return read_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the file if it is there."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path, device: Any = "cpu", unread: bool = False) -> dict[str, Any]:
    """Load a checkpoint, of one file or of shards, refusing anything but plain data.

    Args:
        path: of the file or the folder.
        device: where tensors go: ``cpu``, or ``meta`` for their shapes alone.
        unread: tensors stay in their files until they are copied: of shards, one is read each time
            it is asked for, and a single file is mapped.
    """
    if not Path(path).is_dir():
        return torch.load(path, map_location=device, weights_only=True, mmap=unread)
    rest = torch.load(Path(path, sharded.REST), map_location="cpu", weights_only=True)
    found = sharded.joined(path, rest, numbers=str(device) != "meta")
    return found if unread else sharded.read(found)


def _save(content: Mapping[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # the archive could not be closed either
            raise error.__context__ from None
        raise


def _copy(value: Any) -> Any:
    """In the host's memory, apart from what training goes on with."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):  # an OrderedDict and a defaultdict are read as one as well
        return {name: _copy(item) for name, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_copy(item) for item in value)
    return value


def _check_plain(value: Any, key: str) -> None:
    if type(value) in (dict, OrderedDict, defaultdict):
        for name, item in value.items():
            _check_plain(name, key)
            _check_plain(item, f"{key}.{name}" if key else str(name))
    elif type(value) in (list, tuple, set, torch.Size):
        for item in value:
            _check_plain(item, key)
    elif not isinstance(value, Tensor) and type(value) not in PLAIN:
        raise ValueError(
            f"the checkpoint's {key} holds a {type(value).__module__}.{type(value).__qualname__}; "
            "expected tensors, numbers, strings, lists and dicts. Return such from state_dict()."
        )


def replace_text(path: str | Path, text: str) -> None:
    """Replace a small text file, whole or not at all."""
    with write_whole(str(path)) as file:
        file.write(text.encode())


def trained_names(module: nn.Module) -> set[str]:
    """Names in ``module.state_dict()`` that training changes: trainable parameters, and the buffers
    (running statistics) of modules that have one.
    """
    trains = {name for name, parameter in _parameters(module) if parameter.requires_grad}
    buffers = {
        name
        for name, _ in module.named_buffers(remove_duplicate=False)
        if _owner_trains(module, name)
    }
    return (trains | buffers) & set(module.state_dict())


def kept_state(state: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The entries to save, without the rest of a larger storage that an entry is a view of."""
    kept = set(names)
    return {name: _compact(state[name]) for name in state if name in kept}


def load_kept(
    module: nn.Module, state: Mapping[str, Tensor], origin: str, later: Collection[str] = ()
) -> dict[str, str]:
    """Load kept weights by name into a module that is otherwise built.

    A weight that LoRA has wrapped since (``q_proj.weight`` is now ``q_proj.base_layer.weight``), or
    no longer wraps, is found as well.

    Args:
        module: the built module, tuning applied.
        state: an earlier run's kept weights.
        origin: named in errors.
        later: names, in ``module.state_dict()``, of what somebody else will load.

    Returns:
        What each that was loaded, or will be, is called in ``state``, by its name in
        ``module.state_dict()``.

    Raises:
        ValueError: where shapes differ, nothing matches, or the weights here are quantised.
    """
    from mmfusion.models.quantised import is_quantised  # loads transformers

    own, shapes = module.state_dict(keep_vars=True), sharded.shapes(state)
    renamed = {_canonical(name): name for name in own}
    found = {renamed[_canonical(n)]: n for n in state if _canonical(n) in renamed}
    if packed := [name for name in found if is_quantised(own[name])]:
        raise ValueError(
            f"{len(packed)} weights of {origin} were trained whole, and are quantised here: "
            f"{_some(packed)}. Leave the LLM's quantization out, or their part behind "
            "(model.init_drop)."
        )
    wrong = [
        f"{name}: {tuple(shapes[there].shape)} there, {tuple(own[name].shape)} here"
        for name, there in found.items()
        if shapes[there].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of {origin} have another shape in this recipe: "
            f"{_some(wrong)}. Use the same parts as that run, or train these parts anew in a "
            "recipe of their own."
        )
    if not found:
        raise ValueError(
            f"none of the {len(state)} weights of {origin} exists in this recipe's model (there: "
            f"{_some(sorted(state))}). Give its parts the same names and classes."
        )
    with torch.no_grad():
        for name in found.keys() - set(later):
            tensor = state[found[name]]
            if own[name].requires_grad and own[name].element_size() < tensor.element_size():
                own[name].data = own[name].data.to(tensor.dtype)  # it goes on in full precision
            own[name].copy_(tensor)
    return found


def unused_names(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of an earlier run's weights that the module has no place for."""
    known = {_canonical(name) for name in module.state_dict()}
    return sorted(name for name in state if _canonical(name) not in known)


def _parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def _owner_trains(module: nn.Module, buffer: str) -> bool:
    """Whether the nearest module around the buffer that has parameters has one that trains."""
    path = buffer.split(".")[:-1]
    for end in range(len(path), -1, -1):
        owner = module.get_submodule(".".join(path[:end]))
        parameters = list(owner.parameters())
        if parameters:
            return any(parameter.requires_grad for parameter in parameters)
    return False


def _compact(tensor: Tensor | sharded.Part) -> Tensor | sharded.Part:
    if isinstance(tensor, sharded.Part):
        return tensor
    tensor = tensor.detach()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _canonical(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _some(items: list[str], limit: int = 4) -> str:
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
