from __future__ import annotations

import pytest

from mmfusion.paths import expand


def test_variables_and_the_cache_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "/x")
    monkeypatch.setenv("TOKENS", "/tokens")
    monkeypatch.setenv("MMFUSION_CACHE", "/cache")
    assert expand("$SOME_FOLDER/${TOKENS}/a") == "/x//tokens/a"
    assert expand("$MMFUSION_CACHE/a") == "/cache/a"


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(ValueError, match=r"\$NO_SUCH_FOLDER/a.*not set"):
        expand("$NO_SUCH_FOLDER/a")


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "token", "AWS_SECRET_ACCESS_KEY", "S3_SECRET", "PGPASSWORD"],
)
@pytest.mark.parametrize("written", ["${}/x-*.tar", "${{{}}}/x", "a/${}", "$NO_SUCH_FOLDER/${}"])
def test_a_variable_named_like_a_secret_is_refused_and_not_shown(
    name: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "abcdefgh12345")
    with pytest.raises(ValueError, match=f"names the environment variable {name}, ") as error:
        expand(written.format(name))
    assert "abcdefgh12345" not in str(error.value)
