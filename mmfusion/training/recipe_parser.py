"""Reads a recipe and its overrides; what is wrong with them is one message, with a suggestion."""

from __future__ import annotations

import difflib
import re
import sys
from collections import deque
from collections.abc import Mapping
from pydoc import locate
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser


class RecipeParser(LightningArgumentParser):
    """Errors are one message that names the key, with a suggestion."""

    def parse_path(self, cfg_path: Any, *args: Any, **options: Any) -> Namespace:
        """Read one recipe of possibly several; an error says which."""
        try:
            return super().parse_path(cfg_path, *args, **options)
        except (RecipeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{cfg_path}: {error}") from error

    def parse_string(self, content: str, *args: Any, **options: Any) -> Namespace:
        """Read the text of a recipe, in which no key may come twice."""
        refuse_repeated_keys(content)
        return super().parse_string(content, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error for the command to print."""
        if message.strip().startswith("the following arguments are required: model."):
            message += "\nA recipe gives them: -c RECIPE."
        raise RecipeError(with_suggestion(message, known_keys(self))) from ex


class RecipeError(ValueError):
    """A recipe or an override that cannot be used."""

    exit_code = 2


def refuse_repeated_keys(text: str) -> None:
    """YAML keeps the last of two equal keys without a word.

    Raises:
        RecipeError: with the key and the lines of both.
    """
    try:
        todo = deque([(yaml.compose(text, yaml.SafeLoader), "")])
    except yaml.YAMLError:
        return  # the parser says what is wrong
    seen = set()  # an alias stands for its node many times, or inside itself
    while todo:
        node, above = todo.popleft()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += [(item, f"{above}{i}.") for i, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            _refuse_repeated(node, above)
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else "?"
                todo.append((value, f"{above}{name}."))


def _refuse_repeated(mapping: yaml.MappingNode, above: str) -> None:
    lines: dict[Any, int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        line = key.start_mark.line + 1
        if (key.tag, key.value) in lines:
            raise RecipeError(
                f"the key '{above}{key.value}' comes twice, in lines {lines[key.tag, key.value]} "
                f"and {line}, of which YAML would keep the last; join them."
            )
        lines[key.tag, key.value] = line


def ignored_key(given: Any, parsed: Any, above: str = "") -> str | None:
    """The first key of a recipe that the parser left out without a word, as it does with unknown
    ones whose value is empty.
    """
    if not isinstance(given, Mapping) or not isinstance(parsed, (Namespace, Mapping)):
        return None
    for key, value in given.items():
        if key == "init_args" and given.get("class_path") != parsed.get("class_path"):
            continue  # another recipe or an override put another class in its place
        if key not in parsed:
            if value in ({}, None):
                return f"{above}{key}"
            continue
        if found := ignored_key(value, parsed[key], f"{above}{key}."):
            return found
    return None


def refuse_functions(value: Any, key: str = "") -> None:
    """A recipe composes classes of the kinds its keys ask for. A function named as a class would be
    called with the arguments that a stranger wrote.

    Raises:
        RecipeError: with the key.
    """
    if isinstance(value, (Namespace, Mapping)):
        items = vars(value) if isinstance(value, Namespace) else value
        name = items.get("class_path")
        if isinstance(name, str) and not isinstance(locate(name), type):
            raise RecipeError(f"{key}.class_path is {name}, which is no class; expected one.")
        for part, item in items.items():
            refuse_functions(item, f"{key}.{part}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            refuse_functions(item, f"{key}.{number}")


def with_suggestion(message: str, keys: Mapping[str, str]) -> str:
    """A parser's message and, where it names an unknown key or class, the closest known one.

    Args:
        message: what the parser says.
        keys: of :func:`known_keys`.
    """
    message = message.strip()
    if "Did you mean" in message:
        return message
    close: list[str] = []
    for match in re.finditer(r"[Oo]ption '([\w.]+)'|arguments?: -*([\w.]+)", message):
        name = match[1] or match[2]
        alike = difflib.get_close_matches(name, keys, 1) or difflib.get_close_matches(
            name.split(".")[0], keys, 1
        )
        close += [keys[key] for key in alike]
    for module, name in re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        classes = {
            key.lower(): key
            for key, value in vars(sys.modules[module]).items()
            if getattr(value, "__module__", "") == module
        }
        found = difflib.get_close_matches(name.lower(), classes, 1)
        close += [classes[key] for key in found]
    return f"{message}\nDid you mean {close[0]!r}?" if close else message


def known_keys(parser: LightningArgumentParser) -> dict[str, str]:
    """What one may have meant -> what to write: every key of a recipe, by its whole name, its first
    and its last.
    """
    whole = [action.dest for action in parser._actions]
    firsts = {key.split(".")[0]: key.split(".")[0] for key in whole}
    lasts = {key.split(".")[-1]: key for key in reversed(whole)}
    return {**lasts, **firsts, **{key: key for key in whole}}
