"""``mmfusion chat RUN``: talk to a trained run in the terminal, or through a pipe."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from mmfusion.data.converters.members import MODALITY_OF
from mmfusion.data.whole_file import naming
from mmfusion.inference import Answer, Chat, load
from mmfusion.messages import read_media
from mmfusion.models.generators.base import Sampling
from mmfusion.models.speakers.base import Speaker
from mmfusion.types import DataError, Media, Message, Text

QUIT = ("/quit", "/exit")


def chat(
    run_dir: str,
    step: int | None = None,
    device: str | None = None,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    system: str | None = None,
    plain: bool = False,
    media_dir: str = "answers",
    guidance_scale: NonNegativeFloat = 7.5,
    media_steps: PositiveInt = 50,
    speaker: Speaker | None = None,
    speak: bool = False,
) -> None:
    """Talk to a run. Type a message; /image PATH, /audio PATH and /video PATH add media to it.

    Args:
        run_dir: run directory that `mmfusion fit` or `mmfusion quickstart` wrote.
        step: checkpoint of this step; the newest by default.
        device: cpu, cuda, ...; a GPU by default where there is one.
        max_new_tokens: longest answer.
        do_sample: draw tokens instead of taking the likeliest.
        temperature: of the draws; lower is closer to the likeliest.
        top_p: draw among the likeliest tokens that hold this much probability.
        top_k: draw among this many likeliest tokens.
        repetition_penalty: above 1 makes tokens that were used less likely.
        seed: of the draws.
        system: system message the conversation starts with.
        plain: for a run that was trained on captions: each line and its media stand alone, without
            the chat template, and the model goes on with the line to its end. Give the prompt of
            the captions, e.g. "Image caption:".
        media_dir: folder that pictures, sounds and videos of answers are saved to.
        guidance_scale: how strongly they follow the conversation; 1 is no guidance.
        media_steps: steps of their sampler.
        speaker: voice that says all text of the answers aloud (a sound each, in media_dir), e.g.
            mmfusion.models.speakers.piper.Piper with --speaker.path VOICE.onnx.
        speak: say all text, with the voice of the run's recipe.
    """
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "sampling": Sampling(media_steps, guidance_scale, seed or 0),
        "speak": speak or speaker is not None,
    }
    if plain:
        options |= {"plain": True, "stop": "\n"}
    loaded = load(run_dir, step, device)
    for modality in loaded.makes:
        try:
            loaded.model.generator(modality).check(options["sampling"])
        except ValueError as error:
            raise ValueError(f"--media_steps={media_steps} cannot be: {error}") from error
    loaded.speaker = speaker or loaded.speaker
    if loaded.makes or loaded.speaker:
        check_media_dir(Path(media_dir))
    session = Session(loaded, options, system, Path(media_dir))
    print(f"{run_dir} is ready. {session.help()}", flush=True)
    for line in lines():
        if line in QUIT:
            return
        session.handle(line)


def check_media_dir(folder: Path) -> None:
    """Before anything is answered: media of answers can be saved there.

    Raises:
        ValueError: where they cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"--media_dir={folder}: {there} is no folder that can be written to; media of answers "
            "are saved there. Give another."
        )


def lines() -> Iterator[str]:
    """What the user types, or a pipe brings, line by line; Ctrl-C clears a line, Ctrl-D ends."""
    prompt = "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input(prompt)
            # Bytes that are no UTF-8 arrive as lone surrogates, which no tokenizer takes.
            yield line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)", flush=True)


class Session:
    """One conversation.

    Args:
        chat: the loaded run.
        options: of :meth:`mmfusion.inference.Chat.generate`.
        system: system message, or None.
        media_dir: where media of answers are saved.
    """

    def __init__(
        self,
        chat: Chat,
        options: dict[str, Any],
        system: str | None = None,
        media_dir: Path = Path("answers"),
    ) -> None:
        self._chat, self._options, self._media_dir = chat, options, media_dir
        self._start = [Message("system", (Text(system),))] if system else []
        self.history = list(self._start)
        self.pending: list[Media] = []

    def help(self) -> str:
        """The commands."""
        media = ", ".join(f"/{modality} PATH" for modality in self._chat.modalities)
        return f"Commands: {media}, /reset, /help, /quit. Anything else is a message."

    def handle(self, line: str) -> None:
        """Do what a line says. An error is printed, and the session goes on."""
        command, _, rest = line.partition(" ")
        try:
            if command == "/help":
                print(self.help(), flush=True)
            elif command == "/reset":
                self.history, self.pending = list(self._start), []
                print("(a new conversation)", flush=True)
            elif command.startswith("/"):
                self._attach(command[1:], rest.strip())
            elif line:
                self._answer(line)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"error: {error}", flush=True)

    def _attach(self, modality: str, path: str) -> None:
        if modality not in self._chat.modalities:
            known = modality in MODALITY_OF.values()
            problem = "this model takes no " if known else "there is no command /"
            raise ValueError(f"{problem}{modality}. {self.help()}")
        if not path:
            raise ValueError(f"/{modality} needs the path of a file.")
        path = path.strip("'\"")
        media = read_media(path, modality)
        try:
            self._chat.processor.media[modality](media)  # decodes it: is it such a file at all
        except DataError as error:
            raise ValueError(f"{path} cannot be used as {modality}: {error}") from error
        self.pending.append(media)
        print(f"({modality} {Path(path).name} goes with your next message)", flush=True)

    def _answer(self, text: str) -> None:
        turn, media = Message("user", (*self.pending, Text(text))), self.pending
        self.pending = []
        before = [] if self._options.get("plain") else self.history
        try:
            answer = self._stream([*before, turn])
        except (ValueError, OSError, RuntimeError) as error:
            again = " Attach its media again." if media else ""
            raise ValueError(f"{error}{again}") from error
        print(flush=True)
        self.history += [turn, Message("assistant", answer.parts or (Text(""),))]
        for item in answer.media:
            print(f"({item.modality} {self._save(item)})", flush=True)

    def _save(self, media: Media) -> Path:
        """Under a number of its own."""
        self._media_dir.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = self._media_dir / f"{number:04d}.{media.format}"
            try:
                with naming(str(path)), path.open("xb") as file:
                    file.write(media.data)
                return path
            except FileExistsError:
                continue
            except OSError:  # a full disk
                path.unlink(missing_ok=True)
                raise
        raise AssertionError("numbers do not end")

    def _stream(self, messages: list[Message]) -> Answer:
        """Show the answer as it comes; Ctrl-C ends it where it is."""
        shown = ""
        stream = self._chat.generate(messages, stream=True, **self._options)
        try:
            while True:
                piece = next(stream)
                if isinstance(piece, str):
                    shown += piece
                    print(piece, end="", flush=True)
        except StopIteration as end:
            return cast(Answer, end.value)
        except KeyboardInterrupt:
            stream.close()
            print(" (stopped)", end="")
            return Answer([Text(shown.strip())])
