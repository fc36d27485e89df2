"""Keys are hidden, words are not."""

from __future__ import annotations

import pytest

from mmfusion.training.secrets import hide_secrets


def test_secrets_are_hidden_and_tokens_of_text_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12345")
    config = {
        "hf_token": "xyz",
        "next_token": {"weight": 1.0},
        "pack_tokens": 2048,
        "tokens": ["<a>"],
        "note": "key=abcdefgh12345.",
        "url": "https://me:pw@host/x",
        "nested": [{"api_key": "q"}],
    }
    assert hide_secrets(config) == {
        "hf_token": "(hidden)",
        "next_token": {"weight": 1.0},
        "pack_tokens": 2048,
        "tokens": ["<a>"],
        "note": "key=(hidden).",
        "url": "https://me:(hidden)@host/x",
        "nested": [{"api_key": "(hidden)"}],
    }
