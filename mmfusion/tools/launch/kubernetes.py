"""Jobs of Kubernetes: the YAML files of ``launch/`` with a job in them. Pure."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mmfusion.paths import shipped
from mmfusion.tools.launch.job import Job
from mmfusion.tools.launch.scripts import torchrun

FILES = {"TrainJob": "kubernetes-trainjob.yaml", "Job": "kubernetes-job.yaml"}
PORT = 29400


def kubernetes(job: Job) -> str:
    """What ``kubectl apply`` is given.

    Raises:
        ValueError: for a kind that is not known.
    """
    site = job.site.kubernetes
    if site.kind not in FILES:
        raise ValueError(f"site kubernetes.kind is {site.kind!r}; expected one of {[*FILES]}.")
    found = list(yaml.safe_load_all((shipped("launch") / FILES[site.kind]).read_text()))
    for one in found:
        one["metadata"] = {"name": name_of(job), "namespace": site.namespace}
    (_train_job if site.kind == "TrainJob" else _job)(job, *found)
    return yaml.safe_dump_all(found, sort_keys=False, width=120)


def name_of(job: Job) -> str:
    """As Kubernetes takes names of services: letters, digits and -, a letter first; short, for
    names of pods are made of it.
    """
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-") or "mmfusion"
    return (name if name[0].isalpha() else f"run-{name}")[:40].rstrip("-")


def _train_job(job: Job, train_job: dict[str, Any]) -> None:
    site, spec = job.site.kubernetes, train_job["spec"]
    spec["runtimeRef"]["name"] = site.runtime
    spec["trainer"] |= {
        "image": site.image,
        "numNodes": job.nodes[1],
        "numProcPerNode": job.processes,
        "resourcesPerNode": _resources(job),
        "command": ["bash", "-c", torchrun(job)],
    }
    for name in ("args", "env"):
        del spec["trainer"][name]
    volumes, mounts = _volumes(job)
    patch = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    patch["replicatedJobs"][0]["template"]["spec"]["template"]["spec"] = {
        "terminationGracePeriodSeconds": site.grace_seconds,
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }


def _job(job: Job, service: dict[str, Any], made: dict[str, Any]) -> None:
    site, spec, name = job.site.kubernetes, made["spec"], name_of(job)
    service["spec"]["selector"] = {"job-name": name}
    spec |= {
        "completions": job.nodes[1],
        "parallelism": job.nodes[1],
        "backoffLimit": job.nodes[1] * job.failures,
    }
    volumes, mounts = _volumes(job)
    pod = spec["template"]["spec"]
    pod |= {
        "subdomain": name,
        "terminationGracePeriodSeconds": site.grace_seconds,
        "volumes": volumes,
    }
    (container,) = pod["containers"]
    rendezvous = f"{name}-0.{name}:{PORT}"
    container |= {
        "image": site.image,
        "resources": _resources(job),
        "env": [{"name": "RENDEZVOUS", "value": rendezvous}],
        "command": ["bash", "-c", torchrun(job)],
        "volumeMounts": mounts,
    }
    del container["args"]


def _resources(job: Job) -> dict[str, Any]:
    return {"limits": {job.site.kubernetes.gpu: job.gpus}} if job.gpus else {}


def _volumes(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    claims = job.site.kubernetes.volumes.items()
    volumes = [
        {"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": claim}}
        for i, (_, claim) in enumerate(claims)
    ]
    mounts = [{"name": f"volume-{i}", "mountPath": path} for i, (path, _) in enumerate(claims)]
    return volumes, mounts
