"""What a run logs to: the CSV always, W&B and TensorBoard as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmfusion.training.loggers import MetricsCSV, read_metrics
from mmfusion.training.trackers import default_loggers
from mmfusion.training.wandb_run import RunWandb
from tests.training.tiny import fit, refused, write_recipe


def test_off_and_disabled_leave_only_the_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [type(x) for x in default_loggers(tmp_path, "r", wandb="off")] == [MetricsCSV]
    assert [type(x) for x in default_loggers(tmp_path, "r")] == [MetricsCSV, RunWandb]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [type(x) for x in default_loggers(tmp_path, "r")] == [MetricsCSV]
    with pytest.raises(ValueError, match="expected auto, online, offline or off"):
        default_loggers(tmp_path, "r", wandb="yes")  # type: ignore[arg-type]


@pytest.mark.slow
def test_tensorboard_is_one_line_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    recipe = write_recipe(tmp_path, tensorboard=True)
    fit(recipe, "--trainer.max_steps=4", "--model.schedule.warmup_steps=0")
    run = fit(
        recipe, "--trainer.max_steps=6", "--model.schedule.warmup_steps=0", "--allow_recipe_change"
    )
    read = event_accumulator.EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    shown = {event.step: event.value for event in read.Scalars("train/loss")}
    rows = read_metrics(run.path / "metrics.csv")
    assert shown == pytest.approx({int(r["trainer/global_step"]): r["train/loss"] for r in rows})
    assert sorted(shown) == [*range(6)]


def test_tensorboard_without_its_package_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmfusion.training.trackers.find_spec", lambda name: None)
    error = refused(capsys, write_recipe(tmp_path), "--tensorboard=true")
    assert "pip install tensorboard" in error


@pytest.mark.slow
def test_loggers_of_a_recipe_come_beside_the_csv(tmp_path: Path) -> None:
    theirs = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "theirs")}}
    run = fit(
        write_recipe(tmp_path, trainer__logger=theirs),
        "--trainer.max_steps=2", "--model.schedule.warmup_steps=0",
    )  # fmt: skip
    assert len(read_metrics(run.path / "metrics.csv")) == 2
    assert list((tmp_path / "theirs").rglob("metrics.csv"))
