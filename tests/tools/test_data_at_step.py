"""`mmfusion data at-step`: tells the very samples that training sees."""

from __future__ import annotations

import shutil

import pytest
import torch

from mmfusion.cli import main
from mmfusion.tools.data_at_step import at_step, load_stream_state, samples_at
from tests.data.synthetic import keys_of, make_data, write_source
from tests.training.tiny import write_recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("at_step")
    return {"a": write_source(root / "a", 40), "b": write_source(root / "b", 9, seed=1)}


def test_rows_are_the_samples_of_the_step(folders):
    data = make_data(folders, packs_per_micro_batch=4)
    for step, batch in zip(range(8), data.train_dataloader(), strict=False):
        rows = list(samples_at(data, step))
        told = sorted((row["source"], row["epoch"], row["index"], row["key"]) for row in rows)
        assert told == sorted(
            (*key, s.key) for key, s in zip(keys_of(batch), batch.samples, strict=True)
        )
        assert sum(row["tokens"] for row in rows) == batch.input_ids.numel()
        assert {row["pack"] for row in rows} == set(range(4 * step, 4 * step + 4))


def test_a_checkpoint_gives_the_same_rows_and_refuses_earlier_steps(folders, tmp_path):
    data = make_data(folders, packs_per_micro_batch=4)
    for batch, _ in zip(data.train_dataloader(), range(5), strict=False):
        data.state.commit(batch.stream)
    save(tmp_path / "5.ckpt", {"mmfusion.stream": data.state.to_json()})
    later = make_data(folders)
    later.restore(load_stream_state(tmp_path / "5.ckpt", 7))
    assert list(samples_at(later, 7)) == list(samples_at(make_data(folders), 7))
    with pytest.raises(ValueError, match="step 3 lies before the given checkpoint's step 5"):
        list(samples_at(later, 3))


def save(path, callbacks, step=5):
    path.parent.mkdir(exist_ok=True)
    rest = {"state_dict": {}, "global_step": step, "loops": {}, "optimizer_states": []}
    rest["pytorch-lightning_version"] = "2.6.6"
    torch.save({**rest, "callbacks": callbacks}, path)


def test_of_a_run_the_newest_checkpoint_before_the_step_is_taken(folders, tmp_path):
    data = make_data(folders, packs_per_micro_batch=4)
    for step, batch in zip(range(1, 5), data.train_dataloader(), strict=False):
        data.state.commit(batch.stream)
        file = tmp_path / "checkpoints" / f"step-{step:08d}.ckpt"
        save(file, {"mmfusion.stream": data.state.to_json()}, step)
    torch.save({}, tmp_path / "checkpoints" / "step-00000002.ckpt")
    taken = [load_stream_state(tmp_path, step).step for step in (1, 2, 3, 9)]
    assert taken == [1, 1, 3, 4]


def test_a_file_without_the_state_is_refused(tmp_path):
    save(tmp_path / "x.ckpt", {"other": {}})
    with pytest.raises(ValueError, match=r"no state of the data stream \(callbacks: \['other'\]"):
        load_stream_state(tmp_path / "x.ckpt", 9)
    (tmp_path / "no.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"--checkpoint .*no.ckpt: the checkpoint cannot be read"):
        load_stream_state(tmp_path / "no.ckpt", 9)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_stream_state(tmp_path / "nothing.ckpt", 9)


def test_a_damaged_state_is_refused(folders, tmp_path):
    good = make_data(folders).state.to_json()
    damaged = [5, {"spec": {}}, good | {"lanes": [{"packs": 1}]}, good | {"counts": {"a": {}}}]
    for number, state in enumerate([*damaged, {k: v for k, v in good.items() if k != "step"}]):
        save(tmp_path / f"{number}.ckpt", {"mmfusion.stream": state})
        with pytest.raises(ValueError, match="data stream is damaged"):
            load_stream_state(tmp_path / f"{number}.ckpt", 9)


def test_a_run_directory_stands_for_its_recipe(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    at_step(str(recipe), 2)
    (tmp_path / "run").mkdir()
    shutil.copy(recipe, tmp_path / "run" / "config.yaml")
    expected = capsys.readouterr().out
    at_step(str(tmp_path / "run"), 2)
    assert capsys.readouterr().out == expected != ""


def test_a_step_that_is_never_trained_is_refused(folders, tmp_path, capsys):
    recipe = str(write_recipe(tmp_path, trainer__max_steps=3))
    at_step(recipe, 2)
    with pytest.raises(SystemExit):
        main(["data", "at-step", recipe, "--", "-1"])
    assert "step is -1; steps are counted from 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"step 3 is never trained: .*max_steps is 3"):
        at_step(recipe, 3)
    with pytest.raises(ValueError, match="step 1000 is never trained: the data end before it"):
        list(samples_at(make_data(folders, epochs=1.0), 1000))


def test_keys_of_the_recipe_are_taken_as_fit_takes_them(tmp_path, capsys):
    recipe = str(write_recipe(tmp_path))
    main(["data", "at-step", recipe, "1"])
    usual = capsys.readouterr().out
    main(["data", "at-step", recipe, "1", "--data.seed=5"])
    assert capsys.readouterr().out != usual
