"""What a checkpoint says of itself, and checkpoints that are folders."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfusion.training import manifest, sharded
from mmfusion.training.callbacks.checkpointing import RunCheckpoint
from mmfusion.training.checkpoint import AtomicCheckpointIO, read_checkpoint
from mmfusion.training.remote import RemoteCopy
from mmfusion.training.resume import (
    by_step,
    complete_checkpoint,
    find,
    remove,
    unfinished,
    why_incomplete,
)
from mmfusion.training.run import RunDirectory, differences, fingerprint, versions
from tests.training.tiny import fit, losses, write_recipe, write_rest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("run")
    return fit(write_recipe(folder, trainer__max_steps=4, checkpoint={"every_n_steps": 2}))


def folder_of(run: Path, step: int, **about: Any) -> Path:
    """A checkpoint of three files."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes(range(200)))
    (folder / "optimizer" / ".metadata").write_bytes(b"state")
    files = ["weights.safetensors", "optimizer/.metadata", write_rest(folder, step)]
    manifest.write(folder, files, {"step": step, **about})
    return folder


def test_a_checkpoint_says_how_it_came_about(run: RunDirectory) -> None:
    path = by_step(run.checkpoints)[-1]
    made = manifest.read(path)
    assert made is not None
    about = made.about
    assert about["step"] == 4
    assert about["run"] == run.id
    assert (about["world_size"], about["strategy"]) == (1, "single_device")
    assert about["versions"] == versions()
    assert {"torch", "lightning", "transformers", "peft", "deepspeed", "mmfusion"} <= set(
        about["versions"]
    )
    stream = read_checkpoint(path)["callbacks"]["mmfusion.stream"]
    assert about["data"] == {s["name"]: s["dataset_id"] for s in stream["spec"]["sources"]}
    assert set(about["frozen"]) == {"llm", "encoders.image"}
    kept = read_checkpoint(path)["state_dict"].values()
    assert about["weights"] == sum(tensor.numel() for tensor in kept)
    with zipfile.ZipFile(path) as archive:
        members = set(archive.namelist()) - {"archive/manifest.json"}
        assert set(made.files) == members
        for name in members:
            content = archive.read(name)
            assert made.files[name].bytes == len(content)
            assert made.files[name].sha256 == hashlib.sha256(content).hexdigest()


def test_a_recipes_fingerprint_is_of_what_changes_the_training() -> None:
    recipe = {"trainer": {"max_steps": 3, "devices": 1}, "data": {"seed": 1, "epochs": None}}
    free = {"trainer": {"max_steps": 3, "devices": 8}, "data": {"seed": 1}, "wandb": "off"}
    other = {"trainer": {"max_steps": 3, "devices": 1}, "data": {"seed": 2}}
    assert not [*differences(recipe, free)]
    assert fingerprint(recipe) == fingerprint(free)
    assert fingerprint(recipe) != fingerprint(other)


