import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mmfusion.cli import main as cli
from mmfusion.paths import shipped
from mmfusion.tools.quickstart import main
from mmfusion.tools.quickstart.main import (
    Steps,
    end_with_us,
    finished,
    fit,
    read_json,
    refuse_outdated,
)
from mmfusion.tools.quickstart.media_figures import rows as media_rows
from mmfusion.training.run import RunDirectory
from tests.training.tiny import losses, write_recipe

ROOT = Path(__file__).parents[3]


def test_recipes_are_found_and_are_those_of_the_stages():
    folder = shipped("recipes/quickstart")
    stages = {"1_align_input", "3_instruct", "2_align_output", "4_any_to_any"}
    for name in (*stages, "no_media"):
        recipe = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert "model" in recipe
    assert set(main.SMALL) == stages
    generators = {path.stem for path in (folder / "generators").glob("*.yaml")}
    assert set(main.GENERATORS) == set(main.SMALL_GENERATORS) == generators


def test_no_media_recipe_replaces_the_projectors_and_their_rates_and_nothing_else():
    recipe = yaml.safe_load((shipped("recipes/quickstart") / "no_media.yaml").read_text())
    stage1 = yaml.safe_load((shipped("recipes/quickstart") / "1_align_input.yaml").read_text())
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


def test_all_stages_use_the_same_parts():
    first, third, second, last = (
        yaml.safe_load((shipped("recipes/quickstart") / f"{name}.yaml").read_text())["model"]
        for name in ("1_align_input", "3_instruct", "2_align_output", "4_any_to_any")
    )
    for part in ("encoders", "input_projectors", "llm"):
        assert first[part] == third[part] == second[part] == last[part]
    for part in ("signal_tokens", "output_projectors", "generators", "objectives"):
        assert second[part] == last[part]


def test_what_changes_without_bfloat16_is_all_that_uses_it(monkeypatch):
    def halves(value, path=""):
        if isinstance(value, dict):
            return {place for key in value for place in halves(value[key], f"{path}.{key}")}
        return {path[1:]} if str(value) in ("bfloat16", "float16", "bf16-mixed") else set()

    for name in main.SMALL:
        recipe = yaml.safe_load((shipped("recipes/quickstart") / f"{name}.yaml").read_text())
        assert halves(recipe) == {line[2:].split("=")[0] for line in main.IN_FLOAT32}
    for fast, expected in ((True, []), (False, main.IN_FLOAT32)):
        monkeypatch.setattr(main, "fast_bfloat16", lambda fast=fast: fast)
        assert main.changes("3_instruct", small=False) == expected
        small = main.changes("3_instruct", small=True)
        assert small == [*main.SMALL["3_instruct"], *expected]


def test_times_of_all_starts_add_up(tmp_path, capsys):
    for _ in range(2):
        steps = Steps(tmp_path / "run" / "times.json", count=1)
        with pytest.raises(KeyError), steps.next("a step"):
            raise KeyError
    assert list(json.loads((tmp_path / "run" / "times.json").read_text())) == ["a step"]
    assert "== 1/1 a step" in (said := capsys.readouterr().out)
    assert " s\n" not in said  # the seconds of a step that came to its end
    with steps.next("another"):
        pass
    assert capsys.readouterr().out.endswith("   0 s\n")


@pytest.mark.parametrize("step", ["fetch_all", "apart"])
def test_ctrl_c_outside_of_training_says_how_to_go_on(tmp_path, monkeypatch, capsys, step):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "fetch_all", dict)
    monkeypatch.setattr(main, step, interrupted)
    with pytest.raises(SystemExit) as stop:
        cli(["quickstart", "--small", f"--run_dir={tmp_path}"])
    assert stop.value.code == 130
    said = capsys.readouterr()
    assert said.err == "\nInterrupted. The same line again goes on.\n"
    assert said.out.splitlines()[-1].startswith("== ")


def test_damaged_files_that_only_inform_do_not_stop_it(tmp_path):
    for text in ("", "[1]", "5"):
        (tmp_path / "status.json").write_text(text)
        assert not finished(tmp_path)
        assert Steps(tmp_path / "status.json", 1).seconds == {}


@pytest.mark.slow
@pytest.mark.parametrize("passed_on", [False, True])
def test_a_child_that_knows_saves_and_one_that_does_not_is_told(passed_on):
    code = "import signal, time; signal.signal(15, lambda *_: exit(7)); print(flush=True);"
    code += "time.sleep(60)" if passed_on else "time.sleep(1); exit(5)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    end_with_us(child)
    assert child.returncode == (7 if passed_on else 5)


def test_weights_are_converted_in_a_process_of_their_own():
    assert main.apart(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="'x'"):
        main.apart(int, "x")


