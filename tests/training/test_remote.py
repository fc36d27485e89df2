"""Checkpoints behind training, and copied to another place."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from mmfusion.training import checkpoint, manifest, sharded
from mmfusion.training.checkpoint import AtomicCheckpointIO, read_checkpoint
from mmfusion.training.remote import RemoteCopy
from mmfusion.training.resume import by_step, why_incomplete
from mmfusion.training.run import RunDirectory
from mmfusion.training.sharded import Share
from tests.training.tiny import fit, losses, refused, write_recipe

STEPS = 12


def recipe(folder: Path, **saving: Any) -> Path:
    recorder = {"class_path": "tests.training.tiny.Recorder"}
    recorder["init_args"] = {"folder": str(folder / "packs")}  # type: ignore[assignment]
    return write_recipe(
        folder,
        trainer__max_steps=STEPS,
        trainer__callbacks=[recorder],
        checkpoint={"every_n_steps": 2, **saving},
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in by_step(folder)]


def test_what_is_written_behind_is_what_was_trained_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.zeros(3)
    held, save = threading.Event(), torch.save
    monkeypatch.setattr(checkpoint.torch, "save", lambda *a: (held.wait(30), save(*a)))
    files = AtomicCheckpointIO()
    files.behind = True
    files.save_checkpoint({"weights": weights}, tmp_path / "step-00000001.ckpt")
    assert files.busy
    weights += 1
    assert not list(tmp_path.iterdir()) or names(tmp_path) == []
    held.set()
    files.wait()
    assert read_checkpoint(tmp_path / "step-00000001.ckpt")["weights"].tolist() == [0.0] * 3
    assert not files.busy


def test_a_run_that_saves_behind_ends_with_the_same_checkpoint(tmp_path: Path) -> None:
    before, behind = (tmp_path / name for name in ("before", "behind"))
    for folder in (before, behind):
        folder.mkdir()
    plain = fit(recipe(before))
    other = fit(recipe(behind, behind=True))
    one, two = (read_checkpoint(by_step(run.checkpoints)[-1]) for run in (plain, other))
    assert one["global_step"] == two["global_step"] == STEPS
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0, atol=0)
    assert losses(other) == losses(plain)


def test_one_that_is_due_while_the_last_is_written_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, count = torch.save, iter(range(100))
    held = threading.Event()

    def slow(*args: Any) -> None:
        if next(count) == 0:
            assert held.wait(60)
        save(*args)

    class Release(threading.Thread):
        def run(self) -> None:
            csv = tmp_path / "run" / "metrics.csv"
            while not csv.exists() or max(losses(RunDirectory(csv.parent)), default=0) < 6:
                time.sleep(0.01)
            held.set()

    path = recipe(tmp_path, behind=True, keep_last=10)
    monkeypatch.setattr(checkpoint.torch, "save", slow)
    release = Release()
    release.start()
    run = fit(path)
    release.join()
    assert names(run.checkpoints)[0] == "step-00000002.ckpt"
    assert "step-00000004.ckpt" not in names(run.checkpoints)
    assert names(run.checkpoints)[-1] == f"step-{STEPS:08d}.ckpt"
    assert "step 4 is not saved" in (run.path / "attempts/0001/log.txt").read_text()


def test_a_disk_that_is_full_ends_the_run_by_name_behind_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = recipe(tmp_path, behind=True)
    monkeypatch.setattr(checkpoint.torch, "save", full)
    said = refused(capsys, path)
    assert "No space left on device" in said
    assert "step-00000002.ckpt" in said


def test_copies_are_gone_on_from_where_the_run_directory_is_lost(tmp_path: Path) -> None:
    remote = tmp_path / "far" / "mine"
    path = recipe(tmp_path, remote=f"file://{remote}", keep_last=3)
    run = fit(path)
    assert names(remote) == names(run.checkpoints) == [
        f"step-{step:08d}.ckpt" for step in (8, 10, 12)
    ]  # fmt: skip
    (remote / "step-00000012.ckpt").unlink()
    whole = losses(run)
    run.path.rename(tmp_path / "lost")
    again = fit(path)
    assert {step: loss for step, loss in whole.items() if step >= 10} == losses(again)


def test_training_does_not_wait_for_copies_but_its_end_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, reached = RemoteCopy._copy, []

    def slow(self: RemoteCopy, path: Path) -> None:
        csv = tmp_path / "run" / "metrics.csv"
        for _ in range(6000):
            if csv.exists() and max(losses(RunDirectory(csv.parent)), default=0) >= 7:
                break
            time.sleep(0.01)
        reached.append(max(losses(RunDirectory(csv.parent))))
        copy(self, path)

    monkeypatch.setattr(RemoteCopy, "_copy", slow)
    run = fit(recipe(tmp_path, remote=f"file://{tmp_path}/far"))
    assert reached[0] >= 7  # the first copy, of step 2, was held up
    assert names(tmp_path / "far") == names(run.checkpoints)
    assert all(why_incomplete(path) is None for path in by_step(tmp_path / "far"))


def test_an_object_store_is_such_a_place(tmp_path: Path) -> None:
    """One without folders or renaming in place, as s3 is."""
    path = recipe(tmp_path, remote="memory://bucket/runs/mine", keep_last=3)
    run = fit(path)
    whole = losses(run)
    found = fsspec.filesystem("memory").ls("/bucket/runs/mine", detail=False)
    assert {name.rpartition("/")[2] for name in found} == {"run.json", *names(run.checkpoints)}
    run.path.rename(tmp_path / "lost")
    fsspec.filesystem("memory").rm(f"/bucket/runs/mine/step-{STEPS:08d}.ckpt")
    assert losses(fit(path)) == {step: loss for step, loss in whole.items() if step >= 10}


def test_a_place_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "far").write_text("a file")
    run = fit(recipe(tmp_path, remote=f"file://{tmp_path}/far/mine"))
    assert names(run.checkpoints)[-1] == f"step-{STEPS:08d}.ckpt"
    assert "not copied to file://" in (run.path / "attempts/0001/log.txt").read_text()


def test_a_kind_of_place_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.remote is nowhere://x"):
        RemoteCopy("nowhere://x")


def test_a_damaged_copy_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remote = tmp_path / "far"
    path = recipe(tmp_path, remote=f"file://{remote}", keep_last=3)
    run = fit(path)
    newest = remote / "step-00000012.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    back = tmp_path / "back"
    found = RemoteCopy(f"file://{remote}").fetch_newest(back)
    assert found == back / "step-00000010.ckpt"
    assert "not resuming from step-00000012.ckpt" in caplog.text
    assert names(back) == [found.name]
    for copy in remote.iterdir():
        copy.write_bytes(b"torn")
    run.path.rename(tmp_path / "lost")
    with pytest.raises(ValueError, match="none of the 3 checkpoints in file://"):
        RemoteCopy(f"file://{remote}").fetch_newest(tmp_path / "nothing")
    assert names(tmp_path / "nothing") == []


def test_another_runs_copies_are_not_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where all trials of a sweep have one place."""
    path = recipe(tmp_path, remote=f"file://{tmp_path}/far")
    fit(path)
    other = (f"--run_dir={tmp_path}/other", "--data.seed=5")
    said = refused(capsys, path, *other)
    assert "holds checkpoints of another recipe" in said
    assert names(tmp_path / "other" / "checkpoints") == []
    assert not (tmp_path / "other" / "metrics.csv").exists()


