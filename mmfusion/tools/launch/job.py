"""What is to be launched."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmfusion.tools.launch.site import Site
from mmfusion.training.secrets import hide_secrets


@dataclass
class Job:
    """A recipe, and what it is to run on.

    Attributes:
        recipes: files, of which later ones change earlier ones.
        overrides: values of keys, as ``--trainer.max_steps=100``.
        run_dir: of the run.
        nodes: machines; a smallest and a largest number where the run may go on with fewer.
        gpus: of each machine, a process each; 0: one process without.
        time: that the job may take at once, ``HOURS:MINUTES:SECONDS``; it goes on in another one.
        failures: in a row without a step of progress, after which it is given up.
        rendezvous: host and port of torchrun's, where there are several machines.
        site: of all jobs here.
    """

    recipes: Sequence[str]
    overrides: Sequence[str]
    run_dir: str
    nodes: tuple[int, int] = (1, 1)
    gpus: int = 0
    time: str = "24:00:00"
    failures: int = 3
    rendezvous: str | None = None
    site: Site = field(default_factory=Site)

    def __post_init__(self) -> None:
        """Refuse what cannot be in a script, nor may be in one that is kept.

        Raises:
            ValueError: for a key, token or password among the overrides, and for a line's end in a
                path.
        """
        for override in self.overrides:
            key, _, value = override.partition("=")
            if hide_secrets({(name := key.rpartition(".")[2].lstrip("-")): value})[name] != value:
                raise ValueError(
                    f"{key}: a key, token or password would be written to {self.run_dir}; give it "
                    "by an environment variable (HF_TOKEN, WANDB_API_KEY) instead."
                )
        if odd := [x for x in (self.run_dir, self.time) if not x.isprintable()]:
            raise ValueError(f"{odd[0]!r} cannot be in a script; expected one line of letters.")

    @property
    def name(self) -> str:
        """For the scheduler."""
        return Path(self.run_dir).name

    @property
    def processes(self) -> int:
        """Of each machine."""
        return max(self.gpus, 1)

    @property
    def arguments(self) -> list[str]:
        """Of ``mmfusion fit -c``: the recipes and the overrides."""
        first, *others = self.recipes
        return [first, *(word for recipe in others for word in ("-c", recipe)), *self.overrides]

    def of_trial(self, overrides: Sequence[str], run_dir: str | None = None) -> list[str]:
        """Those of one run of a sweep."""
        return [*self.arguments, *overrides, *([f"--run_dir={run_dir}"] if run_dir else [])]

    def exports(self, **more: str | None) -> list[str]:
        """Lines of shell: the site's set-up and variables, and those of a script."""
        given = {**self.site.environment, **{name: x for name, x in more.items() if x}}
        return [
            *self.site.setup,
            *(f"export {name}={shlex.quote(str(value))}" for name, value in given.items()),
        ]
