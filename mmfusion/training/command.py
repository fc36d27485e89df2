"""``mmfusion fit|validate|test|predict``: a recipe, a run directory and a trainer, put together."""

from __future__ import annotations

import gc
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from signal import SIGTERM
from typing import Any, Literal, TypeVar, cast

import lightning as L
import torch
import yaml
from jsonargparse.typing import PositiveInt, restricted_number_type
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger

from mmfusion.data.datamodule import MultimodalData
from mmfusion.paths import expand
from mmfusion.stopping import RunInterrupted, stopping_at_once
from mmfusion.training import manifest
from mmfusion.training.agreement import INIT_FROM, RESUME_FROM, agree, rank
from mmfusion.training.callbacks.audit import Audit
from mmfusion.training.callbacks.checkpointing import RunCheckpoint
from mmfusion.training.callbacks.guard import Guard
from mmfusion.training.callbacks.lost_ranks import LostRanks
from mmfusion.training.callbacks.monitor import Monitor
from mmfusion.training.callbacks.node_metrics import NodeMetrics
from mmfusion.training.callbacks.run_progress import RunProgress
from mmfusion.training.callbacks.sample_pages import SamplePages
from mmfusion.training.callbacks.stream_state import StreamStateCallback
from mmfusion.training.callbacks.validation import Validation
from mmfusion.training.callbacks.wandb_artifacts import ArtifactChoice, WandbArtifacts
from mmfusion.training.callbacks.watchdog import Watchdog
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.messages import show_messages
from mmfusion.training.module import MultimodalModule
from mmfusion.training.recipe_parser import (
    RecipeError,
    RecipeParser,
    ignored_key,
    refuse_functions,
)
from mmfusion.training.resume import by_step, complete_checkpoint, find, remove
from mmfusion.training.rewind import Rewind, forget_left_out, go_back, read_left_out
from mmfusion.training.run import NOT_THE_RECIPE, Attempt, RunDirectory, fingerprint, recipe_of
from mmfusion.training.stored_parts import use_features
from mmfusion.training.strategies.names import Strategy
from mmfusion.training.strategies.shares import GatheredCheckpoints
from mmfusion.training.trackers import default_loggers
from mmfusion.training.trainer import TRAINER_DEFAULTS, as_list, make_trainer
from mmfusion.training.wandb_segment import agents_folder

log = logging.getLogger(__name__)

CONFIG = ("-c", "--config")
COMPUTES = ("--model.", "--data.", "--trainer.precision")
"""Keys that what a frozen part gives may depend on."""
Minutes = restricted_number_type("Minutes", float, [(">", 0), ("<", 1e6)])

C = TypeVar("C", bound=L.Callback)


@dataclass(frozen=True)
class Back:
    """Where a run that went back is to go on.

    Attributes:
        start: the checkpoint, as rank 0 knows; None: step 0.
        signal: that asks this rank to stop, or 0.
    """

    start: Path | None
    signal: int


