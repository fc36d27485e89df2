"""Where metrics go: ``metrics.csv`` in the run directory, always, and Weights & Biases.

W&B is online where an account key is set and the server answers, offline otherwise; it never asks
and never blocks a run. Everything it writes lies inside the run directory, under the run's own id,
so a resumed run continues the same curves; ``wandb sync RUN_DIR/wandb/offline-run-*`` uploads what
was logged offline.
"""

from __future__ import annotations

import configparser
import csv
import io
import os
import re
import threading
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from mmfusion.stopping import WARNINGS, held

STEP, ATTEMPT = "trainer/global_step", "trainer/attempt"
WandbChoice = Literal["auto", "online", "offline", "off"]

_SECRET_NAME = re.compile(
    r"(^|_)(api_?key|secret|password|passwd|credentials?|(access|auth|hf|hub|bearer)_token)$|^token$",
    re.I,
)
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.I)
_HIDDEN = "(hidden)"


def default_loggers(
    run_dir: str | Path,
    run_id: str,
    attempt: int = 1,
    wandb: WandbChoice = "auto",
    project: str = "mmfusion",
    timeout: float = 5.0,
) -> list[Logger]:
    """The loggers of a run. Makes no file and contacts nobody until the first metric.

    Args:
        run_dir: the run directory; everything is written below it.
        run_id: the run's stable id, the same after a resume.
        attempt: which start of this run this is, from 1; logged beside every metric.
        wandb: ``auto`` is online where a key is set and the server answers, else offline;
            ``online`` warns where that cannot be and goes on offline; ``offline``; ``off``.
        project: W&B project.
        timeout: seconds to wait for the W&B server to answer.
    """
    loggers: list[Logger] = [MetricsCSV(run_dir, attempt)]
    if wandb not in ("auto", "online", "offline", "off"):
        raise ValueError(f"wandb is {wandb!r}; expected auto, online, offline or off.")
    if wandb != "off" and os.environ.get("WANDB_MODE") != "disabled":
        loggers.append(RunWandb(run_dir, run_id, attempt, wandb, project, timeout))
    return loggers


