"""Runs that are killed again and again, and whether they end as if nothing had happened.

::

    python -m tests.distributed.kills --kills 100

Each run is the real ``mmfusion fit`` of a tiny recipe, in ranks as torchrun starts them. One rank
or all are killed (SIGKILL): half of the time while a checkpoint is written, else at any moment. The
same command goes on, until it is killed again. After each kill every file with a checkpoint's name
is read by other means than the program's own, and the newest is compared with that of an
uninterrupted run; the next start has to go on from that one. At the end of a run its losses, its
packs, its last checkpoint and its folder are compared. Disks that are full come last (a small
tmpfs, which root alone can mount).

Nothing of the program is patched: the moments are found by looking at the run's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.loggers import read_metrics
from mmfusion.training.run import RunDirectory
from tests.training import jobs
from tests.training.tiny import losses, steps, write_recipe

ZERO = "--trainer.strategy=mmfusion.training.strategies.zero.ZeRO"
ALL_DIVIDED = (
    "--trainer.strategy.config={zero_optimization: {stage3_param_persistence_threshold: 0}}"
)
OFFLOAD = "--trainer.strategy.offload=cpu"
STRATEGIES = {
    "auto": [],
    "ddp": ["--trainer.strategy=ddp"],
    "zero1": [ZERO, "--trainer.strategy.stage=1"],
    "zero2": [ZERO, "--trainer.strategy.stage=2"],
    "zero3": [ZERO, "--trainer.strategy.stage=3", ALL_DIVIDED],
    "zero2_offload": [ZERO, "--trainer.strategy.stage=2", OFFLOAD],
    "zero3_offload": [ZERO, "--trainer.strategy.stage=3", ALL_DIVIDED, OFFLOAD],
    "fsdp2": ["--strategy=fsdp2"],
    "shards": ["--strategy=fsdp2", "--checkpoint.sharded=true"],
    "sequence": ["--sequence_parallel=2", "--trainer.strategy=ddp"],
    "tensor": [
        "--trainer.strategy=mmfusion.training.strategies.fsdp2.FSDP2",
        "--trainer.strategy.tensor_parallel=2",
    ],
}
"""Options of each strategy."""
SHARING = ("sequence", "tensor")
"""Of these, ranks that share a pack: not on one, nor with the dropout of runs that share none."""
MANIFEST = "manifest.json"
STEPS, EVERY, KEEP = 36, 3, 2
LIMIT = 300.0
"""Seconds in which the ranks that are left have to end."""
CLOSE = 1e-5
"""Relative difference of losses where strategy or number of ranks change."""


@dataclass(frozen=True)
class Setting:
    """How a start of a run is distributed."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy} x {self.ranks}"


@dataclass
class Case:
    """Runs of one kind, and what was seen of them.

    Attributes:
        settings: each start takes one of them at random; where there is one alone, results are
            exactly those of an uninterrupted run.
        behind: whether checkpoints are written while training goes on.
    """

    name: str
    settings: list[Setting]
    behind: bool = False
    seen: Counter[str] = field(default_factory=Counter)
    furthest: float = 0.0
    """Largest relative difference of a loss."""

    @property
    def exact(self) -> bool:
        return len(self.settings) == 1

    @property
    def sharded(self) -> bool:
        options = (option for one in self.settings for option in STRATEGIES[one.strategy])
        return any(option.startswith("--checkpoint.sharded") for option in options)

    @property
    def reference(self) -> Setting:
        return self.settings[0]


