"""The terminal chat as a user runs it: a process with lines on its standard input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config

import mmfusion
from mmfusion.models.projectors.linear import Linear
from mmfusion.tools.chat import Session
from mmfusion.types import Media, Message, Text
from tests.models.tiny import save_llm, tiny_model
from tests.recipes.tiny_cache import encoders, fill
from tests.training.tiny import fit, write_recipe


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(write_recipe(tmp_path_factory.mktemp("chat"), trainer__max_steps=4)).path


@pytest.fixture(scope="module")
def loaded(run_dir: Path) -> mmfusion.inference.Chat:
    return mmfusion.load(run_dir, device="cpu")


@pytest.fixture
def session(loaded: mmfusion.inference.Chat) -> Session:
    return Session(loaded, {"max_new_tokens": 6})


@pytest.mark.slow
def test_a_piped_conversation_runs_to_its_end(run_dir: Path, tmp_path: Path) -> None:
    picture = tmp_path / "my picture.bin"
    picture.write_bytes(b"\1\2\3")
    typed = f"w1\n/image {picture}\nw2 w3\n/image nowhere.png\nw4\n/quit\nnever read\n"
    done = subprocess.run(
        [sys.executable, "-m", "mmfusion", "chat", str(run_dir), "--max_new_tokens=6"],
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[0].endswith(
        "Commands: /image PATH, /reset, /help, /quit. Anything else is a message."
    )
    assert out[2] == "(image my picture.bin goes with your next message)"
    assert out[4] == "error: no image file nowhere.png; give the path of a file."
    assert len(out) == 6
    assert "Traceback" not in done.stderr


def test_answers_are_those_of_generate_with_history_and_media(
    session: Session,
    loaded: mmfusion.inference.Chat,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.bin").write_bytes(b"\5\6")
    session.handle("w1")
    session.handle(f"/image '{tmp_path / 'a.bin'}'")
    assert "(image a.bin goes with" in capsys.readouterr().out
    session.handle("w2")
    assert [message.role for message in session.history] == ["user", "assistant"] * 2
    assert session.history[2].content[0] == Media("image", b"\5\6", "bin")
    shown = capsys.readouterr().out.splitlines()
    expected = loaded.generate(session.history[:3], max_new_tokens=6)
    assert shown[-1].strip() == expected == session.history[3].content[0].text


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> mmfusion.inference.Chat:
    """A run whose model hears and watches."""
    folder = tmp_path_factory.mktemp("listener")
    parts = {name: part for name, part in encoders(folder).items() if name != "image"}
    linear = {"class_path": "mmfusion.models.projectors.linear.Linear"}
    sources = {
        "captions": {
            "shards": str(folder / "captions-*.tar"),
            "converter": {"class_path": "mmfusion.data.converters.caption.Caption"},
        }
    }
    fill({"model": {"encoders": parts}, "data": {"sources": sources}})
    recipe = write_recipe(
        folder,
        trainer__max_steps=1,
        model__encoders=parts,
        model__input_projectors=dict.fromkeys(parts, linear),
        model__schedule={"warmup_steps": 0},
        data__sources=sources,
    )
    return mmfusion.load(fit(recipe).path, device="cpu")


def test_sound_and_video_are_answered(
    listener: mmfusion.inference.Chat, assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, video = assets / "speech" / "apple.ogg", assets / "videos" / "apple.mp4"
    session = Session(listener, {"max_new_tokens": 6})
    for line in (f"/audio {video.with_suffix('.ogg')}", f"/audio {sound}", f"/video {video}"):
        session.handle(line)
    session.handle(f"/video {sound}")
    session.handle("w1")
    heard, watched = (
        Media("audio", sound.read_bytes(), "ogg"),
        Media("video", video.read_bytes(), "mp4"),
    )
    assert session.history[0].content == (heard, watched, Text("w1"))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("error: no audio file")
    assert shown[1:3] == [
        "(audio apple.ogg goes with your next message)",
        "(video apple.mp4 goes with your next message)",
    ]
    assert "cannot be used as video" in shown[3]
    answer = listener.generate(session.history[:1], max_new_tokens=6)
    assert shown[-1].strip() == answer == session.history[1].content[0].text
    assert answer
    session.handle("w2")  # both are in the history of the next turn
    planned = listener.processor.prompt(session.history[:3]).planned
    assert [slots.modality for slots in planned.media] == ["audio", "video"]
    assert len(session.history) == 4


def test_errors_do_not_end_the_session(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.bin").write_bytes(b"")
    for line in (
        "/image",
        "/audio a.wav",
        "/picture a.png",
        f"/image {tmp_path}",
        f"/image {tmp_path}/empty.bin",
    ):
        session.handle(line)
    session.handle("w1")  # an empty file has no feature: an error, and the turn is dropped
    shown = capsys.readouterr().out
    assert shown.count("error: ") == 5
    assert "this model takes no audio. Commands: /image PATH" in shown
    assert "there is no command /picture. Commands: /image PATH" in shown
    assert session.history == []
    session.handle("w1")
    assert len(session.history) == 2


def test_a_conversation_that_outgrows_learned_positions_can_begin_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
    save_llm(tmp_path, GPT2Config(**size, eos_token_id=2, initializer_range=0.3))
    model = tiny_model(tmp_path, {"image": Linear})
    options = {"max_new_tokens": 50, "suppress_tokens": [0, 1, 2, *range(40, 60)]}  # words only
    session = Session(mmfusion.inference.Chat(model), options)
    session.pending.append(Media("image", b"1", "bin"))
    session.handle("w1 w2 w3")
    asked = len(model.processor().prompt(session.history[:1]).planned)
    answer = session.history[1].content[0].text.split()
    assert asked + len(answer) == 24 + 1, "the last word needs no position: it is never read"
    assert "error" not in capsys.readouterr().out
    session.pending.append(Media("image", b"1", "bin"))
    session.handle("w4")
    error = capsys.readouterr().out
    assert "tokens, the LLM takes at most 24;" in error
    assert "/reset" in error
    assert error.endswith("Attach its media again.\n")
    session.handle("/reset")
    session.handle("w4")
    assert len(session.history) == 2


def test_reset_forgets_everything_but_the_system_message(
    loaded: mmfusion.inference.Chat,
) -> None:
    session = Session(loaded, {"max_new_tokens": 2}, system="w5")
    session.handle("w1")
    session.pending.append(Media("image", b"1", "bin"))
    session.handle("/reset")
    assert [message.role for message in session.history] == ["system"]
    assert session.pending == []


def test_plain_lines_stand_alone_without_the_template(
    loaded: mmfusion.inference.Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(loaded, {"max_new_tokens": 4, "plain": True})
    session.handle("w5")
    first = capsys.readouterr().out
    session.handle("w1")
    session.handle("w5")
    assert capsys.readouterr().out.splitlines()[-1] == first.strip("\n")
    turn = [Message("user", (Text("w5"),))]
    assert first.strip() == loaded.generate(turn, plain=True, max_new_tokens=4)
