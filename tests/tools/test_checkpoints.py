"""``mmfusion checkpoints``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mmfusion.cli import main
from mmfusion.training import manifest
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.resume import by_step, find
from mmfusion.training.run import RunDirectory
from tests.training.tiny import fit, write_recipe, write_rest


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    recipe = write_recipe(
        tmp_path, trainer__max_steps=8, checkpoint={"every_n_steps": 2, "keep_last": 4}
    )
    return fit(recipe)


def names(run: RunDirectory) -> list[str]:
    return [path.name for path in by_step(run.checkpoints)]


def test_they_are_listed_and_verified(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    torn = by_step(run.checkpoints)[2]
    torn.write_bytes(torn.read_bytes()[:-50])
    capsys.readouterr()
    main(["checkpoints", str(run.path)])
    lines = capsys.readouterr().out.splitlines()
    assert sum("step-0000000" in line for line in lines) == 4
    assert [line for line in lines if "latest" in line] == [
        line for line in lines if "step-00000008" in line
    ]
    with pytest.raises(SystemExit) as ended:
        main(["checkpoints", str(run.path), "--verify"])
    assert ended.value.code == 1
    said = {word: line for line in capsys.readouterr().out.splitlines() for word in line.split()}
    assert "whole" in said["step-00000008.ckpt"]
    assert "cannot be read" in said["step-00000006.ckpt"]


def test_what_their_manifests_say_is_shown(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    one = by_step(run.checkpoints)[0]
    torch.save(read_checkpoint(one), one)  # as before there were manifests
    about = manifest.read(by_step(run.checkpoints)[-1])
    assert about is not None
    capsys.readouterr()
    main(["checkpoints", str(run.path)])
    said = capsys.readouterr().out
    lines = {word: line for line in said.splitlines() for word in line.split()}
    assert "without a manifest" in lines["step-00000002.ckpt"]
    assert "single_device" in lines["step-00000004.ckpt"]
    assert f"{about.about['weights']:,}" in lines["step-00000004.ckpt"]
    assert f"run: {run.id}\n" in said
    assert f"recipe: {about.about['recipe']}\n" in said
    assert f"train {about.about['data']['train']}" in said
    assert f"llm {about.about['frozen']['llm']}" in said
    assert f"torch {about.about['versions']['torch']}" in said


def test_a_checkpoint_that_is_a_folder_is_shown_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for step in (2, 4):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "rank0").write_bytes(bytes(1 << 20))
        files = ["rank0", write_rest(folder, step)]
        manifest.write(folder, files, {"step": step, "strategy": "fsdp2[/]", "world_size": 8})
    (folder / "rank0").write_bytes(bytes(9))
    with pytest.raises(SystemExit):
        main(["checkpoints", str(tmp_path), "--verify"])
    lines = {word: line for line in capsys.readouterr().out.splitlines() for word in line.split()}
    assert all(one in lines["step-00000002"] for one in ("1.0", "8", "fsdp2", "whole"))
    assert "rank0 has 9 bytes" in lines["step-00000004"]
    main(["checkpoints", str(tmp_path), "--keep=1"])
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]


def test_only_whole_ones_are_kept(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    torn = by_step(run.checkpoints)[-1]
    torn.write_bytes(torn.read_bytes()[:-50])
    main(["checkpoints", str(run.path), "--keep=2"])
    assert names(run) == ["step-00000004.ckpt", "step-00000006.ckpt"]
    assert (run.checkpoints / "latest").read_text() == "step-00000006.ckpt\n"
    copies = run.checkpoints.parent / "elsewhere"
    shutil.copytree(run.checkpoints, copies)
    main(["checkpoints", str(copies), "--keep=1", "--verify"])
    assert [path.name for path in by_step(copies)] == ["step-00000006.ckpt"]
    main(["checkpoints", str(run.path), "--keep=0"])
    assert names(run) == ["step-00000006.ckpt"]
    assert find(run.path) == run.checkpoints / "step-00000006.ckpt"


def test_a_run_without_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoints", str(tmp_path)])
    assert "has no checkpoint" in capsys.readouterr().err