def rewritten(path: Path, change: str) -> None:
    """The same archive with one byte of a tensor changed, its own checksums right."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name.endswith("data/0"):
                content = bytes([content[0] ^ 1]) + content[1:]
            if name.endswith("manifest.json") and change == "without":
                continue
            archive.writestr(name, content)
        if change == "more":
            archive.writestr("archive/data/more", b"x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("byte", "checksum of archive/data/0 differs from its manifest's"),
        ("more", "holds archive/data/more, which its manifest does not name"),
        ("without", None),
    ],
)
def test_a_file_that_was_changed_with_its_checksums_is_noticed(
    tmp_path: Path, change: str, said: str | None
) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(10)}, path)
    assert manifest.verify(path) is None
    rewritten(path, change)
    assert manifest.verify(path) == said


def test_checkpoints_from_before_there_were_manifests_are_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(tmp_path, trainer__max_steps=4, checkpoint={"every_n_steps": 2})
    run = fit(recipe)
    whole, old = losses(run), by_step(run.checkpoints)[0]
    by_step(run.checkpoints)[-1].unlink()
    torch.save(read_checkpoint(old), old)
    assert manifest.read(old) is None
    assert why_incomplete(old) is None
    assert losses(fit(recipe), attempt=2) == {step: whole[step] for step in (2, 3)}


def without_a_file(folder: Path) -> None:
    (folder / "optimizer" / ".metadata").unlink()


def cut(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(bytes(199))


def changed(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(bytes(200))


def of_another_save(folder: Path) -> None:
    (folder / "rank3.safetensors").write_bytes(b"x")


def climbing(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("weights.s", "../../weights.s"))


def of_another_step(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"step": 20', '"step": 21'))


def unreadable(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


DAMAGES = {
    without_a_file: "optimizer/.metadata is not there",
    cut: "weights.safetensors has 199 bytes, its manifest says 200 bytes",
    changed: "checksum of weights.safetensors differs",
    of_another_save: "holds rank3.safetensors, which its manifest does not name",
    climbing: "it names '../../weights.safetensors'",
    of_another_step: "holds step 21",
    unreadable: "has a manifest.json that cannot be used",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_passed_over_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    good, bad = folder_of(tmp_path, 10), folder_of(tmp_path, 20)
    assert find(tmp_path) == bad
    damage(bad)
    assert DAMAGES[damage] in str(why_incomplete(bad))
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path) == good
    assert "not resuming from step-00000020: " in caplog.text
    with pytest.raises(ValueError, match="the checkpoint "):
        complete_checkpoint(bad, "--resume")


def test_a_folder_without_a_manifest_was_not_finished(tmp_path: Path) -> None:
    good, torn = folder_of(tmp_path, 10), folder_of(tmp_path, 20)
    (torn / "manifest.json").unlink()
    assert "it was not finished" in str(why_incomplete(torn))
    assert by_step(tmp_path / "checkpoints") == [good]
    assert [*unfinished(tmp_path / "checkpoints")] == [torn]
    remove(good)
    assert find(tmp_path) is None, "a kill in the first save begins at step 0, it is no error"
    with RunDirectory(tmp_path).open({}):
        assert not [*(tmp_path / "checkpoints").iterdir()]


def test_folders_and_files_are_of_one_order_and_kept_alike(
    tmp_path: Path, run: RunDirectory
) -> None:
    one, two = folder_of(tmp_path, 1), folder_of(tmp_path, 3)
    file = tmp_path / "checkpoints" / "step-00000002.ckpt"
    file.write_bytes(by_step(run.checkpoints)[0].read_bytes())
    assert by_step(tmp_path / "checkpoints") == [one, file, two]
    assert complete_checkpoint(two, "--resume") == two
    assert complete_checkpoint(tmp_path, "--resume") == two
    directory = RunDirectory(tmp_path)
    with directory.open({}) as attempt:
        directory.set_aside(2, attempt)
    assert find(tmp_path) == file
    assert (attempt.path / "earlier_checkpoints" / two.name / "manifest.json").is_file()


def test_retention_removes_folders_too(tmp_path: Path) -> None:
    keeper = RunCheckpoint(keep_last=2, keep_every_n_steps=2)
    keeper.folder = tmp_path / "checkpoints"
    folders = [folder_of(tmp_path, step) for step in (1, 2, 3, 4, 5)]
    keeper._published(folders[-1])
    assert by_step(keeper.folder) == [folders[1], *folders[3:]]
    assert {path.name for path in keeper.folder.iterdir()} == {
        "latest", "step-00000002", "step-00000004", "step-00000005"
    }  # fmt: skip
    assert (keeper.folder / "latest").read_text() == "step-00000005\n"


def test_folders_are_copied_to_another_place_and_back(tmp_path: Path) -> None:
    folders = [folder_of(tmp_path / "here", step) for step in (1, 2)]
    there = RemoteCopy(f"file://{tmp_path}/far")
    there.claim("mine")
    there.take(folders)
    back = tmp_path / "back" / "checkpoints"
    found = there.fetch_newest(back)
    assert found == back / "step-00000002"
    assert why_incomplete(found) is None
    (tmp_path / "far" / "step-00000002" / "manifest.json").unlink()  # that copy was cut short
    assert there.fetch_newest(tmp_path / "again") == tmp_path / "again" / "step-00000001"
    (tmp_path / "far" / ".step-00000001.ckpt.part").write_bytes(b"x")
    (tmp_path / "far" / "step-00000000" / "rank0").mkdir(parents=True)
    (tmp_path / "far" / "notes.txt").write_text("not ours")
    there.take(folders[1:])
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == [
        "notes.txt", "run.json", "step-00000002"
    ]  # fmt: skip
    assert why_incomplete(tmp_path / "far" / "step-00000002") is None


def test_ranks_may_make_the_entries_of_what_they_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000005"
    folder.mkdir()
    (folder / "rank0").write_bytes(b"zero")
    manifest.write(folder, {"rank0": manifest.entry(folder / "rank0")}, {"step": 5})
    content = json.loads((folder / "manifest.json").read_text())
    assert content["files"] == {
        "rank0": {"bytes": 4, "sha256": hashlib.sha256(b"zero").hexdigest()}
    }
    assert manifest.verify(folder) is None


def test_a_rank_whose_file_and_line_are_gone_is_missed(tmp_path: Path) -> None:
    """The manifest that is left agrees with the files that are."""
    folder = tmp_path / "step-00000003"
    parts = [sharded.Share("row", start, torch.arange(5.0)) for start in (0, 5)]
    files = [sharded.write(folder, rank, [part]) for rank, part in enumerate(parts)]
    files.append(write_rest(folder, 3, {"row": ["float32", 10]}))
    manifest.write(folder, files, {"step": 3})
    assert why_incomplete(folder) is None
    (folder / files.pop(1)).unlink()
    manifest.write(folder, files, {"step": 3})
    assert "has 5 of the 10 numbers of row" in str(why_incomplete(folder))
    files.append(write_rest(folder, 2))  # of another step than the manifest says
    manifest.write(folder, files, {"step": 3})
    assert why_incomplete(folder) == "holds step 2"
    torch.save({"x": Path}, folder / files[-1])
    manifest.write(folder, files, {"step": 3})
    assert "only their code could read" in str(why_incomplete(folder))
