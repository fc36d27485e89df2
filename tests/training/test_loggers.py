"""The CSV keeps every row; W&B works without network, inside the run directory, under one id."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmfusion.training.loggers import (
    MetricsCSV,
    RunWandb,
    default_loggers,
    hide_secrets,
    read_metrics,
)


def test_csv_appends_over_resumes_and_grows_columns(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path, attempt=1)
    first.log_metrics({"train/loss": 2.0}, step=1)
    first.log_metrics({"train/loss": 1.5, "val/loss": 3.0}, step=2)
    first.log_metrics({"train/loss": 9.0}, step=3)
    MetricsCSV(tmp_path, attempt=2).log_metrics({"train/loss": 1.25, "new": 7.0}, step=3)
    rows = read_metrics(tmp_path / "metrics.csv", all_attempts=True)
    assert [row["train/loss"] for row in rows] == [2.0, 1.5, 9.0, 1.25]
    assert rows[1]["val/loss"] == 3.0
    assert "val/loss" not in rows[0]
    assert rows[3] == {
        "trainer/global_step": 3.0,
        "trainer/attempt": 2.0,
        "train/loss": 1.25,
        "new": 7.0,
    }
    assert [row["train/loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [2.0, 1.5, 1.25]


def test_csv_merges_what_is_logged_for_one_step(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1.0, "b": 0.125}, step=0)
    logger.log_metrics({"a": 2.0}, step=1)
    logger.log_metrics({"b": 0.25}, step=1)
    logger.log_metrics({"c": 3.0}, step=1)
    logger.log_metrics({"a": 4.0, "c": 1}, step=2)
    logger.log_metrics({"c": 12345.0}, step=2)
    rows = read_metrics(tmp_path / "metrics.csv")
    values = [[row.get(key) for key in "abc"] for row in rows]
    assert values == [[1.0, 0.125, None], [2.0, 0.25, 3.0], [4.0, None, 12345.0]]


def test_csv_row_torn_by_a_kill_is_cut_off(tmp_path: Path) -> None:
    MetricsCSV(tmp_path).log_metrics({"a": 1.5, "b": 2.5}, step=1)
    path = tmp_path / "metrics.csv"
    with path.open("a") as file:
        file.write("2,1,1.2")
    assert len(read_metrics(path)) == 1
    MetricsCSV(tmp_path, attempt=2).log_metrics({"a": 3.5, "b": 4.5}, step=2)
    with path.open() as file:
        assert [row["a"] for row in csv.DictReader(file)] == ["1.5", "3.5"]


def test_off_and_disabled_leave_only_the_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [type(x) for x in default_loggers(tmp_path, "r", wandb="off")] == [MetricsCSV]
    assert [type(x) for x in default_loggers(tmp_path, "r")] == [MetricsCSV, RunWandb]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [type(x) for x in default_loggers(tmp_path, "r")] == [MetricsCSV]
    with pytest.raises(ValueError, match="expected auto, online, offline or off"):
        default_loggers(tmp_path, "r", wandb="yes")  # type: ignore[arg-type]


def test_secrets_are_hidden_and_tokens_of_text_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12345")
    config = {
        "hf_token": "xyz",
        "next_token": {"weight": 1.0},
        "pack_tokens": 2048,
        "tokens": ["<a>"],
        "note": "key=abcdefgh12345.",
        "url": "https://me:pw@host/x",
        "nested": [{"api_key": "q"}],
    }
    assert hide_secrets(config) == {
        "hf_token": "(hidden)",
        "next_token": {"weight": 1.0},
        "pack_tokens": 2048,
        "tokens": ["<a>"],
        "note": "key=(hidden).",
        "url": "https://me:(hidden)@host/x",
        "nested": [{"api_key": "(hidden)"}],
    }


ROOT = Path(__file__).parents[2]
RUN = """
import sys, time
from mmfusion.training.loggers import RunWandb
run_dir, attempt, first, choice = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
logger = RunWandb(run_dir, "fixedid", attempt, choice, timeout=2)
logger.log_hyperparams({"lr": 0.1, "api_key": "SECRETSECRET"})
for step in range(first, first + 3):
    logger.log_metrics({"train/loss": 1.0 / step}, step=step)
