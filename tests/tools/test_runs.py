"""``mmfusion runs`` over what accidents leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfusion.cli import main
from mmfusion.tools.runs import FAILURES, standing, worth_another
from mmfusion.training.run import RunDirectory


def write_status(folder: Path, status: object) -> RunDirectory:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text('{"id": "a"}')
    (folder / "status.json").write_text(json.dumps(status))
    return RunDirectory(folder)


def test_a_reason_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich takes words in brackets for styles."""
    monkeypatch.setenv("COLUMNS", "300")
    reason = "ValueError: [/data/x] and [red] are not there"
    write_status(tmp_path / "one", {"state": "failed", "step": 3, "reason": reason})
    main(["runs", str(tmp_path)])
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("step", [None, "abc", [1]])
def test_a_damaged_run_hides_no_other(tmp_path: Path, step: object) -> None:
    run = write_status(tmp_path, {"state": "failed", "step": step})
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe\n\n")
    assert (standing(run).step, standing(run).loss) == (0, None)


def test_a_torn_note_of_a_failure_is_no_reason_to_give_up(tmp_path: Path) -> None:
    (tmp_path / FAILURES).write_text('{"newest": null, "at": "x"}\n{"newest": nu')
    assert worth_another(RunDirectory(tmp_path), 3)
    assert not worth_another(RunDirectory(tmp_path), 3)
