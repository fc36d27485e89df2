"""``mmfusion launch --on k8s`` with the real ``kubectl`` against a server on loopback: what is
submitted, and what is shown of it until it ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mmfusion.cli import main
from mmfusion.tools.launch import follow
from tests.tools.launch.cluster import Kubernetes, Stage, serving

pytestmark = pytest.mark.skipif(
    not (shutil.which("kubectl") or os.environ.get("MMFUSION_CLUSTER")),
    reason="kubectl is not installed (Debian's kubernetes-client)",
)
NAMES = {"Job": "job.batch/the-run", "TrainJob": "trainjob.trainer.kubeflow.org/the-run"}
PATHS = {
    "Job": "/apis/batch/v1/namespaces/training/jobs",
    "TrainJob": "/apis/trainer.kubeflow.org/v1alpha1/namespaces/training/trainjobs",
}
RUNNING = {
    "Job": {"active": 2, "ready": 2},
    "TrainJob": {"jobsStatus": [{"name": "node", "ready": 1, "active": 1}]},
}
ADDRESS = "https://wandb.example/me/mmfusion/runs/abc"
W = f"W&B is online ({ADDRESS}); files in /shared/runs/the_run/wandb"


def ended(how: str, reason: str = "", message: str = "") -> dict[str, Any]:
    met = {"type": how, "status": "True", "reason": reason, "message": message}
    return {"conditions": [met]}


def at(second: float, text: str) -> str:
    return f"2026-01-01T00:00:{second:012.9f}Z {text}"


def pod(phase: str, restarts: int = 0, waiting: str = "") -> dict[str, Any]:
    state = {"waiting": {"reason": waiting}} if waiting else {"running": {}}
    container = {"name": "node", "restartCount": restarts, "state": state}
    return {"phase": phase, "containerStatuses": [container]}


@pytest.fixture
def launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, list[str], str]]]:
    """Launches ``the_run`` and follows it: the code, the lines it says, and its error."""
    assert shutil.which("kubectl"), "install kubernetes-client"
    recipe, site, run = tmp_path / "recipe.yaml", tmp_path / "site.yaml", tmp_path / "the_run"
    recipe.write_text("trainer: {max_steps: 1}\n")
    monkeypatch.setenv("HOME", str(tmp_path))  # of kubectl's cache
    monkeypatch.setattr(follow, "EVERY_SECONDS", 0.05)
    with ExitStack() as servers:

        def launched(
            cluster: Kubernetes, kind: str = "Job", *options: str, run_dir: Path = run
        ) -> tuple[int, list[str], str]:
            site.write_text(f"kubernetes: {{kind: {kind}, namespace: training}}\n")
            config = servers.enter_context(serving(cluster, tmp_path))
            monkeypatch.setenv("KUBECONFIG", str(config))
            code = 0
            try:
                main(["launch", str(recipe), "--on=k8s", "--nodes=2", f"--run_dir={run_dir}",
                      f"--site={site}", "--check=false", *options])  # fmt: skip
            except SystemExit as end:
                code = int(end.code or 0)
            said = capsys.readouterr()
            return code, said.out.splitlines(), said.err

        yield launched


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_a_job_is_followed_to_its_end(launch: Any, kind: str, tmp_path: Path) -> None:
    """Without a run directory that is to be seen. Between two looks a second's first lines are
    asked for again, the pod's container begins anew, and another pod takes its place."""
    a = [at(1.1, "[a] first"), at(1.2, "[a] second"), at(3, W)]
    b = [at(4, "[b] first")]
    c = [at(5, "[c] first"), at(6, "[c] last")]
    cluster = Kubernetes(
        [
            Stage({}, {"run-0-a": pod("Pending", waiting="ImagePullBackOff")}),
            Stage(RUNNING[kind], {"run-0-a": pod("Running")}, {"run-0-a": a[:1]}),
            Stage(RUNNING[kind], {"run-0-a": pod("Running")}, {"run-0-a": a[:2]}),
            Stage(
                RUNNING[kind],
                {"run-0-a": pod("Running", restarts=1)},
                {"run-0-a/previous": a, "run-0-a": b},
            ),
            Stage(
                ended("Complete"),
                {"run-0-a": pod("Failed", restarts=1), "run-0-c": pod("Succeeded")},
                {"run-0-a": b, "run-0-c": c},
            ),
        ]
    )
    run = tmp_path / "nowhere" / "the_run"
    (tmp_path / "nowhere").write_text("a file where its folder would be\n")
    code, lines, error = launch(cluster, kind, run_dir=run)
    assert code == 0, error
    state = f"[k8s {NAMES[kind]}: "
    assert lines == [
        *(["service/the-run created"] if kind == "Job" else []),
        f"{NAMES[kind]} created",
        f"{run}/launch: not kept, for it cannot be written from here (Not a directory)",
        f"{run}: submitted on k8s as {NAMES[kind]}",
        f"{state}PENDING (ImagePullBackOff)]",
        "[a] first",
        f"{state}RUNNING]",
        "[a] second",
        W,
        "[b] first",
        f"[W&B: online ({ADDRESS})]",
        "[c] first",
        "[c] last",
        f"{state}COMPLETED]",
        f"{run}: COMPLETED; it is not to be seen from here",
    ]


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_a_job_that_has_failed_ends_with_its_reason(launch: Any, kind: str, tmp_path: Path) -> None:
    """And with what the run says of itself, where it is to be seen."""
    run = tmp_path / "the_run"
    (run / "wandb").mkdir(parents=True)
    (run / "wandb/where.txt").write_text("offline (no key)")
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 7, "attempt": 3}))
    message = "Container node for pod training/run-0-a failed with exit code 3"
    cluster = Kubernetes(
        [
            Stage(
                ended("Failed", "PodFailurePolicy", message),
                {"run-0-a": pod("Failed")},
                {"run-0-a": [at(1, "given up")]},
            )
        ]
    )
    code, lines, _ = launch(cluster, kind)
    assert code == 1
    assert lines[-4:] == [
        "given up",
        f"[k8s {NAMES[kind]}: FAILED (PodFailurePolicy: {message}); run failed, start 3]",
        f"[W&B: offline (no key); mmfusion sync {run} sends it]",
        f"{run}: failed at step 7",
    ]
    noted = json.loads((run / "launch/job.json").read_text())
    assert noted == {"on": "k8s", "id": NAMES[kind], "namespace": "training"}
    assert kind in (run / "launch/job.yaml").read_text()