def test_what_is_gone_on_from_stays_the_same_run(tmp_path: Path) -> None:
    path = recipe(tmp_path, remote=f"file://{tmp_path}/far")
    first = fit(path)
    (tmp_path / "far" / f"step-{STEPS:08d}.ckpt").unlink()
    shutil.move(first.path, tmp_path / "lost")
    second = fit(path, f"--run_dir={tmp_path}/elsewhere")
    assert second.id == RunDirectory(tmp_path / "lost").id
    assert min(losses(second)) == STEPS - 2


def test_two_runs_of_one_recipe_do_not_overwrite_each_others_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, remote=f"file://{tmp_path}/far", keep_last=3)
    first = fit(path)
    before = names(tmp_path / "far")
    said = refused(capsys, path, f"--run_dir={tmp_path}/other", "--resume=none")
    assert f"holds checkpoints of run {first.id}, and this is run" in said
    assert names(tmp_path / "far") == before == names(first.checkpoints)
    fit(path, "--resume=none")  # the run itself may start over
    assert names(tmp_path / "far") == names(first.checkpoints)


def test_of_two_starts_of_a_run_the_later_one_copies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, folder = AtomicCheckpointIO(), tmp_path / "here"
    for step in (2, 4):
        files.save_checkpoint({"weights": torch.rand(9)}, folder / f"step-{step:08d}.ckpt")
    one, two = by_step(folder)
    earlier, later = (RemoteCopy(f"file://{tmp_path}/far") for _ in range(2))
    earlier.claim("mine")
    earlier.take([one])
    later.claim("mine")
    later.take([one, two])
    earlier.take([one])  # would remove the other
    assert names(tmp_path / "far") == [one.name, two.name]
    assert "run mine writes there since, from another start" in caplog.text


def test_a_place_that_cannot_be_reached_at_the_start_is_taken_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "here" / "step-00000002.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.rand(9)}, file)
    (tmp_path / "far").write_text("a file")
    far = RemoteCopy(f"file://{tmp_path}/far/mine")
    far.claim("mine")
    assert "cannot be written so far" in caplog.text
    (tmp_path / "far").unlink()
    far.take([file])
    assert names(tmp_path / "far" / "mine") == [file.name]
    assert far.run_id() == "mine"


def test_a_step_of_a_run_before_is_replaced(tmp_path: Path) -> None:
    far = RemoteCopy(f"file://{tmp_path}/far")
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        files, file = AtomicCheckpointIO(), tmp_path / name / "step-00000002.ckpt"
        files.save_checkpoint({"weights": torch.rand(50_000)}, file)
        folder = file.with_suffix("")
        part = Share("row", 0, torch.rand(9))
        manifest.write(folder, [sharded.write(folder, 0, [part])], {"step": 2})
        far = RemoteCopy(f"file://{tmp_path}/far")  # of another start
        far.claim("mine")
        far.take([file, folder])
    for name in ("step-00000002.ckpt", "step-00000002/rank-00000.safetensors"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert manifest.verify(tmp_path / "far" / "step-00000002") is None