def told_to_end():
    """Its parent alone gets SIGTERM."""
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def test_sigterm_ends_the_process_apart_as_well():
    def terminated(*_):
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        start = time.monotonic()
        with pytest.raises(SystemExit):
            main.apart(told_to_end)
        assert time.monotonic() - start < 30
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_with_an_older_generator_is_not_taken_for_one_with_this(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path))
    run, made = tmp_path / "run", tmp_path / "generators" / "image"
    refuse_outdated(run, ["image"])  # neither is there
    for folder, name in ((made, "training.json"), (run, "run.json")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    os.utime(made / "training.json", (1, 1))
    refuse_outdated(run, ["image"])
    os.utime(run / "run.json", (0, 0))
    with pytest.raises(SystemExit, match=r"older generator.*delete"):
        refuse_outdated(run, ["image"])


def test_finished_run_is_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    monkeypatch.setattr(subprocess, "Popen", None)  # any start would fail
    fit([tmp_path / "no.yaml"], tmp_path, [])


STAGE = """
import sys
from pathlib import Path
from mmfusion.tools.quickstart.main import Steps, fit
recipe, run = map(Path, sys.argv[1:])
with Steps(run / "quickstart.json", count=1).next("A stage"):
    fit([recipe], run, ["--data.num_workers=1"])
"""


@pytest.mark.slow
def test_ctrl_c_in_a_stage_saves_and_the_same_line_goes_on(tmp_path):
    held = {"class_path": "tests.training.tiny.UntilAskedToStop", "init_args": {"step": 6}}
    recipe = write_recipe(tmp_path, checkpoint__every_n_steps=100, trainer__callbacks=[held])
    run = RunDirectory(tmp_path / "run")
    line = [sys.executable, "-c", STAGE, str(recipe), str(run.path)]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    metrics = run.path / "metrics.csv"
    # A group of its own, as a terminal's: Ctrl-C goes to all of it. It comes in the step that is
    # held, so the run ends after the next one, and is not held again.
    with subprocess.Popen(line, start_new_session=True, **told) as first:
        while first.poll() is None and not (metrics.exists() and losses(run).get(5)):
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGINT)
        said, _ = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert "Interrupted. The same line again goes on." in said
    assert "Traceback" not in said
    assert read_json(run.path / "status.json")["state"] == "interrupted"
    done = max(losses(run)) + 1
    assert done == 7
    spent = read_json(run.path / "quickstart.json")["A stage"]

    again = subprocess.run(line, **told)
    assert again.returncode == 0, again.stdout
    assert min(losses(run, attempt=2)) == done > 0
    assert set(losses(run)) == set(range(12))
    assert finished(run.path)
    assert read_json(run.path / "quickstart.json")["A stage"] > spent


@pytest.mark.parametrize("code", [0, 130, -signal.SIGINT])
def test_ctrl_c_stops_the_quickstart_whatever_fit_was_doing(tmp_path, monkeypatch, code):
    """It may have finished meanwhile, or not have begun to listen."""
    ends = iter([KeyboardInterrupt, code])

    class Fit:
        def __init__(self, *args, **options):
            pass

        def wait(self):
            end = next(ends)
            if end is KeyboardInterrupt:
                raise end
            return end

    monkeypatch.setattr(subprocess, "Popen", Fit)
    with pytest.raises(SystemExit) as stop:
        fit([tmp_path / "no.yaml"], tmp_path, [])
    assert stop.value.code == 130


@pytest.mark.slow
def test_failing_fit_stops_the_quickstart(tmp_path):
    with pytest.raises(SystemExit, match="the same line again goes on"):
        fit([tmp_path / "no.yaml"], tmp_path / "run", [])


@pytest.mark.slow
# A guard against hanging. 435 MB may have to be fetched first, and without bfloat16, beside two
# other workers on two cores, it takes over 45 minutes.
@pytest.mark.timeout(4500)
def test_small_quickstart_from_nothing_to_report(tmp_path, real_weights):
    """The real thing, downloads included where the cache (MMFUSION_CACHE) lacks them."""
    line = [sys.executable, "-m", "mmfusion", "quickstart", "--small", "--with-baselines"]
    run = tmp_path / "run"
    answering = run / "any_to_any"
    for more, last in (([], run), (["--any-to-any"], answering)):  # goes on from what is done
        line_now = [*line, *more, "--run_dir", str(run)]
        done = subprocess.run(line_now, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"mmfusion chat {last}\n" in done.stdout
    figures = json.loads((run / "figures.json").read_text())
    assert set(figures["captions"]) == {"pictures", "speech", "motions"}
    assert figures["shapes"]["questions"] > 0
    assert figures["memory_gib"] < 8
    assert set(figures["training"]) == {"stage 1", "stage 3", "no media"}
    assert figures["training"]["no media"]["steps"] == figures["training"]["stage 1"]["steps"] == 25
    for found in figures["captions"].values():
        gain = found["loss"]["no-media run"]["value"] - found["loss"]["right"]["value"]
        assert found["gain"]["over no-media run"]["value"] == pytest.approx(gain)
    page = (run / "report.html").read_text()
    assert page.count("<b>Truth</b>") > 10
    assert page.count(": loss, no-media run<") == page.count(": gain over no-media run<") == 3
    assert "It was not trained here" not in page

    media = json.loads((answering / "figures.json").read_text())
    assert set(media["right"]) == set(media["judges"]) == {"image", "audio", "video"}
    # A tenth of their training; of 8 kinds and more one is right by chance.
    assert sum(figure["value"] for figure in media["judges"].values()) / 3 > 0.4
    assert {"shapes", "motions"} <= set(media["understanding"])
    assert set(media["training"]) == {"stage 2", "last stage"}
    for found in media["denoising"].values():
        assert found["ours"]["value"] > 0
        assert found["gain"]["bound"] == 0.8
    printed = [text.strip().split("  ")[0] for text in done.stdout.splitlines()]
    for what, _, _ in media_rows(media):
        assert what.strip() in printed
    made = (answering / "report.html").read_text()
    assert made.count("<b>Truth</b>") > 10
    for name in ("picture", "sound", "clip"):
        assert f"{name}s asked for in new words" in made
    assert "put in words that no request of training has" in made
    assert 'href="../report.html"' in made
    assert "15 to 40 minutes in all" in done.stdout
