"""What a site's clusters want of a job besides its recipe: one small YAML file for all runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mmfusion.paths import expand
from mmfusion.training.secrets import hide_secrets, is_secret_variable

FILE = "~/.config/mmfusion/site.yaml"
VARIABLE = "MMFUSION_SITE"


@dataclass
class Slurm:
    """Of jobs of Slurm.

    Attributes:
        options: of ``sbatch`` by their long names, such as ``partition`` and ``account``; a value
            of null takes an option away that we would give.
        container: image of every process, where Slurm has Pyxis.
        mounts: of the container, as ``/data:/data``.
    """

    options: dict[str, str | int | None] = field(default_factory=dict)
    container: str | None = None
    mounts: list[str] = field(default_factory=list)


@dataclass
class Kubernetes:
    """Of jobs of Kubernetes.

    Attributes:
        image: of every pod, with mmfusion in it (``launch/Dockerfile`` makes one).
        namespace: of the job.
        kind: ``TrainJob`` of Kubeflow Trainer v2, or ``Job`` where there is none.
        runtime: of TrainJobs, the ClusterTrainingRuntime.
        volumes: claim of each path that is mounted: all pods must see runs, data and weights.
        gpu: name of the resource.
        grace_seconds: that a pod gets to save when it is evicted.
    """

    image: str = "mmfusion:latest"
    namespace: str = "default"
    kind: str = "TrainJob"
    runtime: str = "torch-distributed"
    volumes: dict[str, str] = field(default_factory=dict)
    gpu: str = "nvidia.com/gpu"
    grace_seconds: int = 180


@dataclass
class Site:
    """Of all that is launched here.

    Attributes:
        setup: lines of shell before anything else, such as ``source venv/bin/activate``.
        environment: variables of every process.
        slurm: of jobs of Slurm.
        kubernetes: of jobs of Kubernetes.
    """

    setup: list[str] = field(default_factory=list)
    environment: dict[str, str | int | float] = field(default_factory=dict)
    slurm: Slurm = field(default_factory=Slurm)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)


def read_site(path: str | Path | None, environment: Mapping[str, str]) -> Site:
    """The site of a file.

    Args:
        path: of the file; None takes that of ``$MMFUSION_SITE``, else :data:`FILE`, else what holds
            for no site.
        environment: of this process.

    Raises:
        FileNotFoundError: for a file that is named and is not there.
        ValueError: for a key that there is not, or a secret.
    """
    named = path or environment.get(VARIABLE)
    file = Path(expand(named or FILE))
    if not file.is_file():
        if named:
            raise FileNotFoundError(
                f"there is no site file {file}; launch/site.yaml is an example."
            )
        return Site()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Site, "site")
    try:
        content: Any = yaml.safe_load(file.read_text()) or {}
        site = parser.instantiate(parser.parse_object({"site": content})).site
    except (ArgumentError, yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    secret = [
        f"environment.{name}"
        for name, value in site.environment.items()
        if is_secret_variable(name) or hide_secrets(str(value)) != str(value)
    ]
    secret += [f"setup.{i}" for i, line in enumerate(site.setup) if hide_secrets(line) != line]
    if secret:
        raise ValueError(
            f"{file}: {secret[0]} is a key, and would be written into the script of "
            "every run. Export it before `mmfusion launch` (Slurm and torchrun hand it on), or "
            "source a file of your own in setup."
        )
    return site