if len(sys.argv) > 5:
    time.sleep(3); import os; os.kill(os.getpid(), 9)
logger.finalize("success")
"""


def start(run_dir: Path, home: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-c", RUN, str(run_dir), *args],
        env={**keep, "HOME": str(home), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def records(segment: Path) -> list[dict]:
    """The documented reader of .wandb files."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_wandb_offline_resumes_under_one_id_inside_the_run_directory(tmp_path: Path) -> None:
    run_dir, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    assert start(run_dir, home, "1", "1", "auto", "kill").returncode == -9
    done = start(run_dir, home, "2", "4", "auto")
    assert done.returncode == 0, done.stderr
    assert not list(home.rglob("*wandb*"))
    segments = sorted((run_dir / "wandb").glob("offline-run-*-fixedid"))
    assert len(segments) == 2
    for attempt, segment in enumerate(segments, 1):
        text = json.dumps(records(segment))
        assert "SECRETSECRET" not in text
        for step in range(3 * attempt - 2, 3 * attempt + 1):
            assert str(1.0 / step) in text  # also of the killed segment
    assert b"SECRETSECRET" not in b"".join(
        path.read_bytes() for path in run_dir.rglob("*") if path.is_file()
    )


@pytest.mark.slow
def test_wandb_with_a_key_and_no_server_goes_on_offline(tmp_path: Path) -> None:
    start_time = time.monotonic()
    done = start(
        tmp_path,
        tmp_path,
        "1",
        "1",
        "online",
        WANDB_API_KEY="k" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
    )
    assert done.returncode == 0, done.stderr
    assert "did not answer" in done.stderr
    assert time.monotonic() - start_time < 60
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert "k" * 40 not in done.stdout + done.stderr


@contextmanager
def server(*args: str) -> Iterator[tuple[dict[str, str], Path]]:
    """A W&B server: the environment that leads a client to it, the file of what it was sent."""
    with (
        tempfile.NamedTemporaryFile("w+") as sent,
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.wandb_server", *args], stdout=sent, cwd=ROOT
        ) as process,
    ):
        try:
            while not (port := Path(sent.name).read_text().partition("\n")[0]):
                assert process.poll() is None, "the server ended"
                time.sleep(0.05)
            url = f"http://127.0.0.1:{port}"
            yield {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": url}, Path(sent.name)
        finally:
            process.kill()


@pytest.mark.slow
def test_wandb_online_goes_on_with_the_same_run_after_a_resume(tmp_path: Path) -> None:
    with server() as (env, sent):
        for attempt, first in (("1", "1"), ("2", "4")):
            done = start(tmp_path, tmp_path, attempt, first, "auto", **env)
            assert done.returncode == 0, done.stderr
            assert "online" in done.stderr
        last = json.loads(sent.read_text().splitlines()[-1])
    assert last["run"] == "fixedid"
    assert last["complete"] is True
    assert "SECRETSECRET" not in last["config"]
    history = last["history"]
    assert [row["trainer/global_step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["trainer/attempt"] for row in history] == [1, 1, 1, 2, 2, 2]
    assert [row["_step"] for row in history] == list(range(6))


@pytest.mark.slow
def test_wandb_with_a_server_that_hangs_goes_on_offline(tmp_path: Path) -> None:
    with server("hang") as (env, _):
        done = start(tmp_path, tmp_path, "1", "1", "auto", **env)  # within its limit
    assert done.returncode == 0, done.stderr
    assert "logging offline" in done.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_wandb_with_a_refusing_server_goes_on_offline(tmp_path: Path) -> None:
    serve = (
        "from http.server import *\n"
        "s = ThreadingHTTPServer(('127.0.0.1', 0), BaseHTTPRequestHandler)\n"
        "print(s.server_port, flush=True); s.serve_forever()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", serve],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        done = start(
            tmp_path,
            tmp_path,
            "1",
            "1",
            "auto",
            WANDB_API_KEY="k" * 40,
            WANDB_BASE_URL=f"http://127.0.0.1:{port}",
        )
        server.kill()
    assert done.returncode == 0, done.stderr
    assert "logging offline" in done.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
