"""``mmfusion launch --on local`` from a terminal: what it shows of a job, and what ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmfusion.cli import main
from mmfusion.training.run import RunDirectory
from tests.training import jobs
from tests.training.tiny import HERE, write_recipe

pytestmark = pytest.mark.slow


def launched(folder: Path, *options: str, **changes: Any) -> tuple[subprocess.Popen[str], Path]:
    """Followed, its output in the file."""
    recipe = write_recipe(folder, trainer__devices="auto", trainer__max_steps=3, **changes)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": jobs.ROOT, "MMFUSION_SITE": ""}
    output = folder / "output"
    with output.open("wb") as file:
        command = [sys.executable, "-m", "mmfusion", "launch", str(recipe), *options]
        return subprocess.Popen(command, env=env, text=True, stdout=file, stderr=file), output


def code_of(follows: subprocess.Popen[str], seconds: float = 200) -> int:
    try:
        return follows.wait(seconds)
    finally:
        follows.kill()


def test_a_job_is_followed_to_its_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    follows, output = launched(tmp_path, wandb="offline")
    code, run = code_of(follows), tmp_path / "run"
    said = output.read_text()
    assert code == 0, said
    lines = said.splitlines()
    number = lines[0].partition(" as ")[2].partition(",")[0]
    told = [line for line in lines if line.startswith(f"[local {number}: ")]
    assert told[0] == f"[local {number}: RUNNING]"
    assert f"[local {number}: RUNNING; run running, start 1]" in told
    assert told[-1] == f"[local {number}: COMPLETED; run finished, start 1]"
    assert [line for line in lines if line.startswith("what trains")], "of the log"
    wandb = f"offline (as asked); mmfusion sync {run} sends it"
    assert f"[W&B: {wandb}]" in lines
    assert lines[-1] == f"{run}: finished at step 3"
    assert (run / "launch/log.txt").read_text().splitlines()[-1] in said
    main(["runs", str(run)])
    assert capfd.readouterr().out.splitlines()[-1] == f"W&B: {wandb}"


def test_a_job_that_fails_ends_what_follows_it(tmp_path: Path) -> None:
    fails = {"class_path": f"{HERE}.Fails", "init_args": {"steps": [0]}}
    follows, output = launched(tmp_path, "--failures=1", trainer__callbacks=[fails])
    code, said = code_of(follows), output.read_text()
    assert code == 1, said
    assert "fails before step 0" in said
    assert "given up: 1 starts in a row" in said
    assert ": FAILED (code 3); run failed, start 1]" in said
    assert said.splitlines()[-1] == f"{tmp_path}/run: failed at step 0"


def test_leaving_does_not_stop_a_job(tmp_path: Path) -> None:
    follows, output = launched(tmp_path)
    deadline = time.monotonic() + 200  # against hanging
    while "RUNNING]" not in output.read_text():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)
    follows.send_signal(signal.SIGINT)
    assert code_of(follows, 60) == 0, output.read_text()
    run = RunDirectory(tmp_path / "run")
    assert output.read_text().endswith(f"{run.path} goes on; see mmfusion runs {run.path}\n")
    assert run.status() == {}, "it only starts"
    while run.status().get("state") != "finished":
        assert time.monotonic() < deadline + 100, (run.path / "launch/log.txt").read_text()
        time.sleep(0.5)
