import json
import logging
import multiprocessing
import re

import pytest
import yaml

from mmfusion.training.checkpoint import FOLDER
from mmfusion.training.run import RunDirectory, differences

RECIPE = {"trainer": {"max_steps": 10, "devices": 1}, "data": {"seed": 0, "num_workers": 1}}


def with_checkpoint(run, *steps):
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (run.checkpoints / f"step-{step:08d}.ckpt").write_bytes(b"x")
    return run


def status(run):
    return {key: run.status()[key] for key in ("state", "step", "attempt", "reason")}


def test_the_id_is_the_same_in_every_attempt(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.open(RECIPE) as first:
        identity = run.id
    with run.open(RECIPE) as second:
        assert (first.number, second.number) == (1, 2)
        assert run.id == identity
    assert yaml.safe_load(run.config.read_text()) == {"run_dir": str(run.path), **RECIPE}
    assert json.loads(run.identity.read_text())["versions"]["torch"]


def test_status_follows_the_attempt(tmp_path):
    run = RunDirectory(tmp_path)
    with run.open(RECIPE) as attempt:
        assert status(run) == {"state": "running", "step": 0, "attempt": 1, "reason": ""}
        attempt.progress(3, every_seconds=0)
        assert status(run)["step"] == 3
    assert status(run)["state"] == "finished"


def test_an_error_is_the_reason_and_in_the_log(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="broken"), run.open(RECIPE) as attempt:
        raise ValueError("broken")
    assert status(run)["state"] == "failed"
    assert status(run)["reason"] == "ValueError: broken"
    assert "Traceback" in (attempt.path / "log.txt").read_text()


def test_secrets_of_the_environment_are_in_no_file_of_an_attempt(tmp_path, monkeypatch):
    key = "k" * 20
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr("sys.argv", ["mmfusion", "fit", f"--data.x={key}"])
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ValueError, match=key), run.open(RECIPE):  # noqa: PT012
        logging.getLogger("mmfusion").warning("nothing in %s", key)
        raise ValueError(f"no shard matches {key}/x-*.tar")
    assert status(run)["reason"] == "ValueError: no shard matches (hidden)/x-*.tar"
    log = (run.path / "attempts/0001/log.txt").read_text()
    assert "nothing in (hidden)" in log
    assert "ValueError: no shard matches (hidden)/x-*.tar" in log
    for path in run.path.rglob("*"):
        assert not path.is_file() or key not in path.read_text()


def test_ctrl_c_is_an_interruption(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.open(RECIPE):
        raise KeyboardInterrupt
    assert status(run)["state"] == "interrupted"


def test_a_changed_recipe_is_refused_with_the_keys(tmp_path):
    run = with_checkpoint(RunDirectory(tmp_path), 1)
    with run.open(RECIPE):
        pass
    changed = {"trainer": {"max_steps": 20, "devices": 1}, "data": {"seed": 1, "num_workers": 1}}
    with pytest.raises(ValueError, match=r"(?s)data.seed: 0 -> 1.*trainer.max_steps: 10 -> 20"):
        run.check_recipe(changed)
    run.check_recipe(changed, allow_change=True)


def test_machine_and_logging_may_change(tmp_path):
    run = with_checkpoint(RunDirectory(tmp_path), 1)
    with run.open(RECIPE):
        pass
    data = {"seed": 0, "num_workers": 4, "val_limit": 5, "val_sources": {"v": {"shards": "x"}}}
    run.check_recipe({"trainer": {"max_steps": 10, "devices": 8}, "data": data})


@pytest.mark.parametrize(
    ("section", "key"),
    [("data", "packs_per_micro_batch"), ("trainer", "plugins"), ("trainer", "callbacks")],
)
def test_what_may_change_losses_may_not_change(tmp_path, section, key):
    """Dropout masks differ with the micro-batch; plugins and callbacks may do anything."""
    run = with_checkpoint(RunDirectory(tmp_path), 1)
    with run.open(RECIPE):
        pass
    with pytest.raises(ValueError, match=f"{section}.{key}"):
        run.check_recipe({**RECIPE, section: {**RECIPE[section], key: 2}})


def test_a_recipe_with_a_token_is_refused_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "abcdefgh12345")
    secret = {"model": {"token": "x", "path": "hf_" + "a1" * 15, "note": "is abcdefgh12345"}}
    with pytest.raises(ValueError, match=r"model.token, model.path, model.note: a key, token"):
        RunDirectory(tmp_path / "run").open({**RECIPE, **secret})
    assert not (tmp_path / "run").exists()


