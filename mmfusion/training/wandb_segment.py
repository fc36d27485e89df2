"""One segment of a W&B run: what one process writes to it in one start.

It is online where an account key is set and the server answers, offline otherwise; it never asks,
and it costs seconds at most where the server does not answer. All of W&B's folders are inside the
run directory. All segments of a run have its id: those of later starts go on with the same curves,
those of other nodes (each under a label of its own) add what their machines do.
"""

from __future__ import annotations

import configparser
import os
import shlex
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmfusion.data.whole_file import write_whole
from mmfusion.stopping import WARNINGS, held
from mmfusion.training.secrets import hide_secrets

WandbChoice = Literal["auto", "online", "offline", "off"]
FOLDER = "wandb"
WHERE = "where.txt"
"""Says where the newest segment of the run is: its address, or why it is offline."""
FLUSH_SECONDS = 1.0
"""Between writes of the segment's file: what a SIGKILL can lose."""
_USERS_CONFIG = os.environ.get("WANDB_CONFIG_DIR")
"""Where `wandb login` has stored the server, before that folder is moved."""


@dataclass(frozen=True)
class Segment:
    """What a segment is to be.

    Attributes:
        run_dir: the run directory.
        run_id: W&B's id of the run.
        name: of the run.
        project: of W&B.
        choice: ``auto``, ``online`` (warns where that cannot be) or ``offline``.
        timeout: seconds to wait for the server to answer.
        node: number of this machine in the run.
        nodes: machines of the run. With several, each has a segment.
        measures: what this machine does.
    """

    run_dir: Path
    run_id: str
    name: str
    project: str = "mmfusion"
    choice: WandbChoice = "auto"
    timeout: float = 5.0
    node: int = 0
    nodes: int = 1
    measures: bool = True


def begin(segment: Segment) -> tuple[Any, str]:
    """Begin it: the W&B run, and in words where it is and why.

    Returns:
        run: of W&B.
        words: such as ``offline (no API key ...)``.
    """
    run, words = _begin(segment)
    if segment.node == 0:
        with suppress(OSError), write_whole(str(segment.run_dir / FOLDER / WHERE)) as file:
            file.write(words.encode())
    return run, words


def where(run_dir: Path) -> str | None:
    """What :func:`begin` said last of a run, and what to do where that is offline; None: nothing
    was logged to W&B.
    """
    try:
        words = (run_dir / FOLDER / WHERE).read_text()
    except OSError:
        return None
    to_do = f"; mmfusion sync {shlex.quote(str(run_dir))} sends it"
    return words + (to_do if words.startswith("offline") else "")


def _begin(segment: Segment) -> tuple[Any, str]:
    import wandb

    host = server()
    folder = _own_folders(segment)
    several = segment.nodes > 1
    settings = wandb.Settings(
        base_url=host,
        silent=True,
        console="off",
        init_timeout=max(20.0, 4 * segment.timeout),
        finish_timeout=60.0,
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        x_label=f"node-{segment.node}" if several else None,
        x_disable_stats=not segment.measures,
        x_primary=segment.node == 0,
        x_update_finish_state=segment.node == 0,
    )
    about: dict[str, Any] = {"id": segment.run_id, "name": segment.name, "project": segment.project}
    missing = why_not_online(segment.choice, host, segment.timeout)
    reason = missing
    with held(*WARNINGS):  # its service is a process of its own
        if missing is None:
            try:
                run = wandb.init(
                    **about,
                    dir=folder,
                    resume="allow",
                    mode="shared" if several else "online",
                    settings=settings,
                )
                return run, f"online ({run.url})"
            except wandb.errors.Error as error:  # a wrong key, a server that stopped answering
                reason = f"it could not start online: {hide_secrets(str(error))}"
                wandb.teardown()  # frees the run id
        run = wandb.init(**about, dir=folder, resume="allow", mode="offline", settings=settings)
    return run, f"offline ({reason})"


def _own_folders(segment: Segment) -> str:
    """All of W&B's below the run directory; returns that above its ``wandb``."""
    folder = segment.run_dir / FOLDER
    above = folder / f"node-{segment.node}" if segment.node else segment.run_dir
    above.mkdir(parents=True, exist_ok=True)
    os.environ["WANDB_DIR"] = str(above)
    for name in ("data", "cache", "config"):
        os.environ[f"WANDB_{name.upper()}_DIR"] = str(above / FOLDER / name)
    return str(above)


def why_not_online(choice: WandbChoice, host: str, timeout: float) -> str | None:
    """Why a segment has to be offline; None where it can be online."""
    if choice == "offline":
        return "as asked"
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return "WANDB_MODE"
    if not _has_key(host):
        return f"no API key for {host}: set WANDB_API_KEY or run `wandb login`"
    return None if _answers(host, timeout) else f"{host} did not answer within {timeout:g} s"


def agents_run() -> str | None:
    """The run's id where a `wandb agent` has started this process, for W&B takes no other then."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def agents_folder(run_dir: str) -> str:
    """The run directory; of each run of an agent one of its own in it, for they share a command."""
    number = agents_run()
    return str(Path(run_dir) / f"{os.environ['WANDB_SWEEP_ID']}-{number}") if number else run_dir


def server() -> str:
    """The W&B server: the environment's, else the one `wandb login` stored, else W&B's own."""
    import wandb

    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    stored = configparser.ConfigParser()
    stored.read(Path(_USERS_CONFIG or "~/.config/wandb").expanduser() / "settings")
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
