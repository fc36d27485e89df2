"""The ``mmfusion`` command.

``fit``, ``validate``, ``test`` and ``predict`` take a recipe (``mmfusion.training.command``); the
other commands are functions of ``mmfusion.tools`` whose signature and docstring are their options
and help. Nothing heavy is imported before a command is known.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from mmfusion import __version__
from mmfusion.stopping import stopping_at_once

if TYPE_CHECKING:
    pass

RECIPE_COMMANDS = {
    "fit": "train a recipe; the same command in the same run directory goes on",
    "validate": "losses and metrics of a run on the recipe's validation data",
    "test": "as validate, under the name test/",
    "predict": "loss of every validation sample, as JSON lines",
}
TOOLS = {
    "data build": ("mmfusion.tools.data_build:build", "make shards from a list of samples"),
    "data index": ("mmfusion.tools.data_index:index", "check shards and write their indexes"),
    "data encode": (
        "mmfusion.tools.data_encode:encode",
        "compute what frozen parts give once, into shards",
    ),
    "data at-step": ("mmfusion.tools.data_at_step:at_step", "the samples of an optimizer step"),
    "describe": (
        "mmfusion.tools.describe:describe",
        "parts, shapes, parameters, memory of a recipe",
    ),
    "plan": (
        "mmfusion.tools.plan.main:plan",
        "memory by strategy, days, and what would fail in a run's first hour",
    ),
    "launch": (
        "mmfusion.tools.launch.main:launch",
        "start a recipe here, under torchrun, on Slurm or on Kubernetes",
    ),
    "checkpoints": (
        "mmfusion.tools.checkpoints:checkpoints",
        "the checkpoints of a run: list, verify, prune",
    ),
    "runs": ("mmfusion.tools.runs:runs", "the runs of a folder and how they stand"),
    "sync": ("mmfusion.tools.sync:sync", "send what a run left on the disk to W&B"),
    "sweep": (
        "mmfusion.tools.sweep.main:sweep",
        "a recipe over a grid or random values, here or on Slurm",
    ),
    "chat": ("mmfusion.tools.chat:chat", "talk to a run in the terminal"),
    "train-generator": (
        "mmfusion.tools.train_generator:train_generator",
        "a small generator from nothing, from a recipe",
    ),
    "quickstart": (
        "mmfusion.tools.quickstart.main:quickstart",
        "train a model that sees and hears in minutes on a CPU",
    ),
}
TRACEBACK = "MMFUSION_TRACEBACK"
NO_COMMAND = 2
"""The code where a recipe or a command line is none."""
REFUSED = "MMFUSION_REFUSED"
"""A file that is made then: the code of a rank is lost in torchrun's agent (launch/torchrun.sh)."""
_UNION = re.compile(
    r"(?P<key>.*?)\s*Does not validate against any of the Union subtypes\n\s*Subtypes: .*?\n"
    r"\s*Errors:\n(?P<errors>.*?)\n\s*Given value type: .*?(?:\n(?P<end>Did you mean [^\n]*))?",
    re.DOTALL,
)
"""What jsonargparse says of a value of a key that may also be null."""
ON_CPUS = {
    # Packs differ in length, and oneDNN keeps 1024 kernels: it would make them again and again.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384",
    # Threads that wait for one another spin, and keep a busy core from the one they wait for.
    "GOMP_SPINCOUNT": "10000",
}
"""Read by PyTorch's libraries when they are loaded; what the user has set stays."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line (default: this process's)."""
    args = list(sys.argv[1:] if argv is None else argv)
    for name, value in ON_CPUS.items():
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault(name, value)
    show_traceback = os.environ.get(TRACEBACK, "") not in ("", "0")
    if "--traceback" in args:
        args.remove("--traceback")
        show_traceback = True
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return
    if args[0] in ("-V", "--version"):
        print(f"mmfusion {__version__}")
        return
    name, rest = _command(args)
    try:
        _run(name, rest)
    except KeyboardInterrupt:
        _fail(name, "interrupted.", 130)
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and name in TOOLS:
            _reader_is_gone()
        if show_traceback:
            raise
        # From a loader process a message comes with that process's traceback before it.
        message = str(error).rpartition(f".{type(error).__name__}: ")[2]
        _fail(name, _without_union(message), getattr(error, "exit_code", 1))


def usage() -> str:
    """What ``mmfusion --help`` prints."""
    lines = [
        "usage: mmfusion COMMAND ...",
        "",
        "Train any-to-any multimodal LLMs from one recipe.",
        "",
    ]
    helps = {**RECIPE_COMMANDS, **{name: text for name, (_, text) in TOOLS.items()}}
    lines += [f"  {name:<14} {text}" for name, text in helps.items()]
    lines += [
        "",
        "mmfusion COMMAND --help shows the options, mmfusion fit -c RECIPE --print_config the",
        f"whole recipe. Errors are one message; --traceback (or {TRACEBACK}=1) shows where from.",
    ]
    return "\n".join(lines)


