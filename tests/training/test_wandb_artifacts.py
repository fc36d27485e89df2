"""Checkpoints and weights in W&B, what they were made of, and that no key goes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfusion import load
from mmfusion.data.shards import Shards
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.run import RunDirectory
from tests.training.tiny import write_recipe
from tests.training.wandb_process import mmfusion
from tests.training.wandb_server import KEY, Server, serving

pytestmark = pytest.mark.slow
SHORT = ("--model.schedule.warmup_steps=0", "--trainer.max_steps=4")


def train(folder: Path, name: str, env: dict[str, str], *options: str) -> tuple[RunDirectory, str]:
    recipe = write_recipe(folder, wandb="auto")
    given = (f"--run_dir={folder}/{name}", *SHORT, *options)
    said = mmfusion(folder, env, "fit", "-c", str(recipe), *given)
    return RunDirectory(folder / name), said


def by_collection(server: Server) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for artifact in server.state()["artifacts"].values():
        assert artifact["state"] == "COMMITTED"
        found.setdefault(artifact["collection"], []).append(artifact)
    return found


def contents(artifact: dict[str, Any]) -> list[str]:
    return sorted(artifact["manifest"]["contents"])


def test_artifacts_name_recipe_data_and_parent(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        first, said = train(
            tmp_path, "first", server.environment,
            "--wandb_artifacts=all", "--checkpoint.every_n_steps=2",
        )  # fmt: skip
        second, also = train(
            tmp_path, "second", server.environment,
            "--wandb_artifacts=model", f"--model.init_from={first.path}",
        )  # fmt: skip
        found, state = by_collection(server), server.state()
    assert not state["unknown"]
    steps = [a["metadata"]["step"] for a in found[f"checkpoint-{first.id}"]]
    assert steps == [2, 4]
    (model,) = found[f"model-{first.id}"]
    assert ({*model["aliases"]}, model["type"]) == ({"latest", "step-4"}, "model")
    assert contents(model) == ["checkpoints/step-00000004.ckpt", "config.yaml", "run.json"]
    assert model["used_by"] == [second.id], also
    (other,) = found[f"model-{second.id}"]
    assert f"checkpoint-{second.id}" not in found
    assert other["metadata"]["parent"] == {"id": first.id, "name": "first", "step": 4}
    for source in ("train", "words"):
        (data,) = found[f"data-{source}"]  # of both runs
        about = data["metadata"]
        assert about["dataset_id"] == Shards(f"{tmp_path}/{source}-*.tar").dataset_id
        assert sorted(data["used_by"]) == sorted([first.id, second.id])
        assert other["metadata"]["data"][source] == about
    recipes = [found[f"recipe-{run.id}"][0]["metadata"] for run in (first, second)]
    assert recipes[0] != recipes[1]  # init_from is a part of it
    lineage = json.loads((second.path / "lineage.json").read_text())
    assert lineage == {k: other["metadata"][k] for k in ("recipe", "data", "parent")}
    config = json.loads(state["runs"][second.id]["bucket"]["config"])
    assert config["lineage"]["value"] == lineage
    assert KEY not in said + also + json.dumps(state)
    for run in (first, second):
        for path in run.path.rglob("*"):
            assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_offline_artifacts_and_their_inputs_arrive_with_the_sync(tmp_path: Path) -> None:
    run, _ = train(tmp_path, "run", {}, "--wandb_artifacts=last")
    with serving(tmp_path) as server:
        mmfusion(tmp_path, server.environment, "sync", str(run.path))
        found, state = by_collection(server), server.state()
    assert found.keys() >= {f"model-{run.id}", f"checkpoint-{run.id}", "data-train", "data-words"}
    assert found["data-train"][0]["used_by"] == [run.id]
    put = {Path(path).name for path in state["files"] if "/artifact/" in path}
    assert {"step-00000004.ckpt", "config.yaml"} <= put


@pytest.mark.parametrize("sharded", [False, True])
def test_the_model_artifact_is_what_load_takes(tmp_path: Path, sharded: bool) -> None:
    """Its files, at the paths that they have in the artifact."""
    shards = f"--checkpoint.sharded={sharded}"
    run, _ = train(tmp_path, "run", {}, "--wandb_artifacts=model", shards)
    with serving(tmp_path) as server:
        mmfusion(tmp_path, server.environment, "sync", str(run.path))
        (model,) = by_collection(server)[f"model-{run.id}"]
        copy = tmp_path / "downloaded"
        for name in contents(model):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(server.file(f"artifact/{model['id']}/{name}"))
    (ours,) = run.checkpoints.glob("step-*4*")
    (theirs,) = copy.rglob("*.ckpt")
    size = sum(p.stat().st_size for p in (ours.iterdir() if ours.is_dir() else [ours]))
    assert theirs.stat().st_size < size / 2
    state, same = (read_checkpoint(path)["state_dict"] for path in (ours, theirs))
    assert state.keys() == same.keys()
    assert all(torch.equal(state[key], same[key]) for key in state)
    assert load(copy).generate([{"role": "user", "content": "w1"}], max_new_tokens=2) is not None


def test_no_artifact_is_made_unless_it_is_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        run, _ = train(tmp_path, "run", server.environment)
        kinds = {a["type"] for a in server.state()["artifacts"].values()}
    assert not kinds & {"model", "checkpoint", "dataset", "recipe"}
    assert (run.path / "lineage.json").is_file()
