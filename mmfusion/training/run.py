"""The run directory: everything about one run, and what makes the same command go on.

::

    config.yaml      the resolved recipe
    run.json         stable id (also W&B's), when it was made, versions
    status.json      running | finished | failed | interrupted | preempted, step, attempt, reason
    attempts/0001/   command, machine and log of each start
    checkpoints/     step-00000100.ckpt (or a folder, step-00000100) ... and ``latest``
    left_out.json    packs that no step trains on, where the run went back
    metrics.csv, quarantine.jsonl, wandb/
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import yaml

from mmfusion.models.generators.base import ONLY_DRAWN
from mmfusion.paths import expand
from mmfusion.stopping import RunInterrupted
from mmfusion.training.checkpoint import FOLDER, LATEST, UNFINISHED, replace_text
from mmfusion.training.resume import by_step, remove, step_of, unfinished
from mmfusion.training.secrets import hide_secrets
from mmfusion.training.wandb_segment import agents_run

ATTEMPTS = "attempts"
State = Literal["running", "finished", "failed", "interrupted", "preempted"]

NOT_THE_RECIPE = ("run_dir", "resume", "allow_recipe_change", "config", "ckpt_path", "weights_only")
"""Arguments of a start, not of the run."""

FREE_KEYS = (
    "checkpoint",
    "guard",
    "validation",
    "val_every_n_steps",
    "wandb",
    "wandb_project",
    "wandb_artifacts",
    "tensorboard",
    "timeout_minutes",
    "strategy",
    "sequence_parallel",
    "data.num_workers",
    "data.worker_start",
    "data.val_sources",
    "data.val_limit",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.logger",
    "trainer.max_time",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.profiler",
    "trainer.benchmark",
    "trainer.detect_anomaly",
    "trainer.limit_val_batches",
    "trainer.val_check_interval",
)
"""Keys that may differ between two starts of a run: they change neither packs nor losses."""


ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""Of a run."""