def _command(args: list[str]) -> tuple[str, list[str]]:
    """The command's name and its arguments."""
    names = [*RECIPE_COMMANDS, *TOOLS]
    for length in (2, 1):
        name = " ".join(args[:length])
        if name in names:
            return name, args[length:]
    typed = " ".join(arg for arg in args[:2] if not arg.startswith("-"))
    group = [name for name in names if name.split()[0] == args[0]]
    close = (
        group
        or difflib.get_close_matches(typed, names, 1)
        or difflib.get_close_matches(args[0], names, 1)
    )
    hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    _fail("", f"there is no command {typed or args[0]!r}.{hint} See mmfusion --help.", NO_COMMAND)


def _run(name: str, args: list[str]) -> Any:
    if name in RECIPE_COMMANDS:
        with stopping_at_once() if name == "fit" else nullcontext():
            from mmfusion.training.command import run_command

            return run_command(name, args)
    from jsonargparse import auto_cli

    module, function = TOOLS[name][0].split(":")
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        tool = getattr(importlib.import_module(module), function)
        words = _with_recipes(tool, _spelled_out(tool, args))
        result = auto_cli(tool, args=words, prog=f"mmfusion {name}")
        sys.stdout.flush()  # a reader that is gone is noticed here, not when Python ends
        return result
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """A tool removes what it has not finished."""
    raise SystemExit(128 + number)


def _reader_is_gone() -> NoReturn:
    """Whoever read the output (``| head``) has enough: end as other programs do, without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(128 + signal.SIGPIPE)


def _spelled_out(tool: Callable[..., Any], args: Sequence[str]) -> list[str]:
    """``--with-baselines`` as ``--with_baselines=true``: the parser wants underscores, and a value
    for every option. What it does not know, ``--data.seed=1``, is one of the tool's ``overrides``.
    """
    options = inspect.signature(tool).parameters
    spelled = []
    if args and not args[0].startswith("-") and all(o.default != o.empty for o in options.values()):
        args = [f"--{next(iter(options))}={args[0]}", *args[1:]]  # runs FOLDER
    for arg, after in pairwise([*args, ""]):
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        own = name in options or name == "config"
        if arg.startswith("--") and equals and "overrides" in options and not own:
            spelled.append(f"--overrides+={arg}")
        elif not arg.startswith("--") or name not in options:
            spelled.append(arg)
        elif options[name].default is False and not equals and after not in ("true", "false"):
            spelled.append(f"--{name}=true")
        else:
            spelled.append(f"--{name}{equals}{value}")
    return spelled


def _with_recipes(tool: Callable[..., Any], args: Sequence[str]) -> list[str]:
    """``-c A -c B``, as ``mmfusion fit`` takes recipes: the first is the tool's ``recipe``, where
    that is not given by itself, and the others are among its ``overrides``.
    """
    options = inspect.signature(tool).parameters
    if not {"recipe", "overrides"} <= options.keys():
        return list(args)
    required = sum(option.default is option.empty for option in options.values())
    another = "--overrides+=--config="
    found, rest = [], iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        if name in ("-c", "--config"):
            found.append(another + (value if equals else next(rest, "")))
            continue
        found.append(arg)
        if arg.startswith("--") and not equals and name.removeprefix("--") in options:
            found += [value for value in [next(rest, None)] if value is not None]
        elif not arg.startswith("-"):
            required -= 1
    recipes = [arg for arg in found if arg.startswith(another)]
    if required > 0 and recipes:
        found.remove(recipes[0])
        found.insert(0, recipes[0].removeprefix(another))
    return found


def _without_union(message: str) -> str:
    """What the parser says of a key that may be left out: what is wrong with the value, without
    that it could have been null, and without the whole value.
    """
    found = _UNION.fullmatch(message)
    if found is None:
        return message
    _, *reasons = re.split(r"\n\s*- ", "\n" + found["errors"])
    told = [text for text in reasons if "Expected a <class 'NoneType'>" not in text] or reasons
    return "\n".join(filter(None, [found["key"].strip(), *told, found["end"]]))


def _fail(command: str, message: str, code: int) -> NoReturn:
    print(f"mmfusion{' ' + command if command else ''}: error: {message}", file=sys.stderr)
    if code == NO_COMMAND and (note := os.environ.get(REFUSED)):
        with suppress(OSError):
            Path(note).touch()
    raise SystemExit(code)