def test_leaving_does_not_stop_a_job(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Kubernetes([Stage(RUNNING["Job"], {"run-0-a": pod("Running")})])
    answer = cluster.answer

    def leaves(*given: Any) -> Any:
        if cluster.asked == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return answer(*given)

    monkeypatch.setattr(cluster, "answer", leaves)
    code, lines, error = launch(cluster)
    assert code == 0, error
    run = tmp_path / "the_run"
    see = f"mmfusion runs {run}, kubectl -n training get {NAMES['Job']}"
    assert lines[-1] == f"{run} goes on; see {see}"
    assert f"{PATHS['Job']}/the-run" in cluster.made, "it is there"
    assert not [call for call in cluster.calls if call.startswith("DELETE")]


def test_the_same_command_begins_anew_what_has_ended(launch: Any) -> None:
    """What was applied before would stay as it is. What still goes on stays."""
    done = Stage(ended("Complete"))
    cluster = Kubernetes([done])
    path = f"{PATHS['Job']}/the-run"

    def changes() -> Sequence[str]:
        return [call for call in cluster.calls if not call.startswith("GET") and path in call]

    assert launch(cluster)[0] == 0
    assert changes() == []
    assert launch(cluster)[0] == 0
    assert changes() == [f"DELETE {path}"]
    assert cluster.calls.count(f"POST {PATHS['Job']}") == 2
    cluster.stages, cluster.asked = [Stage(RUNNING["Job"]), Stage(RUNNING["Job"]), done], 0
    code, lines, _ = launch(cluster)
    assert [code, changes()] == [0, [f"DELETE {path}"]]
    assert f"{NAMES['Job']} unchanged" in lines


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_a_deleted_job_has_ended(launch: Any, kind: str) -> None:
    cluster = Kubernetes([Stage(RUNNING[kind])])
    answer = cluster.answer

    def deletes(method: str, path: str, *given: Any) -> Any:
        if cluster.asked == 1:
            cluster.made.clear()
        return answer(method, path, *given)

    cluster.answer = deletes  # type: ignore[method-assign]
    code, lines, _ = launch(cluster, kind)
    assert code == 1
    assert f"[k8s {NAMES[kind]}: CANCELLED (deleted)]" in lines


def test_a_server_that_refuses_ends_it_in_one_line(launch: Any) -> None:
    cluster = Kubernetes([Stage(RUNNING["Job"]), Stage({}, refused=403)])
    code, lines, error = launch(cluster)
    assert code == 1
    assert f"[k8s {NAMES['Job']}: RUNNING]" in lines
    assert error.startswith(
        f"mmfusion launch: error: kubectl cannot follow {NAMES['Job']}: Error from server "
        "(Forbidden): "
    )
    assert error.count("\n") == 1


def test_a_server_that_is_away_refuses_a_launch_and_ends_no_following(
    launch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pods = follow.Pods(NAMES["Job"], "training")
    cluster = Kubernetes([Stage(RUNNING["Job"])])
    assert launch(cluster, "Job", "--follow=false")[0] == 0
    assert pods.state() == "RUNNING"
    config = json.loads((tmp_path / "kubeconfig").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    away = pods.state()
    assert away.startswith("UNKNOWN (")
    assert "127.0.0.1:9 was refused" in away
    assert "\n" not in away
    with pytest.raises(ValueError, match=r"^kubectl failed: .*127\.0\.0\.1:9 was refused[^\n]*$"):
        pods.submit("kind: Job\napiVersion: batch/v1\nmetadata: {name: a}\n")