class RunDirectory:
    """The files of a run.

    Args:
        path: the directory; made when the run starts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.identity = self.path / "run.json"
        self.status_file = self.path / "status.json"
        self.checkpoints = self.path / FOLDER
        self.quarantine = self.path / "quarantine.jsonl"

    @property
    def id(self) -> str:
        """The run's stable id; known after :meth:`open`."""
        try:
            found = json.loads(self.identity.read_text())["id"]
            if not isinstance(found, str) or not ID.fullmatch(found):
                raise ValueError(f"{found!r} is no id")  # it becomes a name of W&B's files
            return found
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.identity} is damaged ({error!r}); put back the run's id (W&B shows it) as "
                '{"id": "..."}, or remove the file to go on under a new id.'
            ) from None

    def attempts(self) -> list[Path]:
        """Folders of the starts so far, oldest first."""
        found = (path for path in (self.path / ATTEMPTS).glob("*") if path.name.isdigit())
        return sorted(found, key=lambda path: int(path.name))

    def status(self) -> dict[str, Any]:
        """The last status written; an empty dict where there is none that can be read."""
        try:
            return dict(json.loads(self.status_file.read_text()))
        except (FileNotFoundError, ValueError, TypeError):  # it only informs
            return {}

    def check_recipe(self, recipe: Mapping[str, Any], allow_change: bool = False) -> None:
        """Refuse to go on with another recipe.

        Raises:
            ValueError: where the recipe differs from the one the run started with in a key that
                changes what is trained.
        """
        if allow_change or not by_step(self.checkpoints):
            return
        try:
            before = dict(yaml.safe_load(self.config.read_text()))
        except (FileNotFoundError, yaml.YAMLError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.config} is missing or damaged, so the recipe cannot be compared with the "
                f"one the run started with ({error}); if it is the same, go on by "
                "--allow_recipe_change."
            ) from None
        if changes := list(differences(before, recipe)):
            raise ValueError(
                f"{self.path} was started with another recipe; {len(changes)} keys differ:\n  "
                + "\n  ".join(changes)
                + "\nUse another --run_dir, or go on with the new values by --allow_recipe_change."
            )

    def open(self, recipe: Mapping[str, Any], step: int = 0) -> Attempt:
        """Write the recipe and begin the next attempt (on rank 0 only).

        Args:
            recipe: resolved.
            step: that the attempt goes on from.

        Raises:
            ValueError: where another process is writing this run, or the recipe holds a key, token
                or password, which would be written to ``config.yaml``.
        """
        shown = dict(_flatten(hide_secrets(recipe)))
        if secret := [key for key, value in _flatten(recipe) if str(shown.get(key)) != str(value)]:
            raise ValueError(
                f"{', '.join(secret)}: a key, token or password in a recipe would be written to "
                f"{self.config} and to the loggers; give it by an environment variable (HF_TOKEN, "
                "WANDB_API_KEY) instead."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        for torn in [*self.path.glob(UNFINISHED), *self.path.glob(f"{ATTEMPTS}/*/{UNFINISHED}")]:
            torn.unlink()
        for torn in unfinished(self.checkpoints):
            remove(torn)
        self.adopt(agents_run() or secrets.token_hex(4))
        _ = self.id  # refused here where it is damaged, before anything moves
        kept = {key: value for key, value in recipe.items() if key not in NOT_THE_RECIPE}
        text = yaml.safe_dump({"run_dir": str(self.path), **kept}, sort_keys=False)
        replace_text(self.config, text)
        return Attempt(self, step)

    def adopt(self, run_id: str | None) -> None:
        """Be the run of that id, where the directory is no run's yet."""
        if run_id and not self.identity.exists():
            content = {"id": run_id, "created": now(), "versions": versions()}
            replace_text(self.identity, json.dumps(content, indent=2))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Refuse where another process is writing the run, and let none begin meanwhile."""
        self._lock()
        try:
            yield
        finally:
            self._locked.close()

    def _lock(self) -> None:
        """Hold the run until this process ends.

        By a record lock: loader processes do not inherit it, so a killed run is free at once.
        """
        self._locked = (self.path / ".lock").open("w")
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            told = self.status()
            at = f", at step {told['step']} at {told['updated']}" if "updated" in told else ""
            raise ValueError(
                f"another process is writing {self.path}{at}; stop it, or use another --run_dir."
            ) from None

    def release(self) -> None:
        """Let the next attempt, of this process too, hold the run."""
        self._locked.close()

    def set_aside(self, after_step: int, attempt: Attempt, why: Sequence[str] = ()) -> None:
        """Move checkpoints beyond the step the run goes on from into the attempt's folder, so that
        no later resume mixes them with this attempt's.

        Args:
            after_step: that step.
            attempt: that begins.
            why: what is wrong with them.
        """
        newer = [p for p in by_step(self.checkpoints) if step_of(p) > after_step]
        for path in newer:
            target = attempt.path / "earlier_checkpoints" / path.name
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        if newer:
            latest, left = self.checkpoints / LATEST, by_step(self.checkpoints)
            replace_text(latest, left[-1].name + "\n") if left else latest.unlink(missing_ok=True)
            log = logging.getLogger(__name__)
            names = ", ".join(path.name for path in newer)
            log.warning("%s, beyond step %d, moved to %s", names, after_step, target.parent)
            for reason in why:  # nobody listened for this attempt when it was found
                log.warning("not resumed from %s", reason)


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return str(hide_secrets(super().format(record)))


class Attempt:
    """One start of a run: a context that keeps ``status.json`` and the attempt's log.

    Leaving it by an error writes ``failed`` with the reason, by Ctrl-C ``interrupted``, by
    another signal ``preempted``.
    Keys, tokens and passwords of the environment are hidden in what it writes.
    """

    def __init__(self, run: RunDirectory, step: int = 0) -> None:
        numbers = [int(path.name) for path in run.attempts()]
        self.run = run
        self.number = max(numbers, default=0) + 1
        self.path = run.path / ATTEMPTS / f"{self.number:04d}"
        self.path.mkdir(parents=True)
        self.step = step
        self.unfinished = ""
        """Why it stopped before its end, where that is no error."""
        self.told = ""
        """The reason in ``status.json`` while it goes on as it should."""
        self._written = 0.0
        self._handler = logging.FileHandler(self.path / "log.txt")

    def __enter__(self) -> Attempt:
        self._handler.setFormatter(
            _WithoutSecrets("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )
        for name in ("mmfusion", "lightning", "py.warnings"):
            logging.getLogger(name).addHandler(self._handler)
        about = {
            "command": hide_secrets(sys.argv),
            "started": now(),
            "step": self.step,
            "host": platform.node(),
            "pid": os.getpid(),
            "world_size": int(os.environ.get("WORLD_SIZE", 1)),
            "versions": versions(),
        }
        replace_text(self.path / "attempt.json", json.dumps(about, indent=2))
        self.write("running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state: State
        if error is None:
            state = "interrupted" if self.unfinished else "finished"
            self.write(state, self.unfinished or self.told)
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            preempted = isinstance(error, RunInterrupted) and error.preempted
            state = "preempted" if preempted else "interrupted"
            self.write(state, str(error) or type(error).__name__)
        else:
            self.write("failed", f"{type(error).__name__}: {error}")
            text = "".join(traceback.format_exception(kind, error, trace))
            with (self.path / "log.txt").open("a") as file:
                file.write(hide_secrets(text))
        for name in ("mmfusion", "lightning", "py.warnings"):
            logging.getLogger(name).removeHandler(self._handler)
        self._handler.close()

    def progress(self, step: int, every_seconds: float = 5.0) -> None:
        """Note the optimizer step; written now and then."""
        self.step = step
        if time.monotonic() - self._written >= every_seconds:
            self.write("running", self.told)

    def write(self, state: State, reason: str = "") -> None:
        """Replace ``status.json``."""
        self._written = time.monotonic()
        content = {
            "state": state,
            "step": self.step,
            "attempt": self.number,
            "reason": hide_secrets(reason),
            "updated": now(),
        }
        replace_text(self.run.status_file, json.dumps(content, indent=2))


def recipe_of(given: str) -> str:
    """The recipe's file: as given, or the ``config.yaml`` of a run directory.

    Raises:
        FileNotFoundError: a directory that is no run.
    """
    if not Path(expand(given)).is_dir():
        return given
    config = RunDirectory(expand(given)).config
    if not config.is_file():
        raise FileNotFoundError(
            f"{given} is not a run directory: it has no {config.name}. Give a recipe's file, or "
            "the directory that `mmfusion fit` wrote."
        )
    return str(config)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """``key: before -> now`` of every key that differs and matters."""
    flat_before, flat_now = dict(_flatten(before)), dict(_flatten(now))
    for key in sorted(flat_before.keys() | flat_now.keys()):
        old, new = flat_before.get(key), flat_now.get(key)
        if old != new and not _is_free(key):
            yield f"{key}: {old!r} -> {new!r}"


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """Of the keys that change what is trained: the same for two recipes without
    :func:`differences`.
    """
    kept = {key: value for key, value in _flatten(recipe) if not _is_free(key)}
    # What is not named is None, as where two recipes are compared.
    text = json.dumps({k: x for k, x in kept.items() if x is not None}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_free(key: str) -> bool:
    if key.startswith("model.generators.") and key.rpartition(".")[2] in ONLY_DRAWN:
        return True
    return any(key == free or key.startswith(free + ".") for free in (*FREE_KEYS, *NOT_THE_RECIPE))


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def now() -> str:
    """To the second, with the time zone."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    found = {"python": platform.python_version()}
    for name in ("mmfusion", "torch", "lightning", "transformers", "peft", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