class Kills:
    """The place of all runs, and the uninterrupted ones they are compared with.

    Args:
        folder: that all is written to.
        seed: of moments and victims.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        packs = {"class_path": "tests.training.tiny.Recorder"}
        self.recipe = write_recipe(
            folder,
            trainer__max_steps=STEPS,
            trainer__callbacks=[packs | {"init_args": {"folder": "packs"}}],
            checkpoint={"every_n_steps": EVERY, "keep_last": KEEP},
        )
        self.whole: dict[Setting, Run] = {}

    def uninterrupted(self, setting: Setting) -> Run:
        """A run of the setting, with all its checkpoints; made once."""
        if setting not in self.whole:
            name = f"whole-{setting.strategy}-{setting.ranks}"
            run = Run(self, Case(name, [setting]), name, [f"--checkpoint.keep_last={STEPS}"])
            codes = ended(run.start(setting))
            assert set(codes) == {0}, run.told()
            run.put_packs_aside()
            self.whole[setting] = run
        return self.whole[setting]


class Run:
    """A run that is started again and again."""

    def __init__(self, kills: Kills, case: Case, name: str, options: Sequence[str] = ()) -> None:
        self.kills, self.case, self.name = kills, case, name
        self.home = kills.folder / name
        self.home.mkdir()
        self.path = self.home / "run"
        self.directory = RunDirectory(self.path)
        self.checkpoints = self.directory.checkpoints
        self.options = [*options, *(["--checkpoint.behind=true"] if case.behind else [])]
        self.starts: list[int | None] = []
        """Of each start, the step it went on from; None where it was killed before that."""
        self.ranks: list[BaseProcess] = []

    def start(self, setting: Setting) -> list[BaseProcess]:
        """The same command as ever."""
        args = ["fit", "-c", str(self.kills.recipe), f"--run_dir={self.path}"]
        args += [f"--trainer.devices={setting.ranks}", "--timeout_minutes=1"]
        args += [*STRATEGIES[setting.strategy], *self.options]
        self.ranks = jobs.start_ranks(
            args, self.home / "log", setting.ranks, prepare=Inside(str(self.home))
        )
        return self.ranks

    def told(self) -> str:
        """The end of what the ranks have said."""
        logs = sorted(self.home.glob("log.*"))
        return "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in logs)

    def put_packs_aside(self) -> None:
        """What this start has recorded, and where it began."""
        number = len(self.starts)
        folder = self.home / "packs"
        if folder.exists():
            for file in folder.glob("*.jsonl"):  # a line may be cut short
                whole = file.read_bytes()
                file.write_bytes(whole[: whole.rfind(b"\n") + 1])
            folder.rename(self.home / f"packs-{number}")
        taken = sum(begun is not None for begun in self.starts)
        attempts = self.directory.attempts()[taken:]
        assert len(attempts) <= 1, attempts
        about = [attempt / "attempt.json" for attempt in attempts]
        began = [json.loads(file.read_text())["step"] for file in about if file.exists()]
        if attempts and not began:  # its folder was made, and no more
            attempts[0].rename(self.home / f"attempt-{number}")
        self.starts.append(began[0] if began else None)

    def packs(self, start: int) -> dict[int, tuple[list[Any], list[int]]]:
        """That a start has recorded, by step."""
        return steps(self.home / f"packs-{start}")


@dataclass(frozen=True)
class Inside:
    """What a rank does first: enter the run's place, in a group of its own."""

    folder: str

    def __call__(self) -> None:
        os.setpgrp()
        os.chdir(self.folder)


def ended(ranks: Sequence[BaseProcess], limit: float = 600.0) -> list[int | None]:
    """Their exit codes; None of those that are still there."""
    until = time.monotonic() + limit
    for rank in ranks:
        rank.join(max(0.0, until - time.monotonic()))
    return [rank.exitcode for rank in ranks]


# ---- a kill


def chase(run: Run, wants_writing: bool) -> bool:
    """Start the run, kill it once; whether it was, or had come to its end before."""
    kills, case = run.kills, run.case
    draw = kills.draw
    setting = draw.choice(case.settings)
    ranks = run.start(setting)
    came = writing(run) if wants_writing else anywhere(run)
    alone = len(ranks) > 1 and draw.random() < 0.5
    victims = [draw.choice(ranks)] if alone else ranks
    if not came or not any(rank.is_alive() for rank in ranks):
        codes = ended(ranks)
        run.put_packs_aside()
        assert set(codes) == {0}, f"{run.name}: {codes}\n{run.told()}"
        return False
    for victim in victims:
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
    codes = ended(ranks, LIMIT)
    left = [rank for rank in ranks if rank.exitcode is None]
    for rank in left:
        rank.kill()
    assert not left, (
        f"{run.name}: a rank was still there {LIMIT:.0f} s after the kill\n{run.told()}"
    )
    nobody_left(ranks)
    run.put_packs_aside()
    if set(codes) == {0}:  # it had ended by itself
        return False
    case.seen["kills"] += 1
    print(
        f"  {time.strftime('%H:%M:%S')} {run.name} start {len(run.starts)} ({setting}) killed "
        f"{'while it saved' if wants_writing else 'anywhere'}, {len(victims)} of {len(ranks)}",
        file=sys.stderr,
    )
    case.seen["one rank"] += alone
    if run.starts[-1] is None or not (run.home / f"packs-{len(run.starts) - 1}").exists():
        case.seen["starting"] += 1
    return True


