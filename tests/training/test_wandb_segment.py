"""W&B works without network, inside the run directory, under one id; with a server that is there,
that is not, and that goes away. The client is the real one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfusion.training.loggers import read_metrics
from mmfusion.training.run import RunDirectory
from mmfusion.training.wandb_segment import where
from tests.training import jobs
from tests.training.tiny import losses, write_recipe
from tests.training.wandb_process import (
    Logging,
    environment,
    log_steps,
    mmfusion,
    points,
    records,
    steps,
)
from tests.training.wandb_server import KEY, serving

pytestmark = pytest.mark.slow


def offline_segments(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*-fixedid"))


def logged(segment: Path) -> list[tuple[float, float, float]]:
    return points([r["history"]["item"] for r in records(segment) if "history" in r])


def test_offline_starts_are_segments_of_one_run_inside_its_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    log_steps(run, end="kill")  # 2 seconds after the last point
    log_steps(run, attempt=2, first=3)
    first, second = offline_segments(run)
    assert logged(first) == steps(1, 1, 2, 3)
    assert logged(second) == steps(2, 3, 4, 5)
    assert not list((tmp_path / "home").rglob("*wandb*"))
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"SECRETSECRET" not in written


def test_a_killed_run_and_the_start_that_goes_on_are_one_there_too(tmp_path: Path) -> None:
    """The command itself, in steps of a tenth of a second: what the last two seconds had is lost
    there, and in ``metrics.csv``.
    """
    recipe = write_recipe(
        tmp_path,
        trainer__max_steps=60,
        trainer__callbacks=[{"class_path": "tests.training.tiny.SlowSteps"}],
        checkpoint__every_n_steps=10,
        wandb="offline",
    )
    run, log = RunDirectory(tmp_path / "run"), tmp_path / "log.txt"
    process = jobs.start(["fit", "-c", str(recipe)], log)
    csv = run.path / "metrics.csv"
    while process.is_alive() and not (csv.exists() and max(losses(run), default=0) >= 45):
        time.sleep(0.05)
    jobs.kill(process)
    assert jobs.run(["fit", "-c", str(recipe)], log) == 0, log.read_text()
    first, second = sorted((run.path / "wandb").glob(f"offline-run-*-{run.id}"))
    rows = points(read_metrics(csv, all_attempts=True))
    before, after = (sorted(row for row in rows if row[0] == attempt) for attempt in (1, 2))
    found = logged(first)
    assert found == before[: len(found)]
    assert len(found) >= len(before) - 30
    assert logged(second) == after
    assert {step for _, step, _ in found + after} == {step for _, step, _ in rows}
    assert len({step for _, step, _ in rows}) == 60


def test_offline_segments_are_joined_by_wandb_sync(tmp_path: Path) -> None:
    run = tmp_path / "run"
    log_steps(run, end="kill")
    log_steps(run, attempt=2, first=3)
    with serving(tmp_path) as server:
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *map(str, offline_segments(run))],
            env=environment(tmp_path, **server.environment), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = server.run("fixedid")
    assert points(found["history"]) == steps(1, 1, 2, 3) + steps(2, 3, 4, 5)
    assert [row["_step"] for row in found["history"]] == [*range(6)]


def test_a_start_with_a_server_sends_what_starts_without_one_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    log_steps(run, end="kill")
    assert str(where(run)).endswith(f"; mmfusion sync {run} sends it")
    with serving(tmp_path) as server:
        said = log_steps(run, server.environment, attempt=2, first=3)
        assert "online" in said
        address = str(where(run)).removeprefix("online (").removesuffix(")")
        assert address.startswith(server.environment["WANDB_BASE_URL"])
        assert address.endswith("/mmfusion/runs/fixedid")
        found = server.run("fixedid")
    assert points(found["history"]) == steps(1, 1, 2, 3) + steps(2, 3, 4, 5)
    assert [row["_step"] for row in found["history"]] == [*range(6)]
    assert found["complete"] is True
    assert "SECRETSECRET" not in found["bucket"]["config"]


def test_what_a_killed_start_had_not_sent_is_sent_by_the_next(tmp_path: Path) -> None:
    """The client sends every 15 seconds: nothing was sent."""
    run = tmp_path / "run"
    with serving(tmp_path) as server:
        log_steps(run, server.environment, count=8, end="kill")
        assert points(server.run("fixedid")["history"]) == []
        log_steps(run, server.environment, attempt=2, first=7)
        found = server.run("fixedid")
    assert points(found["history"]) == steps(1, *range(1, 9)) + steps(2, 7, 8, 9)
    assert [row["_step"] for row in found["history"]] == [*range(11)]


def test_what_a_killed_start_had_sent_is_not_sent_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with serving(tmp_path) as server:
        logging = Logging(run, server.environment, count=1000, pause=0.25, end="kill")
        logging.started()
        while not (sent := points(server.run("fixedid")["history"])):
            time.sleep(0.1)
        time.sleep(3)
        logging.process.kill()
        logging.ended()
        rows = points(read_metrics(run / "metrics.csv"))
        assert 0 < len(sent) < len(rows)
        log_steps(run, server.environment, attempt=2, first=7)
        found = server.run("fixedid")
    assert points(found["history"]) == rows + steps(2, 7, 8, 9)
    assert [row["_step"] for row in found["history"]] == [*range(len(rows) + 3)]


def test_a_server_that_is_down_for_a_minute_costs_no_point_and_no_time(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        logging = Logging(tmp_path / "run", server.environment, count=340, pause=0.25)
        logging.started()
        time.sleep(3)
        server.go_down(60)
        said = logging.ended(180)
        assert float(said.partition("logged in ")[2].split()[0]) < 100  # 85 of them sleep
        found = server.run("fixedid")
    assert points(found["history"]) == steps(1, *range(1, 341))
    assert [row["_step"] for row in found["history"]] == [*range(340)]


def test_a_server_that_never_comes_back_does_not_hold_the_end(tmp_path: Path) -> None:
    """What it lacks is sent by `mmfusion sync`."""
    run = tmp_path / "run"
    with serving(tmp_path) as server:
        logging = Logging(run, server.environment, count=8, pause=0.5)
        logging.started()
        server.go_down(3600)
        said = logging.ended()
        assert float(said.partition("finished in ")[2].split()[0]) < 75
        server.go_down(0)
        assert points(server.run("fixedid")["history"]) == []
        (run / "run.json").write_text('{"id": "fixedid"}')
        assert "8 points" in mmfusion(tmp_path, server.environment, "sync", str(run))
        assert points(server.run("fixedid")["history"]) == steps(1, *range(1, 9))


def test_a_service_that_is_killed_is_started_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    logging = Logging(run, count=20, pause=0.5)
    logging.started()
    time.sleep(3)
    number = logging.process.pid
    children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    (service,) = [c for c in children if "wandb" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(int(service), signal.SIGKILL)
    assert "W&B failed" in logging.ended()
    first, second = offline_segments(run)
    found = [step for _, step, _ in logged(first) + logged(second)]
    assert found[-1] == 20
    assert len(set(range(1, 21)) - set(found)) <= 2  # of the second before; the CSV has all


@pytest.mark.parametrize("kind", ["refuses", "hangs", "wrong key", "is not there"])
def test_a_server_that_does_not_serve_costs_seconds(tmp_path: Path, kind: str) -> None:
    with serving(tmp_path, *(["hang"] if kind == "hangs" else [])) as server:
        if kind == "refuses":
            server.go_down(3600)
        env = server.environment
        if kind == "wrong key":
            env["WANDB_API_KEY"] = "w" * 40
        if kind == "is not there":
            env["WANDB_BASE_URL"] = "http://127.0.0.1:9"
        logging = Logging(tmp_path / "run", env, choice="online")
        said = logging.ended(90)
        assert float(said.partition("began in ")[2].split()[0]) < 40
    assert "W&B was asked to be online, but is offline" in said
    (segment,) = offline_segments(tmp_path / "run")
    assert logged(segment) == steps(1, 1, 2, 3)
    for key in (KEY, "w" * 40):
        assert key not in said
        for path in (tmp_path / "run").rglob("*"):
            assert not path.is_file() or key.encode() not in path.read_bytes()


def test_the_server_of_wandb_login_is_known_in_the_second_run_of_a_process(
    tmp_path: Path,
) -> None:
    code = """
import sys
from mmfusion.training.wandb_segment import server
from mmfusion.training.trackers import default_loggers
for number in "12":
    print(server())
    for logger in default_loggers(f"{sys.argv[1]}/run{number}", "id"):
        logger.log_metrics({"a": 1.0}, step=1)
        logger.finalize("success")
"""
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(tmp_path), text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.stdout.split() == ["http://127.0.0.1:9"] * 2, done.stderr