def run_command(name: str, args: Sequence[str]) -> RecipeCommand:
    """Run a command; where its run went back, all over again, in the same processes.

    Everything is made anew, so that what is restored is what a resumed run restores; the process
    group stays.
    """
    back = None
    while True:
        command = RecipeCommand(name, args, back=back)
        if command.back is None:
            return command
        back = command.back
        del command  # the next one's parts need the room
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class RecipeCommand(LightningCLI):
    """One command over one recipe.

    Args:
        name: ``fit``, ``validate``, ``test`` or ``predict``; empty: only make the parts.
        args: the command's arguments.
        stored: take what ``data.features`` holds; else the parts that make it.
        back: of a run that went back in this process, what it goes on from.
    """

    def __init__(
        self, name: str, args: Sequence[str], stored: bool = True, back: Back | None = None
    ) -> None:
        self.name, self.stored, self._args = name, stored, list(args)
        self._back = back
        self.back: Back | None = None
        """Where the run went back and is to go on from."""
        show_messages(leads=rank() == 0)
        super().__init__(
            MultimodalModule,
            MultimodalData,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"prog": f"mmfusion {name}".strip(), "allow_abbrev": False},
            parser_class=RecipeParser,
            args=_runs_as_recipes(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
        if name:
            getattr(self, name)()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options that are ours."""
        add = parser.add_argument
        add("--run_dir", type=str | None, help="run directory (default: runs/<recipe's name>)")
        add(
            "--resume",
            type=str,
            default="auto",
            help="auto: go on from the newest checkpoint, else start; must: fail without one; "
            "none: start over; or the path of a checkpoint",
        )
        add(
            "--allow_recipe_change",
            action="store_true",
            help="go on although the recipe differs from the one the run started with",
        )
        add(
            "--val_every_n_steps",
            type=PositiveInt | None,
            help="optimizer steps between validations",
        )
        add("--strategy", type=Strategy | None, help="how the ranks share the model")
        add(
            "--sequence_parallel",
            type=PositiveInt,
            default=1,
            help="ranks that share each pack, a part of its tokens each (for long packs)",
        )
        add("--wandb", type=Literal["auto", "online", "offline", "off"], default="auto", help="W&B")
        add("--wandb_project", type=str, default="mmfusion", help="W&B project")
        add(
            "--wandb_artifacts",
            type=ArtifactChoice,
            default="none",
            help="what of the run W&B keeps as artifacts: none; model: its trained weights at the "
            "end; last: the last checkpoint as well; all: every checkpoint",
        )
        add("--tensorboard", type=bool, default=False, help="write RUN/tensorboard as well")
        add(
            "--timeout_minutes",
            type=Minutes,
            default=10.0,
            help="how long a rank waits for the others before the run fails",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Guard, "guard")
        parser.add_lightning_class_args(Validation, "validation")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then fill in the run directory."""
        self.config = parser.parse_args(args)
        recipes = self.config.get("config") or []
        for recipe in recipes:
            if key := ignored_key(yaml.safe_load(Path(str(recipe)).read_text()), self.config):
                parser.error(f"{recipe}: Option '{key}' is not accepted")
        if not self.config.run_dir:
            name = Path(str(recipes[0])).stem if recipes else "unnamed"
            self.config.run_dir = str(Path("runs") / name)
        self.config.run_dir = agents_folder(expand(self.config.run_dir))
        refuse_functions(self.config)

    def instantiate_classes(self) -> None:
        """Module and data, stored features in place of the parts that make them; the trainer."""
        super().instantiate_classes()
        self._share_packs(self.config.sequence_parallel)
        if self.datamodule.features and self.stored:
            given = encode_arguments(self._args)
            use_features(self.model, self.datamodule, self.recipe(), given)

    def _share_packs(self, size: int) -> None:
        if size > 1 and self.datamodule.pad_rows:
            raise RecipeError(
                f"sequence_parallel is {size} and data.pad_rows is set; only packs laid end to end "
                "can be shared. Leave data.pad_rows out."
            )
        if size > 1 and self.name == "predict":
            raise RecipeError(
                f"sequence_parallel is {size}, but predict gives the loss of each sample from one "
                "rank; add --sequence_parallel=1."
            )
        given = self.trainer.strategy if self.trainer else self.config_init.trainer.get("strategy")
        together = getattr(given, "tensor_parallel", 1)
        if size > 1 and together > 1:
            raise RecipeError(
                f"sequence_parallel is {size} and the strategy's tensor_parallel {together}; set "
                "one of them."
            )
        self.datamodule.ranks_per_pack = size * together

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer of this command, with our callbacks and checkpoint files."""
        if not self.name:
            return None
        loggers = self._named_loggers()  # ours once the run directory is open
        return make_trainer(
            self.config_init, self._default_callbacks(), loggers, self.name == "fit"
        )

    def _default_callbacks(self) -> list[L.Callback]:
        """Those of the command; one of the same class in ``trainer.callbacks`` takes its place."""
        config: Any = self.config_init
        found: list[L.Callback] = [Audit()]
        if self.name == "fit":
            progress = RunProgress(self.recipe(), config.val_every_n_steps)
            lost = LostRanks(config.timeout_minutes)
            watch = [Monitor(), Watchdog(), lost, progress, config.guard]
            found = [StreamStateCallback(), *found, *watch, config.checkpoint]
            patience = 48.0 * config.timeout_minutes  # the other ranks wait meanwhile
            artifacts = WandbArtifacts(config.wandb_artifacts, self.recipe(), patience)
            found += [NodeMetrics(), artifacts]
        if self.name in ("fit", "validate", "test"):
            found.append(config.validation)
        return found

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values."""
        text = self.parser.dump(self.config, skip_none=False, format="yaml")
        recipe = yaml.safe_load(text)
        return {key: value for key, value in recipe.items() if key not in NOT_THE_RECIPE}

    # ---- the four commands

    def fit(self) -> None:
        """Train, from the newest checkpoint where there is one."""
        run, recipe = RunDirectory(self.config.run_dir), self.recipe()
        leads = rank() == 0
        if leads:
            run.check_recipe(recipe, self.config.allow_recipe_change)
        passed_over: list[str] = []
        start = agree(self.trainer, RESUME_FROM, lambda: self._find(run, passed_over))
        step, made = 0, None
        if start:
            made = self._made_by(start, recipe) if leads else None
            checkpoint = read_checkpoint(start, "meta")
            step = int(checkpoint["global_step"])
            self.model.resume(checkpoint["state_dict"])
        elif earlier := self.model.init_from:
            chosen = agree(
                self.trainer, INIT_FROM, lambda: complete_checkpoint(earlier, "model.init_from")
            )
            self.model.init_from = str(chosen)
        log.info(f"{run.path}: going on from {start}" if start else f"{run.path}: step 0")
        if leads:
            self.datamodule.open_shards()  # refused here, before anything is made
        with run.open(recipe, step) if leads else nullcontext() as attempt, stopping_at_once():
            if attempt is not None:
                run.set_aside(step if start else -1, attempt, passed_over)
                if self.config.resume == "none" and self._back is None:
                    forget_left_out(run.path, attempt.path)
                self._one(StreamStateCallback).left_out = read_left_out(run.path)
                allow = self.config.allow_recipe_change
                self._one(RunCheckpoint).start(run.id, recipe, made, allow)
            self._one(RunProgress).attempt = attempt
            if self._back is not None:
                self._one(RunCheckpoint).signal = self._back.signal
            self._show_samples(SamplePages(run.path, "val"))
            self.trainer.loggers = self._loggers(run, attempt)
            try:
                self.trainer.fit(self.model, self.datamodule, ckpt_path=start, weights_only=True)
            except Rewind as rewind:
                self.back = self._went_back(run, attempt, start, step, rewind)
                return
            except RuntimeError as error:
                if told := self._one(LostRanks).told(error):
                    raise ConnectionError(told) from error
                raise
            finally:
                if remote := self._one(RunCheckpoint).remote:
                    remote.wait()
            if self._one(RunProgress).owes_validation(self.trainer):  # cut off at the last step
                self._make_up_for_validation()
            done, talk = self.trainer.global_step, f"mmfusion chat {shlex.quote(str(run.path))}"
            if timer := self._out_of_time():
                log.info(f"{run.path}: {timer} at step {done}; the same command goes on from here")
                if attempt is not None:
                    attempt.unfinished = timer
            else:
                log.info(f"{run.path}: finished at step {done}. To talk to it: {talk}")

    def _went_back(
        self,
        run: RunDirectory,
        attempt: Attempt | None,
        start: Path | None,
        step: int,
        rewind: Rewind,
    ) -> Back:
        """Note what is left out; where to go on from."""
        keeper, target = self._one(RunCheckpoint), start
        if attempt is not None:
            target, left = go_back(run, self.datamodule, start, step, rewind)
            attempt.unfinished = (
                f"went back from step {left.until} to {left.step}; packs {left.first_pack} to "
                f"{left.end_pack - 1} are left out"
            )
            log.warning(f"{run.path}: {attempt.unfinished}")
        if self.model.agreed["stop"]:  # on all ranks
            raise RunInterrupted(keeper.signal or SIGTERM, step, saved=False) from None
        if attempt is not None:
            run.release()
        return Back(target, keeper.signal)

    def _make_up_for_validation(self) -> None:
        """Where the model is not divided: a second time it cannot be."""
        if isinstance(self.trainer.strategy, GatheredCheckpoints):
            log.warning(
                "the validation after the last step was cut off, and cannot be made up for under "
                f"this strategy: mmfusion validate -c {self.config.run_dir}/config.yaml "
                "--strategy=ddp makes it"
            )
        else:
            self.trainer.validate(self.model, self.datamodule, verbose=False)

    def _find(self, run: RunDirectory, passed_over: list[str]) -> Path | None:
        """The checkpoint to go on from; of the remote copies, where the run directory has none."""
        if self._back is not None:
            return self._back.start
        remote = self._one(RunCheckpoint).remote
        wanted = self.config.resume in ("auto", "must") and not by_step(run.checkpoints)
        if remote and wanted:
            run.path.mkdir(parents=True, exist_ok=True)
            with run.held():
                if path := remote.fetch_newest(run.checkpoints):
                    self._check_fetched(path, remote.url)
                    run.adopt(remote.run_id())
                    log.info(f"{path} was fetched from {remote.url}")
        return find(run.path, self.config.resume, passed_over)

    def _check_fetched(self, path: Path, url: str) -> None:
        """Refuse another run's: there is no ``config.yaml`` yet to compare the recipe with."""
        made, here = manifest.read(path), fingerprint(self.recipe())
        there = made.about.get("recipe", here) if made else here
        if there == here or self.config.allow_recipe_change:
            return
        remove(path)
        raise ValueError(
            f"checkpoint.remote {url} holds checkpoints of another recipe (fingerprint {there}, "
            f"here {here}). Give each run a place of its own (a sweep's trials too: "
            "checkpoint.remote as one of its parameters), or go on from there by "
            "--allow_recipe_change."
        )

    def _made_by(self, start: Path, recipe: Mapping[str, Any]) -> manifest.Manifest | None:
        """The manifest of the checkpoint to go on from; None where it is older than manifests."""
        made, here = manifest.read(start), fingerprint(recipe)
        there = made.about.get("recipe", here) if made else here
        if there != here and not self.config.allow_recipe_change:
            log.warning(f"{start} was made with another recipe (fingerprint {there}, here {here})")
        return made

    def _one(self, kind: type[C]) -> C:
        """The trainer's callback of a kind."""
        return next(c for c in cast(Any, self.trainer).callbacks if isinstance(c, kind))

    def _out_of_time(self) -> str:
        """Why the run stopped, where that was the clock."""
        timers = [c for c in cast(Any, self.trainer).callbacks if isinstance(c, Timer)]
        over = any((timer.time_remaining() or 1) <= 0 for timer in timers)
        steps_left = self.trainer.global_step < self.trainer.max_steps
        return "trainer.max_time was reached" if over and steps_left else ""

    def validate(self) -> None:
        """Losses and metrics of the run on ``data.val_sources``."""
        self._load_run()
        self.trainer.validate(self.model, self.datamodule)

    def test(self) -> None:
        """As :meth:`validate`, under ``test/``."""
        self._load_run()
        self.trainer.test(self.model, self.datamodule)

    def predict(self) -> None:
        """Write the loss of each sample to ``predictions.jsonl`` in the run directory."""
        self._load_run()
        batches = self.trainer.predict(self.model, self.datamodule) or []
        rank, world = self.trainer.global_rank, self.trainer.world_size
        name = "predictions.jsonl" if world == 1 else f"predictions-{rank}-of-{world}.jsonl"
        path = Path(self.config.run_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for batch in batches for row in batch]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} samples in {path}")

    def _load_run(self) -> None:
        """Give the model the run's trained weights."""
        if not self.datamodule.val_sources:
            raise ValueError(
                f"data.val_sources is empty, so there is nothing to {self.name} on; name the "
                "sources in the recipe, or as --data.val_sources='{...}'."
            )
        run = RunDirectory(self.config.run_dir)
        start = agree(self.trainer, RESUME_FROM, lambda: find(run.path, self.config.resume))
        if start is None and self.config.resume != "none":
            raise FileNotFoundError(
                f"{run.path} has no checkpoint to {self.name}; give the run as --run_dir, or use "
                "the parts as the recipe makes them by --resume=none."
            )
        step = 0
        if start is not None:
            step = int(read_checkpoint(start, "meta")["global_step"])
            self.model.restore(start)
            log.info(f"weights of {start}")
        self._show_samples(SamplePages(run.path, self.name, step))

    @property
    def validations(self) -> list[Validation]:
        """Those of the recipe; one in ``trainer.callbacks`` takes the place of ``validation``."""
        given = as_list(self.config_init.trainer.get("callbacks"))
        found = [callback for callback in given if isinstance(callback, Validation)]
        replaced = Validation in {type(callback) for callback in found}
        return found if replaced else [*found, self.config_init.validation]

    def _show_samples(self, pages: SamplePages) -> None:
        """In the run directory, on rank 0."""
        for validation in self.validations:
            validation.pages = pages if rank() == 0 else None

    def _named_loggers(self) -> list[Any]:
        """Those of the recipe."""
        given = self.config_init.trainer.get("logger")
        return [] if given in (None, True, False) else as_list(given)

    def _loggers(self, run: RunDirectory, attempt: Attempt | None) -> list[Any]:
        """``metrics.csv`` always, W&B, and those named in the recipe."""
        config, named = self.config, self._named_loggers()
        theirs = any(isinstance(logger, WandbLogger) for logger in named)
        ours = default_loggers(
            run.path,
            run.id if attempt else "",
            attempt.number if attempt else 0,
            "off" if theirs else config.wandb,
            config.wandb_project,
            tensorboard=config.tensorboard,
            nodes=self.trainer.num_nodes,
            step=attempt.step if attempt else 0,
        )
        return [*ours, *named]


