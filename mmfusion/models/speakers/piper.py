"""Piper voices (https://github.com/rhasspy/piper): VITS (arXiv:2106.06103) as an ONNX file, read by
onnxruntime, on phonemes from espeak-ng.

Text -> clauses -> phonemes of each (espeak-ng loses punctuation, which the voice was trained with)
-> ids, between start and end and with a pad after each -> a wave for each sentence.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import unicodedata
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.models.loading import reading
from mmfusion.models.speakers.base import Speaker
from mmfusion.paths import expand
from mmfusion.processing.audios import as_wav
from mmfusion.types import Media

log = logging.getLogger(__name__)

START, END, PAD = "^", "$", "_"
KEYS = {"audio", "espeak", "inference", "phoneme_id_map"}
"""Of a voice's configuration."""
SENTENCE_ENDS = ".!?"
PAUSE_SECONDS = 0.2
"""Silence between two sentences."""

_CLAUSE_END = re.compile(r"([.,;:!?])[.,;:!?]*[\"')\]\u201d\u2019\u00bb]*(?:\s+|$)")
_LANGUAGE_SWITCH = re.compile(r"\([a-z-]+\)")
_VOICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")

Array = np.ndarray[Any, Any]


class Piper(Speaker):
    """One voice.

    Args:
        path: the voice's ``.onnx`` file; its ``.onnx.json`` lies beside it.
        speed: how fast it talks; 1 is the voice's own.
        variation: how much two readings differ, in loudness, pitch and rhythm; 1 is the voice's
            own. With 0 a text always sounds the same, and the voice is loaded once; otherwise it
            is made anew for each text (about a second), because onnxruntime seeds a model only
            where it loads it.
        speaker: which one, of a voice with several.
    """

    def __init__(
        self, path: str, speed: float = 1.0, variation: float = 1.0, speaker: int = 0
    ) -> None:
        self.path = Path(expand(path))
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}; give the .onnx file of a Piper voice.")
        if speed <= 0 or variation < 0:
            raise ValueError(
                f"speed is {speed} and variation {variation}; expected more than 0, and 0 or more."
            )
        self.speed, self.variation, self.speaker = speed, variation, speaker
        speakers = int(self.config.get("num_speakers", 1))
        if not 0 <= speaker < speakers:
            raise ValueError(
                f"speaker is {speaker}, but {self.path} has {speakers}, counted from 0."
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        """What lies beside the voice.

        Raises:
            FileNotFoundError: where nothing does.
            ValueError: for a voice that does not take espeak-ng's phonemes.
        """
        file = Path(f"{self.path}.json")
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}; a Piper voice needs it beside its .onnx.")
        with reading(file.parent):
            config = dict(json.loads(file.read_bytes()))
        if lacking := sorted(KEYS - config.keys()):
            raise ValueError(
                f"{file} lacks {lacking}; expected the configuration of a Piper voice."
            )
        language = str(config["espeak"].get("voice", ""))
        if config.get("phoneme_type", "espeak") != "espeak" or not _VOICE_NAME.fullmatch(language):
            raise ValueError(
                f"{file} asks for phonemes of type {config.get('phoneme_type')!r} and language "
                f"{language!r}; expected a voice trained on espeak-ng's."
            )
        return config

    def say(self, text: str, seed: int = 0) -> Media | None:
        """See the base class.

        Raises:
            FileNotFoundError: without espeak-ng.
            ValueError: without onnxruntime, or where the voice cannot be read.
        """
        sentences = [self.ids(sentence) for sentence in sentences_of(text)]
        spoken = [ids for ids in sentences if ids]
        if not spoken:
            return None
        session = self._fixed if self.variation == 0 else self._session(seed)
        rate = int(self.config["audio"]["sample_rate"])
        pause = np.zeros(round(PAUSE_SECONDS * rate), np.float32)
        waves = [self._wave(session, ids) for ids in spoken]
        between = [piece for wave in waves for piece in (pause, wave)][1:]
        return as_wav(np.concatenate(between), rate, caption=text)

    def ids(self, sentence: list[tuple[str, str]]) -> list[int]:
        """What the voice reads: ids of the phonemes of a sentence's clauses; empty where it has
        none.
        """
        known = self.config["phoneme_id_map"]
        spoken = [(self.phonemes(words), mark) for words, mark in sentence]
        text = " ".join(said + mark for said, mark in spoken if said)
        if unknown := sorted(set(text) - set(known)):
            log.warning("%s has no sound for %s, which are left out", self.path.name, unknown)
        found = [
            index for sound in text if sound in known for index in (*known[sound], *known[PAD])
        ]
        return [*known[START], *known[PAD], *found, *known[END]] if found else []

    def phonemes(self, words: str) -> str:
        """Decomposed characters of the International Phonetic Alphabet, as espeak-ng gives them.

        Raises:
            FileNotFoundError: where espeak-ng is not installed.
        """
        if not (program := shutil.which("espeak-ng")):
            raise FileNotFoundError(
                "espeak-ng is not on the PATH; a Piper voice takes its phonemes from it. Install "
                "it (apt-get install espeak-ng, brew install espeak-ng)."
            )
        command = [program, "-q", "--ipa", "-v", self.config["espeak"]["voice"], "--stdin"]
        done = subprocess.run(
            command, input=words, capture_output=True, text=True, encoding="utf-8"
        )
        if done.returncode:
            raise ValueError(f"espeak-ng fails on {words[:80]!r}: {done.stderr.strip()[:200]}")
        said = _LANGUAGE_SWITCH.sub("", done.stdout)
        return unicodedata.normalize("NFD", " ".join(said.split()))

    @cached_property
    def _fixed(self) -> Any:
        return self._session(0)

    def _session(self, seed: int) -> Any:
        """The voice, loaded; what it draws follows from the seed."""
        try:
            import onnxruntime
            from onnxruntime.capi import onnxruntime_pybind11_state as errors
        except ModuleNotFoundError as error:
            raise ValueError(
                "a Piper voice is read by onnxruntime; install it: pip install 'mmfusion[speech]'."
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        onnxruntime.set_seed(seed % 2**31)
        try:
            return onnxruntime.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
        except (errors.InvalidProtobuf, errors.InvalidGraph, errors.Fail) as error:
            raise ValueError(f"{self.path} is no voice that can be read: {error}") from error

    def _wave(self, session: Any, ids: list[int]) -> Array:
        """(samples,) float32."""
        usual = self.config["inference"]
        scales = [
            usual["noise_scale"] * self.variation,
            usual["length_scale"] / self.speed,
            usual["noise_w"] * self.variation,
        ]
        given = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array(scales, np.float32),
        }
        if int(self.config.get("num_speakers", 1)) > 1:
            given["sid"] = np.array([self.speaker], np.int64)
        return session.run(None, given)[0].reshape(-1)


def sentences_of(text: str) -> list[list[tuple[str, str]]]:
    """Sentences, as clauses with the mark that ends each ("" at the end of a line without one)."""
    sentences: list[list[tuple[str, str]]] = []
    for line in text.splitlines():
        pieces = _CLAUSE_END.split(line)  # words, mark, words, mark, ..., words
        sentence: list[tuple[str, str]] = []
        for words, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            if words.strip():
                sentence.append((words.strip(), mark))
            if mark and mark in SENTENCE_ENDS:
                sentences.append(sentence)
                sentence = []
        sentences.append(sentence)
    return [sentence for sentence in sentences if sentence]
