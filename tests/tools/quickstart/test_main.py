import json
import subprocess
import sys

import pytest
import yaml

from mmfusion.tools.quickstart import main
from mmfusion.tools.quickstart.main import Steps, end_with_us, find_recipes, finished, fit


def test_recipes_are_found_and_are_those_of_the_stages():
    folder = find_recipes()
    for name in ("1_align_input", "no_media", "3_instruct"):
        recipe = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert "model" in recipe
    assert set(main.SMALL) == {"1_align_input", "3_instruct"}


def test_no_media_recipe_replaces_the_projectors_and_their_rates_and_nothing_else():
    recipe = yaml.safe_load((find_recipes() / "no_media.yaml").read_text())
    stage1 = yaml.safe_load((find_recipes() / "1_align_input.yaml").read_text())
    assert set(recipe) == {"run_dir", "model"}
    assert set(recipe["model"]) == {"input_projectors", "tuning"}
    assert set(stage1["model"]["tuning"]) == {"input_projectors"}
    assert set(recipe["model"]["tuning"]) == {
        f"input_projectors.{modality}" for modality in stage1["model"]["input_projectors"]
    }
    for modality, projector in stage1["model"]["input_projectors"].items():
        constant = recipe["model"]["input_projectors"][modality]
        assert constant["class_path"].endswith("LearnedTokens")
        like = constant["init_args"]["like"]
        assert like["class_path"] == projector["class_path"]
        assert like["init_args"].get("stack", 1) == projector["init_args"].get("stack", 1)


def test_both_stages_use_the_same_parts():
    first, third = (
        yaml.safe_load((find_recipes() / f"{name}.yaml").read_text())["model"]
        for name in ("1_align_input", "3_instruct")
    )
    for part in ("encoders", "input_projectors", "llm"):
        assert first[part] == third[part]


def test_times_of_all_starts_add_up(tmp_path, capsys):
    for _ in range(2):
        steps = Steps(tmp_path / "run" / "times.json", count=1)
        with pytest.raises(KeyError), steps.next("a step"):
            raise KeyError
    assert list(json.loads((tmp_path / "run" / "times.json").read_text())) == ["a step"]
    assert "== 1/1 a step" in capsys.readouterr().out


def test_damaged_files_that_only_inform_do_not_stop_it(tmp_path):
    for text in ("", "[1]", "5"):
        (tmp_path / "status.json").write_text(text)
        assert not finished(tmp_path)
        assert Steps(tmp_path / "status.json", 1).seconds == {}


@pytest.mark.parametrize("passed_on", [False, True])
def test_a_child_that_knows_saves_and_one_that_does_not_is_told(passed_on):
    code = "import signal, time; signal.signal(15, lambda *_: exit(7)); print(flush=True);"
    code += "time.sleep(60)" if passed_on else "time.sleep(1); exit(5)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    end_with_us(child)
    assert child.returncode == (7 if passed_on else 5)


def test_finished_run_is_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    monkeypatch.setattr(subprocess, "Popen", None)  # any start would fail
    fit([tmp_path / "no.yaml"], tmp_path, [])


@pytest.mark.slow
def test_failing_fit_stops_the_quickstart(tmp_path):
    with pytest.raises(SystemExit, match="the same line again goes on"):
        fit([tmp_path / "no.yaml"], tmp_path / "run", [])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 435 MB may have to be fetched first
def test_small_quickstart_from_nothing_to_report(tmp_path, real_weights):
    """The real thing, downloads included where the cache (MMFUSION_CACHE) lacks them."""
    line = [sys.executable, "-m", "mmfusion", "quickstart", "--small"]
    run = tmp_path / "run"
    for _ in range(2):  # the second time everything is done already
        done = subprocess.run([*line, "--run_dir", str(run)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"mmfusion chat {run}" in done.stdout
    figures = json.loads((run / "figures.json").read_text())
    assert set(figures["captions"]) == {"pictures", "speech", "motions"}
    assert figures["shapes"]["questions"] > 0
    assert figures["memory_gib"] < 8
    page = (run / "report.html").read_text()
    assert page.count("<b>Truth</b>") > 10
