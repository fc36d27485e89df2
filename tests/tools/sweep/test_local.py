"""A sweep on this machine: real runs one after another, cut off and gone on with; W&B's agent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mmfusion.cli import main
from mmfusion.training.loggers import read_metrics
from mmfusion.training.run import RunDirectory
from tests.training.tiny import HERE, write_recipe
from tests.training.wandb_process import environment
from tests.training.wandb_server import serving

pytestmark = pytest.mark.slow
PARAMETERS = {
    "trainer.max_steps": {"value": 2},
    "model.tuning.llm.init_args.lr": {"values": [1e-2, 1e-5]},
}


def write_space(folder: Path, **changes: object) -> Path:
    content = {"method": "grid", "metric": {"name": "train/loss"}, "parameters": PARAMETERS}
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return file


def sweep(folder: Path, *more: str) -> list[str]:
    recipes = sorted(folder.glob("recipe*.yaml")) or [write_recipe(folder, run_dir=None)]
    space = folder / "space.yaml"
    words = [str(recipes[0]), str(space), f"--run_dir={folder}/sweep"]
    return ["sweep", *words, "--model.schedule.warmup_steps=0", *more]


def shown(text: str) -> list[list[str]]:
    """Rows of the table."""
    rows = re.findall(r"^│(.*)│$", text, re.M)
    return [[cell.strip() for cell in row.split("│")] for row in rows]


def test_a_sweep_runs_each_trial_and_shows_the_best_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    write_space(tmp_path, command=["mmfusion", "fit", "${args}"])
    main(sweep(tmp_path))
    text = capsys.readouterr().out
    assert "command are for W&B's agents" in text
    rows = shown(text)
    assert len(rows) == 2
    found = {}
    for row in rows:
        run = RunDirectory(tmp_path / "sweep" / row[0])
        last = read_metrics(run.path / "metrics.csv")[-1]["train/loss"]
        assert row[1:3] == [f"{last:.6g}", "finished"]
        recipe = yaml.safe_load(run.config.read_text())
        assert recipe["trainer"]["max_steps"] == int(row[3])
        assert recipe["model"]["tuning"]["llm"]["init_args"]["lr"] == float(row[4])
        found[row[0]] = (int(row[3]), float(row[4]))
    assert found == {"trial-0001": (2, 1e-2), "trial-0002": (2, 1e-5)}
    losses = [float(row[1]) for row in rows]
    assert losses == sorted(losses)
    main(sweep(tmp_path))  # nothing is left to do
    again = capsys.readouterr().out
    assert shown(again) == rows
    assert all(len(RunDirectory(tmp_path / "sweep" / name).attempts()) == 1 for name in found)
    write_space(tmp_path, parameters={**PARAMETERS, "data.seed": {"value": 1}})
    with pytest.raises(SystemExit):
        main(sweep(tmp_path))
    assert "is another sweep: trial 1 was" in capsys.readouterr().err


def test_a_sweep_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    slow = {"class_path": f"{HERE}.SlowSteps"}
    write_recipe(tmp_path, run_dir=None, trainer__callbacks=[slow], trainer__max_steps=40)
    write_space(tmp_path, parameters={"data.seed": {"values": [1, 2]}})
    command = [sys.executable, "-m", "mmfusion", *sweep(tmp_path)]
    first = RunDirectory(tmp_path / "sweep" / "trial-0001")
    csv = first.path / "metrics.csv"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 600
        while not csv.is_file() or len(read_metrics(csv)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 75
        assert process.stdout is not None
        assert "the same line goes on" in process.stdout.read()
    assert first.status()["state"] == "preempted"
    assert not (tmp_path / "sweep" / "trial-0002").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert [row["trainer/global_step"] for row in read_metrics(csv)] == [*range(40)]
    assert len(first.attempts()) == 2
    assert RunDirectory(tmp_path / "sweep" / "trial-0002").status()["state"] == "finished"


def test_a_trial_that_fails_does_not_end_the_sweep_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(tmp_path, run_dir=None, trainer__max_steps=2)
    write_space(tmp_path, parameters={"data.pack_tokens": {"values": [-1, 64]}})
    with pytest.raises(SystemExit) as stop:
        main(sweep(tmp_path))
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "1 of 2 trials have not finished: trial-0001 (failed)" in said.err
    assert "pack_tokens" in said.out
    assert RunDirectory(tmp_path / "sweep" / "trial-0002").status()["state"] == "finished"


def test_w_and_bs_agent_runs_trials_each_in_its_own_directory(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run_dir=None, wandb="auto")
    fit = [sys.executable, "-m", "mmfusion", "fit", "-c", str(recipe), "${args}"]
    fixed = [f"--run_dir={tmp_path}/sweep", "--model.schedule.warmup_steps=0"]
    space = write_space(tmp_path, command=[*fit, *fixed], project="mmfusion")
    with serving(tmp_path) as server:
        env = environment(tmp_path, **server.environment)
        wandb = [sys.executable, "-m", "wandb"]
        done = subprocess.run(
            [*wandb, "sweep", str(space)], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert "sweep0" in done.stderr + done.stdout, done.stderr
        done = subprocess.run(
            [*wandb, "agent", "us/mmfusion/sweep0"], env=env, cwd=tmp_path, text=True,
            capture_output=True, timeout=800,
        )  # fmt: skip
        state = server.state()
    assert not state["unknown"], done.stderr
    given = state["sweeps"]["sweep0"]["given"]
    assert len(given) == 2
    for name, values in given.items():
        run = RunDirectory(tmp_path / "sweep" / f"sweep0-{name}")
        assert run.id == name
        assert run.status()["state"] == "finished", done.stderr
        recipe = yaml.safe_load(run.config.read_text())
        rate = recipe["model"]["tuning"]["llm"]["init_args"]["lr"]
        assert rate == values["model.tuning.llm.init_args.lr"]
        assert state["runs"][name]["sweep"] == "sweep0"
        assert len(state["runs"][name]["history"]) >= values["trainer.max_steps"]
    assert os.listdir(tmp_path / "sweep")