def anywhere(run: Run) -> bool:
    """Wait for a random moment of a run; False where its end came first."""
    draw, began = run.kills.draw, time.monotonic()
    if draw.random() < 0.15:  # while it starts
        wanted = draw.uniform(0, 4)
        return watched(run, lambda: time.monotonic() - began > wanted)
    file, batches = run.home / "packs" / "rank0.jsonl", draw.randrange(1, 14)
    if not watched(run, lambda: file.exists() and file.read_bytes().count(b"\n") >= batches):
        return False
    time.sleep(draw.uniform(0, 0.15))
    return True


def writing(run: Run) -> bool:
    """Wait for a checkpoint that is being written; False where the run's end came first."""
    draw, seen = run.kills.draw, set(unfinished(run))
    wanted = len(seen) + draw.choice((1, 1, 2, 3))

    def found() -> bool:
        seen.update(unfinished(run))
        return len(seen) >= wanted

    if not watched(run, found):
        return False
    if draw.random() < 0.7:
        until = time.perf_counter() + draw.uniform(0, 0.012)  # the file, its name, the old ones
        while time.perf_counter() < until:
            pass
    return True


def watched(run: Run, there: Callable[[], bool]) -> bool:
    """Until something is there; False where the run's end comes first."""
    while not there():
        if not any(rank.is_alive() for rank in run.ranks):
            return False
        time.sleep(0.0005)
    return True


def unfinished(run: Run) -> list[str]:
    """Files of checkpoints that have no name yet, and folders that have no manifest."""
    try:
        names = os.listdir(run.checkpoints)
    except FileNotFoundError:
        return []
    return [
        name
        for name in names
        if name.startswith(".step-")
        or (re.fullmatch(r"step-\d+", name) and not (run.checkpoints / name / MANIFEST).exists())
    ]


def nobody_left(ranks: Sequence[BaseProcess]) -> None:
    """Processes that the ranks have started end as well."""
    until = time.monotonic() + LIMIT
    for rank in ranks:
        while True:
            try:
                os.killpg(rank.pid or 0, 0)
            except ProcessLookupError:
                break
            assert time.monotonic() < until, f"processes of rank {rank.pid} are still there"
            time.sleep(0.05)


# ---- what is there afterwards


def look(run: Run) -> int:
    """Note how far the kill got; check all that has a checkpoint's name; the newest's step."""
    case = run.case
    torn = unfinished(run)
    found = named(run.checkpoints)
    latest = run.checkpoints / "latest"
    pointed = latest.read_text().strip() if latest.exists() else ""
    newest = found[-1].name if found else ""
    behind = pointed != newest or len(found) > KEEP
    case.seen["writing"] += bool(torn) or behind
    case.seen["torn file"] += bool(torn)
    case.seen["no pointer or old ones"] += not torn and behind
    for path in found:
        read_by_hand(path)
    if not found:
        return 0
    compare(run, found[-1])
    return step_of(found[-1])


def named(folder: Path) -> list[Path]:
    """What has a checkpoint's name, by step: files, and folders with a manifest."""
    files = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+\.ckpt", path.name)]
    folders = [path.parent for path in folder.glob(f"step-*/{MANIFEST}")]
    return sorted([*files, *folders])


def step_of(path: Path) -> int:
    return int(path.name[5:13])