def test_damaged_files_of_a_run_are_named_with_what_to_do(tmp_path):
    run = with_checkpoint(RunDirectory(tmp_path), 1)
    with run.open(RECIPE):
        pass
    run.status_file.write_text('{"state": "fin')
    assert run.status() == {}
    for text in ('{"id', "{}", "[]", '{"id": null}', '{"id": {"a": 1}}', '{"id": "../../x"}'):
        run.identity.write_text(text)
        with pytest.raises(ValueError, match=r"run.json is damaged .* remove the file to go on"):
            _ = run.id
    for text in ("a: [1", "", "- 1"):
        run.config.write_text(text)
        with pytest.raises(ValueError, match=r"(?s)config.yaml is missing or.*--allow_recipe_ch"):
            run.check_recipe(RECIPE)
        run.check_recipe(RECIPE, allow_change=True)
    run.config.unlink()
    with pytest.raises(ValueError, match=r"config.yaml is missing or damaged"):
        run.check_recipe(RECIPE)


def test_before_the_first_checkpoint_any_recipe_may_start(tmp_path):
    run = RunDirectory(tmp_path)
    with run.open(RECIPE):
        pass
    run.check_recipe({"trainer": {"max_steps": 99}})


def test_checkpoints_beyond_the_start_are_set_aside_not_mixed(tmp_path):
    run = with_checkpoint(RunDirectory(tmp_path), 2, 4, 6)
    with run.open(RECIPE) as attempt:
        (run.checkpoints / "latest").write_text("step-00000006.ckpt\n")
        run.set_aside(2, attempt)
    there = sorted(path.name for path in run.checkpoints.iterdir())
    assert there == ["latest", "step-00000002.ckpt"]
    assert (run.checkpoints / "latest").read_text() == "step-00000002.ckpt\n"
    aside = attempt.path / "earlier_checkpoints"
    assert sorted(p.name for p in aside.iterdir()) == ["step-00000004.ckpt", "step-00000006.ckpt"]


def open_elsewhere(path, answer):
    try:
        RunDirectory(path).open(RECIPE)
    except ValueError as error:
        answer.put(str(error))


def test_two_processes_cannot_write_one_run(tmp_path):
    with RunDirectory(tmp_path).open(RECIPE):
        context = multiprocessing.get_context("fork")  # at once; record locks are not inherited
        answer = context.SimpleQueue()
        process = context.Process(target=open_elsewhere, args=(tmp_path, answer))
        process.start()
        process.join()
        assert not answer.empty()
        assert re.search("another process is writing .*, at step 0 at 20..-.*; stop", answer.get())


def test_torn_files_of_a_killed_save_are_removed(tmp_path):
    run = RunDirectory(tmp_path)
    torn = tmp_path / FOLDER / ".step-00000002.ckpt.1-ab.tmp"
    torn.parent.mkdir()
    torn.write_bytes(b"x")
    with run.open(RECIPE) as attempt:
        assert not torn.exists()
    others = [tmp_path / ".status.json.1-ab.tmp", attempt.path / ".attempt.json.1-ab.tmp"]
    for other in others:
        other.write_bytes(b"x")
    with run.open(RECIPE):
        assert not any(other.exists() for other in others)


def test_what_matters_only_when_media_are_made_may_differ_between_two_starts() -> None:
    def recipe(**options: float) -> dict[str, object]:
        return {"model": {"generators": {"image": {"init_args": options}}}}

    changed = differences(recipe(size=16), recipe(size=8, guidance_rescale=0.7))
    assert list(changed) == ["model.generators.image.init_args.size: 16 -> 8"]
