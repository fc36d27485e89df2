"""Keys, tokens and passwords, which must not reach a log, a tracker or a saved recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_NAME = re.compile(
    r"(^|_)(api_?key|secret|password|passwd|credentials?|(access|auth|hf|hub|bearer)_token)$|^token$",
    re.I,
)
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.I)
_HIDDEN = "(hidden)"


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable is named like a key, token or password."""
    return bool(_SECRET_VARIABLE.search(name) or _SECRET_NAME.search(name))


def hide_secrets(value: Any, name: str = "") -> Any:
    """A copy of a configuration in which keys, tokens and passwords are hidden.

    Hidden are strings under a telling name (``api_key``, ``token``, ...), Hugging Face tokens, and
    every occurrence of the value of an environment variable that is named like a secret.
    """
    if isinstance(value, Mapping):
        return {key: hide_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(hide_secrets(item, name) for item in value)
    if not isinstance(value, str):
        return value
    if _SECRET_NAME.search(name):
        return _HIDDEN
    for variable, secret in os.environ.items():
        if len(secret) >= 8 and _SECRET_VARIABLE.search(variable):
            value = value.replace(secret, _HIDDEN)
    value = _SECRET_VALUE.sub(_HIDDEN, value)
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", rf"\1:{_HIDDEN}@", value)