def size_of(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def read_by_hand(path: Path) -> dict[str, Any]:
    """A checkpoint that is whole, without the program's own means; but a folder is read by them."""
    if path.is_dir():
        made = json.loads((path / MANIFEST).read_text())
        for name, entry in made["files"].items():
            assert hashlib.sha256((path / name).read_bytes()).hexdigest() == entry["sha256"], path
        return read_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, path
        (name,) = [name for name in archive.namelist() if name.endswith("manifest.json")]
        made = json.loads(archive.read(name))
        for member in set(archive.namelist()) - {name}:
            found = hashlib.sha256(archive.read(member)).hexdigest()
            assert made["files"][member]["sha256"] == found, (path, member)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    assert content["global_step"] == made["step"] == step_of(path), path
    return content


def compare(run: Run, path: Path) -> None:
    """Weights and optimizer, with those of the uninterrupted run at the same step."""
    whole = run.kills.uninterrupted(run.case.reference)
    (right,) = [p for p in named(whole.checkpoints) if step_of(p) == step_of(path)]
    ours, theirs = read_by_hand(path), read_by_hand(right)
    near = {"rtol": 0.0, "atol": 0.0} if run.case.exact else {"rtol": 1e-4, "atol": 1e-5}
    for key in ("state_dict", "optimizer_states"):
        found, known = dict(tensors(ours[key])), dict(tensors(theirs[key]))
        torch.testing.assert_close(found, known, **near, msg=lambda m: f"{path}: {m}")
    stream = [one["callbacks"]["mmfusion.stream"] for one in (ours, theirs)]
    assert stream[0] == stream[1], path


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Those of a state, by their places in it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from tensors(item, f"{name}.{key}")


def went_on(run: Run, expected: int) -> None:
    """The start that just ended began where it had to, if it came so far."""
    began = run.starts[-1]
    if began is None:
        return
    assert began == expected, f"{run.name} went on from step {began}, expected {expected}"
    run.case.seen["resumed"] += expected > 0
    packs = run.home / f"packs-{len(run.starts) - 1}"
    if packs.exists() and (recorded := run.packs(len(run.starts) - 1)):
        assert min(recorded) == expected


def finished(run: Run) -> None:
    """A run that came to its end: losses, packs, the last checkpoint, the folder."""
    case, whole = run.case, run.kills.uninterrupted(run.case.reference)
    assert run.directory.status()["state"] == "finished"
    expected = losses(whole.directory)
    assert sorted(losses(run.directory)) == sorted(expected) == list(range(STEPS))
    if case.exact:
        assert losses(run.directory) == expected
    for row in read_metrics(run.path / "metrics.csv", all_attempts=True):  # repeated ones too
        if "train/loss" in row:
            right = float(expected[int(row["trainer/global_step"])])
            apart = abs(row["train/loss"] - right) / abs(right)
            assert apart <= (0.0 if case.exact else CLOSE), row
            case.furthest = max(case.furthest, apart)
    check_packs(run, whole.packs(0))
    left = named(run.checkpoints)
    assert [step_of(path) for path in left][-1] == STEPS
    read_by_hand(left[-1])
    compare(run, left[-1])
    names = {path.name for path in run.checkpoints.iterdir()}
    assert names == {"latest"} | {path.name for path in left}, names
    assert len(left) == KEEP
    assert (run.checkpoints / "latest").read_text().strip() == left[-1].name
    rest = [path for path in run.path.rglob(".*") if path.name != ".lock"]
    assert not rest, rest
    case.seen["runs"] += 1


def check_packs(run: Run, right: dict[int, tuple[list[Any], list[int]]]) -> None:
    """What each start trained up to the checkpoint that the next went on from: every step once,
    with its own samples. What it trained beyond that was no other.
    """
    began = [(i, step) for i, step in enumerate(run.starts) if step is not None]
    ends = [step for _, step in began[1:]] + [STEPS]
    samples: list[Any] = []
    for (i, first), end in zip(began, ends, strict=True):
        if not (run.home / f"packs-{i}").exists():
            assert first == end, f"{run.name}: steps {first} to {end} were never trained"
            continue
        found = run.packs(i)
        for step in range(first, end):
            assert found[step] == right[step], f"{run.name}, start {i}, step {step}"
            samples += found[step][0]
        for step, (taken, _) in found.items():
            known = Counter(map(tuple, right[step][0]))
            assert step >= first, (run.name, i, step)
            assert Counter(map(tuple, taken)) <= known, (run.name, i, step)
    assert samples == [sample for step in range(STEPS) for sample in right[step][0]]
    run.case.seen["samples"] += len(samples)


# ---- all of them


def killed_runs(kills: Kills, case: Case, number: int) -> None:
    """Run after run, until so many kills."""
    runs = 0
    while case.seen["kills"] < number or case.seen["writing"] < (number + 1) // 2:
        case.behind = bool(runs % 2)  # every other run, behind training
        run = Run(kills, case, f"{case.name.replace(' x ', '-')}-{runs}")
        runs, newest, done = runs + 1, 0, False
        while not done and case.seen["kills"] - number < max(number, 8):
            enough = case.seen["kills"] >= number and case.seen["writing"] >= (number + 1) // 2
            if enough:
                last_start(run, newest)
                break
            lacks = case.seen["writing"] / max(case.seen["kills"], 1) < 0.5
            done = not chase(run, lacks or case.seen["kills"] >= number)
            went_on(run, newest)
            if not done:
                newest = look(run)
        else:
            assert done, f"{case.name}: kills do not come while a checkpoint is written"
        finished(run)
        case.seen["gone on"] = case.seen["kills"]  # in this run as in those before
        shutil.rmtree(run.home)


def last_start(run: Run, newest: int) -> None:
    """To the end."""
    setting = run.kills.draw.choice(run.case.settings)
    codes = ended(run.start(setting))
    assert set(codes) == {0}, f"{run.name}: {codes}\n{run.told()}"
    run.put_packs_aside()
    went_on(run, newest)


def full_disk(kills: Kills, case: Case) -> None:
    """A disk that is full ends the run; with room on it the same command goes on."""
    run = Run(kills, case, f"full-{case.name.replace(' x ', '-')}")
    run.path.mkdir()
    with small_disk(run.path, "64m"):
        ranks = run.start(case.reference)
        wanted = kills.draw.randrange(1, 5) * EVERY
        assert watched(run, lambda: any(step_of(p) >= wanted for p in named(run.checkpoints)))
        size = size_of(named(run.checkpoints)[-1])
        fill(run.path / "filler", kills.draw.randrange(size // 4096) * 4096)
        codes = ended(ranks, LIMIT)
        run.put_packs_aside()
        assert None not in codes, f"{run.name}: still there {LIMIT:.0f} s after the disk was full"
        assert 0 not in codes, f"{run.name} ended as if all was well\n{run.told()}"
        assert "No space left on device" in run.told(), run.told()
        went_on(run, 0)
        case.seen["full"] += 1
        newest = look(run)
        (run.path / "filler").unlink()
        last_start(run, newest)
        finished(run)
        case.seen["full resumed"] += 1
    shutil.rmtree(run.home)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path, leave: int) -> None:
    """All of the disk but so many bytes."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            file.truncate(file.tell() - leave)


def may_mount(folder: Path) -> bool:
    """Whether this process can make a small disk."""
    try:
        with small_disk(folder, "1m"):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False


def table(cases: Sequence[Case]) -> str:
    """One line a case, in Markdown."""
    columns = {
        "kills": "kills",
        "of one rank alone": "one rank",
        "while starting": "starting",
        "while saving": "writing",
        "file torn": "torn file",
        "gone on": "gone on",
        "from a checkpoint": "resumed",
        "runs finished": "runs",
    }
    rows = [["", *columns, "loss", "disk full"]]
    rows.append([*["---"] * len(rows[0])])
    for case in cases:
        loss = "equal" if not case.furthest else f"within {case.furthest:.0e}"
        full = f"{case.seen['full resumed']} of {case.seen['full']}" if case.seen["full"] else "-"
        rows.append([case.name, *(str(case.seen[key]) for key in columns.values()), loss, full])
    total = Counter[str]()
    for case in cases:
        total.update(case.seen)
    full = f"{total['full resumed']} of {total['full']}" if total["full"] else "-"
    rows.append(["all", *(str(total[key]) for key in columns.values()), "", full])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(args: Sequence[str] | None = None) -> list[Case]:
    """All runs; an assertion says what is not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--strategies", default=",".join(list(STRATEGIES)[1:]), help="with two ranks"
    )
    parser.add_argument("--no-mixed", action="store_true", help="no runs that change theirs")
    parser.add_argument("--no-full", action="store_true", help="no full disks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: a temporary one, on this disk")
    given = parser.parse_args(args)
    names = [name for name in given.strategies.split(",") if name]
    two = [Setting(name, 2) for name in names]
    one = Setting("auto", 1)
    cases = [Case(str(setting), [setting]) for setting in two]
    if not given.no_mixed:
        others = [Setting(name, n) for name in names if name not in SHARING for n in (1, 2)]
        cases = [Case("changing", [one, *others]), Case(str(one), [one]), *cases]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    jobs.CONTEXT.set_forkserver_preload([*jobs.PRELOAD, "deepspeed"])  # seconds of each start
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="kills-") as folder:
        kills = Kills(Path(folder), given.seed)
        for i, case in enumerate(cases):
            killed_runs(
                kills, case, given.kills * (i + 1) // len(cases) - given.kills * i // len(cases)
            )
            print(f"{time.monotonic() - began:5.0f} s  {case.name}: {dict(case.seen)}", flush=True)
        if given.no_full:
            pass
        elif may_mount(kills.folder / "llm"):
            for i, case in enumerate(cases):
                if case.exact:
                    case.behind = bool(i % 2)
                    full_disk(kills, case)
        else:
            print("SKIPPED: full disks, for mounting a small one needs root")
    print(f"\nseed {given.seed}, {time.monotonic() - began:.0f} s\n\n{table(cases)}")
    return cases


if __name__ == "__main__":
    main(sys.argv[1:])