class MetricsCSV(Logger):
    """Appends metrics to ``metrics.csv``, a row a step.

    Rows are never lost: a resumed run appends, a new metric adds a column (the file is then
    rewritten aside and renamed). After a crash the steps since the checkpoint are logged again,
    under the next attempt.

    Args:
        run_dir: where ``metrics.csv`` is.
        attempt: which start of the run this is.
    """

    def __init__(self, run_dir: str | Path, attempt: int = 1) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self.attempt = attempt
        self._columns: list[str] | None = None
        self._last: dict[str, Any] | None = None
        self._offset = 0

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> int:
        return self.attempt

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved recipe is the run directory's config.yaml; nothing to add."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a row at once; what is logged for the step of the last row goes into that row."""
        row: dict[str, Any] = {
            STEP: step,
            ATTEMPT: self.attempt,
            **{key: float(value) for key, value in metrics.items() if key != STEP},
        }
        if self._columns is None:
            self._columns = self._open()
        merges = self._last is not None and self._last[STEP] == step
        if merges and self._last is not None:
            row = {**self._last, **row}
        if new := [key for key in row if key not in self._columns]:
            self._grow(new, without_last=merges)
            merges = False
        with self.path.open("r+b") as file:
            self._offset = file.seek(*((self._offset, os.SEEK_SET) if merges else (0, os.SEEK_END)))
            file.write(self._line(row))
            file.truncate()
        self._last = row

    def _line(self, row: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self._columns or (), lineterminator="\n").writerow(row)
        return text.getvalue().encode()

    def _open(self) -> list[str]:
        """Columns of the file so far; a row torn by a kill is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        if (whole := text.rfind(b"\n") + 1) < len(text):
            os.truncate(self.path, whole)
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _grow(self, new: list[str], without_last: bool) -> None:
        rows = _complete_rows(self.path) if self.path.exists() else []
        rows = rows[:-1] if without_last else rows
        self._columns = [*(self._columns or []), *new]
        aside = self.path.with_name(".metrics.csv.tmp")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)


def read_metrics(path: str | Path, all_attempts: bool = False) -> list[dict[str, float]]:
    """The rows of a ``metrics.csv``, empty cells left out; a torn last row is ignored.

    Args:
        path: the file.
        all_attempts: keep also the rows a later attempt of the run logged again.
    """
    rows = [
        {key: float(value) for key, value in row.items() if value}
        for row in _complete_rows(Path(path))
    ]
    if all_attempts:
        return rows
    first_step: dict[float, float] = {}
    for row in rows:
        attempt, step = row[ATTEMPT], row.get(STEP, 0.0)
        first_step[attempt] = min(step, first_step.get(attempt, step))
    return [
        row
        for row in rows
        if all(
            row.get(STEP, 0.0) < start
            for attempt, start in first_step.items()
            if attempt > row[ATTEMPT]
        )
    ]


def _complete_rows(path: Path) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


class RunWandb(WandbLogger):
    """Lightning's W&B logger, kept inside the run directory and never in the way.

    Args:
        run_dir: the run directory.
        run_id: W&B id, the same after a resume.
        attempt: which start of the run this is.
        choice: ``auto``, ``online`` or ``offline``.
        project: W&B project.
        timeout: seconds to wait for the server to answer.
    """

    def __init__(
        self,
        run_dir: str | Path,
        run_id: str,
        attempt: int = 1,
        choice: Literal["auto", "online", "offline"] = "auto",
        project: str = "mmfusion",
        timeout: float = 5.0,
    ) -> None:
        self._run_dir = Path(run_dir).absolute()
        super().__init__(
            name=self._run_dir.name, save_dir=str(self._run_dir), id=run_id, project=project
        )
        self._wandb_init.pop("anonymous", None)  # has no effect but a warning
        self._choice, self._attempt, self._timeout = choice, attempt, timeout

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at first use."""
        if self._experiment is None:
            self._start()
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log the recipe, with keys, tokens and passwords hidden."""
        plain = vars(params) if isinstance(params, Namespace) else params
        super().log_hyperparams(hide_secrets(plain))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics({**metrics, ATTEMPT: self._attempt}, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close this segment of the run; a later metric opens the next one under the same id."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None

    def _start(self) -> None:
        import wandb

        host = _server()  # before the configuration folder moves
        self._run_dir.mkdir(parents=True, exist_ok=True)
        folder = self._run_dir / "wandb"
        os.environ["WANDB_DIR"] = str(self._run_dir)
        for name in ("data", "cache", "config"):
            os.environ[f"WANDB_{name.upper()}_DIR"] = str(folder / name)
        settings = wandb.Settings(
            base_url=host,
            silent=True,
            console="off",
            init_timeout=max(20.0, 4 * self._timeout),
            finish_timeout=60.0,
            x_transaction_log_flush_interval=1.0,
        )
        mode, reason = self._mode(host)
        try:
            with held(*WARNINGS):  # its service is a process of its own
                run = wandb.init(**self._wandb_init, settings=settings, mode=mode)
        except wandb.errors.Error as error:  # a wrong key, a server that stopped answering
            rank_zero_warn(f"W&B could not start online ({error}); logging offline.")
            wandb.teardown()  # frees the run id
            mode, reason = "offline", "online start failed"
            with held(*WARNINGS):
                run = wandb.init(**self._wandb_init, settings=settings, mode=mode)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        run.config.update({"attempt": self._attempt}, allow_val_change=True)
        self._experiment = run
        rank_zero_info(f"W&B is {mode} ({reason}); files in {folder}")

    def _mode(self, host: str) -> tuple[Literal["online", "offline"], str]:
        if self._choice == "offline":
            return "offline", "as asked"
        if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
            return "offline", "WANDB_MODE"
        missing = None
        if not _has_key(host):
            missing = f"no API key for {host}: set WANDB_API_KEY or run `wandb login`"
        elif not _answers(host, self._timeout):
            missing = f"{host} did not answer within {self._timeout:g} s"
        if missing is None:
            return "online", host
        if self._choice == "online":
            rank_zero_warn(f"W&B was asked to be online, but {missing}; logging offline.")
        return "offline", missing


def hide_secrets(value: Any, name: str = "") -> Any:
    """A copy of a configuration in which keys, tokens and passwords are hidden.

    Hidden are strings under a telling name (``api_key``, ``token``, ...), Hugging Face tokens, and
    every occurrence of the value of an environment variable that is named like a secret.
    """
    if isinstance(value, Mapping):
        return {key: hide_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(hide_secrets(item, name) for item in value)
    if not isinstance(value, str):
        return value
    if _SECRET_NAME.search(name):
        return _HIDDEN
    for variable, secret in os.environ.items():
        if len(secret) >= 8 and _SECRET_VARIABLE.search(variable):
            value = value.replace(secret, _HIDDEN)
    value = _SECRET_VALUE.sub(_HIDDEN, value)
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", rf"\1:{_HIDDEN}@", value)


def _server() -> str:
    """The W&B server: the environment's, else the one `wandb login` stored, else W&B's own."""
    import wandb

    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    stored = configparser.ConfigParser()
    stored.read(Path(folder).expanduser() / "settings")
    return str(stored.get("default", "base_url", fallback=wandb.Settings().base_url))


def _has_key(host: str) -> bool:
    from wandb.sdk.lib.wbauth import read_netrc_auth

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return read_netrc_auth(host=host) is not None


def _answers(url: str, timeout: float) -> bool:
    """Whether anything answers HTTP at ``url``; in a thread, as a name look-up has no timeout."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=timeout).close()
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answers == [True]


def wandb_of(trainer: L.Trainer) -> RunWandb | None:
    """The run's W&B logger, if it has one (for tables and other things only W&B shows)."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunWandb)), None)