class ReadRecipe(RecipeCommand):
    """A recipe that is read as `fit` reads it, and of which nothing is made: neither its data nor
    its weights need to be here.

    Args:
        args: of `mmfusion fit`.

    Raises:
        RecipeError: for a key or a value that is none.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__("", args)

    def instantiate_classes(self) -> None:
        """None of them."""


def encode_arguments(args: Sequence[str]) -> list[str]:
    """Of a command's arguments, those that `mmfusion data encode` needs to make what it reads: the
    recipes, and the keys with other values that say what is computed.
    """
    recipes, keys = [], []
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        wanted = name.startswith(COMPUTES) and name != "--data.features"
        if wanted or name in CONFIG:
            value = value if equals else next(rest, "")
            keys += [f"{name}={value}"] if wanted else []
            recipes += [] if wanted else [value]
    several = [word for recipe in recipes for word in ("-c", recipe)]
    return [*(several if len(recipes) > 1 else recipes or ["RECIPE"]), *keys]


def _runs_as_recipes(args: Sequence[str]) -> list[str]:
    """``-c RUN`` as ``-c RUN/config.yaml --run_dir=RUN``: a directory that was moved or copied is
    the run, not where it was before, which is what its recipe says.
    """
    found = []
    for before, arg in pairwise(["", *args]):
        name, equals, value = arg.partition("=")
        given = arg if before in CONFIG else value if equals and name in CONFIG else None
        if given is None:
            found.append(arg)
            continue
        recipe = recipe_of(given)
        found.append(recipe if given is arg else f"{name}={recipe}")
        found += [f"--run_dir={given}"] if recipe != given else []
    return found
