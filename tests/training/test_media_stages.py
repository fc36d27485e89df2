"""Stages of a model that answers with pictures, through the command: a tiny Stable Diffusion from
disk, signal tokens, alignment and denoising.
"""

from __future__ import annotations

import csv
import io
import re
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mmfusion
from mmfusion.cli import main
from mmfusion.inference import Chat
from mmfusion.models.generation import MAX_MEDIA, Run, WholeRuns, conditioning_of, find_runs
from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.tools.chat import Session
from mmfusion.tools.describe import description
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.rebuild import load_module
from mmfusion.training.resume import find
from mmfusion.types import Media, Message, Sample, Text
from tests.models.tiny import save_llm
from tests.training.pictures import FULL, LORA, NEW, NEXT_TOKEN, objective, prepare, recipe
from tests.training.tiny import fit, refused, write_shards


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("media_stages"))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.fixture(scope="module")
def stage2(home: Path) -> Path:
    return fit(recipe(home, run_dir=str(home / "stage2"))).path


def test_every_loss_of_stage_2_falls(stage2: Path) -> None:
    found = rows(stage2)
    for name in ("next_token", "align"):
        curve = [float(row[f"train/{name}"]) for row in found]
        assert np.mean(curve[-3:]) < np.mean(curve[:3])
    assert all(np.isfinite(float(row["train/denoise"])) for row in found)


def test_a_checkpoint_of_stage_2_holds_projector_and_rows_and_nothing_else(stage2: Path) -> None:
    names = set(read_checkpoint(find(stage2))["state_dict"])
    assert {name.split(".")[1] for name in names} == {"output_projectors", "llm"}
    assert all("trainable_tokens_delta" in name for name in names if ".llm." in name)


@pytest.mark.slow
def test_stage_3_keeps_what_stage_2_trained_bit_for_bit(home: Path, stage2: Path) -> None:
    frozen = {**NEW, "init_args": {"lr": 1e-3, "train": False}}
    changes = {"model__tuning": {"llm": [LORA, frozen]}, "model__init_from": str(stage2)}
    run = fit(recipe(home, run_dir=str(home / "stage3"), **changes)).path
    earlier, later = (read_checkpoint(find(path))["state_dict"] for path in (stage2, run))
    assert set(earlier) < set(later)
    assert all(torch.equal(later[name], earlier[name]) for name in earlier)
    llm = load_module(run).model.llm
    assert llm.new_tokens == ["<image_0>", "<image_1>", "<image_2>"]


@pytest.mark.slow
def test_rows_of_a_tied_model_are_one_in_embeddings_and_head_in_every_stage(tmp_path: Path) -> None:
    home = prepare(tmp_path)
    save_llm(home / "llm", tie_word_embeddings=True)
    write_shards(home, "words", 20, media="", seed=1)
    frozen = {**NEW, "init_args": {"lr": 1e-3, "train": False}}
    two = fit(recipe(home, run_dir=f"{home}/two", **SHORT)).path
    later = {"model__tuning": {"llm": [LORA, frozen]}, "model__init_from": str(two)}
    three = fit(recipe(home, run_dir=f"{home}/three", **later, **SHORT)).path
    found = []
    for run in (two, three):
        llm: Any = load_module(run).model.llm
        ids = torch.tensor(llm.new_token_ids)
        with torch.no_grad():
            head = llm.logits(torch.eye(llm.hidden_dim))[:, ids].T
            torch.testing.assert_close(llm.embed(ids[None])[0], head)
        found.append(head)
        state = read_checkpoint(find(run))["state_dict"]
        saved = [state[name] for name in state if "trainable_tokens_delta" in name]
        assert all(torch.equal(delta, saved[0]) for delta in saved)
    assert torch.equal(*found)
    assert torch.pdist(found[0]).min() > 0  # they began as one row


@pytest.mark.slow
def test_stage_2_goes_on_exactly_noise_included(home: Path, stage2: Path) -> None:
    half = fit(recipe(home, run_dir=str(home / "half"), checkpoint__every_n_steps=4)).path
    (half / "checkpoints" / "step-00000012.ckpt").unlink()
    run = fit(recipe(home, run_dir=str(home / "half"), checkpoint__every_n_steps=4)).path
    whole = {row["trainer/global_step"]: row for row in rows(stage2)}
    again = [row for row in rows(run) if row["trainer/attempt"] == "2"]
    assert len(again) == 4
    for row in again:
        for name in ("loss", "next_token", "align", "denoise"):
            assert row[f"train/{name}"] == whole[row["trainer/global_step"]][f"train/{name}"]


def test_what_no_objective_needs_is_not_loaded(home: Path, tmp_path: Path) -> None:
    run = fit(
        recipe(
            home,
            model__objectives={
                "next_token": NEXT_TOKEN,
                "align": objective("align", distance="cosine"),
            },
            trainer__max_steps=3,
            model__schedule={"warmup_steps": 0},
            model__tuning={"output_projectors": FULL, "llm": NEW},
            run_dir=str(tmp_path / "run"),
        )
    )
    generator = load_module(run.path).model.generator("image")
    assert generator.text_encoder is not None
    assert generator.vae is None
    assert generator.denoiser is None


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_parts_that_are_built_for_an_answer_have_the_precision_of_the_others(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """The stage needs the text encoder alone; the others come when a picture is made."""
    options: dict[str, Any] = {**SHORT, "model__objectives": ALIGNED}
    half = {
        "class_path": "mmfusion.models.generators.stable_diffusion.StableDiffusion",
        "init_args": {"path": f"{home}/sd", "dtype": "bfloat16"},
    }
    run = fit(recipe(home, run_dir=f"{tmp_path}/run", model__generators={"image": half}, **options))
    monkeypatch.setattr(mmfusion.inference, "computes_bfloat16", lambda device: fast)
    asked: list[tuple[torch.dtype | None, torch.dtype]] = [
        (None, torch.bfloat16 if fast else torch.float32), (torch.float32, torch.float32),
    ]  # fmt: skip
    for given, expected in asked:
        used = mmfusion.load(run.path, device="cpu", dtype=given)
        answer = used.generate(
            ask("w1"), max_new_tokens=3, sampling=SAMPLING, **only(used, "<image_0>")
        )
        assert [media.modality for media in answer.media] == ["image"]
        generator = used.model.generator("image")
        for part in (generator.text_encoder, generator.vae, generator.denoiser):
            assert {p.dtype for p in part.parameters()} == {expected}


@pytest.mark.slow
def test_a_stage_whose_answers_never_hold_media_says_so(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "no sample of the last 2 steps held media of image in its answers, though its part"
    for sources, missing in ((["words"], True), (["words", "pairs"], False)):
        path = recipe(home, run_dir=f"{tmp_path}/{len(sources)}", **SHORT)
        content = yaml.safe_load(path.read_text())
        given = content["data"]["sources"]
        content["data"]["sources"] = {name: given[name] for name in sources}
        path.write_text(yaml.safe_dump(content))
        fit(path)
        assert (said in capsys.readouterr().err) == missing


@pytest.mark.slow
def test_losses_are_summed_by_the_weights_of_their_objectives(home: Path, tmp_path: Path) -> None:
    found = {}
    for weight in (1.0, 0.25):
        objectives = {"next_token": NEXT_TOKEN, "align": objective("align", weight=weight)}
        path = recipe(
            home, run_dir=f"{tmp_path}/{weight}", model__objectives=objectives, **SHORT,
            model__tuning={"output_projectors": FULL, "llm": {**NEW, "init_args": {"lr": 0.0}}},
        )  # fmt: skip
        found[weight] = [
            {key: float(row[f"train/{key}"]) for key in ("loss", "next_token", "align")}
            for row in rows(fit(path).path)
        ]
    for row in (*found[1.0], *found[0.25]):
        assert row["loss"] == pytest.approx(row["next_token"] + row["align"], rel=1e-5)
    whole, quarter = found[1.0][0], found[0.25][0]
    assert quarter["next_token"] == pytest.approx(whole["next_token"])
    assert quarter["align"] == pytest.approx(0.25 * whole["align"])
    assert whole["align"] > 0.01


def val_sources(home: Path) -> dict[str, Any]:
    converter = {
        "class_path": "mmfusion.data.converters.text_to_media.TextToMedia",
        "init_args": {"prompts": {"image": ["w31 {caption}"]}},
    }
    return {"pairs": {"shards": f"{home}/pairs-*.tar", "converter": converter}}


DENOISER = "generators.image.denoiser"
ALIGNED = {"next_token": NEXT_TOKEN, "align": objective("align", distance="cosine")}
"""Objectives of a stage that runs no denoiser."""
SHORT = {"trainer__max_steps": 2, "model__schedule": {"warmup_steps": 0}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "later"),
    [
        (LORA, {**LORA, "init_args": {"r": 2, "lr": 0.0, "train": False}}),
        (FULL, {"class_path": "mmfusion.tuning.Frozen"}),
    ],
)
def test_a_denoiser_that_was_trained_goes_through_a_stage_that_does_not_denoise(
    home: Path,
    tmp_path: Path,
    policy: dict[str, object],
    later: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = {"output_projectors": FULL, "llm": NEW}
    options: dict[str, Any] = {**SHORT, "data__val_sources": val_sources(home)}
    two = fit(
        recipe(home, run_dir=str(tmp_path / "two"), model__tuning={**both, DENOISER: policy},
               **options)
    ).path  # fmt: skip
    trained = {n: t for n, t in read_checkpoint(find(two))["state_dict"].items() if DENOISER in n}
    assert trained
    options |= {"model__objectives": ALIGNED, "model__init_from": str(two)}
    said = refused(capsys, recipe(home, run_dir=str(tmp_path / "no"), **options))
    assert f"of {DENOISER}: in model.tuning, mmfusion.tuning.LoRA with train: false" in said
    options["model__tuning"] = {**both, DENOISER: later}
    for media_samples in (0, 1):
        options["validation"] = {
            "generate_samples": 0, "media_samples": media_samples, "sampling": {"steps": 1},
        }  # fmt: skip
        three = fit(recipe(home, run_dir=str(tmp_path / f"three{media_samples}"), **options)).path
        kept = read_checkpoint(find(three))["state_dict"]
        assert all(torch.equal(kept[name], tensor) for name, tensor in trained.items())
        used = mmfusion.load(three, device="cpu")
        options_of_answer = {"max_new_tokens": 3, "sampling": SAMPLING}
        answer = used.generate(ask("w1"), **options_of_answer, **only(used, "<image_0>"))
        assert [media.modality for media in answer.media] == ["image"]
        main(["validate", "-c", str(three / "config.yaml"), "--validation.media_samples=0"])
    assert description(str(three / "config.yaml"), ["--validation.media_samples=0"]).parts


def ask(text: str) -> list[Message]:
    return [Message("user", (Text(text),))]


@pytest.fixture(scope="module")
def chat(stage2: Path) -> Chat:
    return mmfusion.load(stage2, device="cpu")


def test_an_answer_is_conditioned_as_in_training(chat: Chat, home: Path) -> None:
    """The same hidden states, whether the answer was given or is being trained."""
    target = Media("image", Path(save_picture(home)).read_bytes(), "png", caption="w1")
    talks = [(ask("w31 w1"), (Text("w7 "), target)), (ask("w2"), (target,))]
    processor = chat.processor
    encoded = [
        processor.encode(Sample((*asked, Message("assistant", answer)))) for asked, answer in talks
    ]
    batch = chat.batch(encoded)
    with torch.no_grad():
        expected = chat.model(batch).conditioning["image"].tokens
    prompts = [processor.prompt(asked) for asked, _ in talks]
    news = [
        one.planned.input_ids[len(prompt.planned) :]
        for one, prompt in zip(encoded, prompts, strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(news, batch_first=True, padding_value=2)
    runs = find_runs(ids, processor.signal_ids)
    assert [(run.row, run.end - run.start) for run in runs] == [(0, 3), (1, 3)]
    found = conditioning_of(chat.model, chat.batch(prompts), ids, runs)["image"].tokens
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def save_picture(home: Path) -> str:
    Image.new("RGB", (16, 16), "red").save(home / "red.png")
    return str(home / "red.png")


def only(chat: Chat, *tokens: str) -> dict[str, object]:
    """An option of generate: no other tokens than these are given."""
    allowed = set(chat.processor.tokenizer.convert_tokens_to_ids([*tokens]))
    return {"suppress_tokens": [i for i in range(64) if i not in allowed]}


SAMPLING = Sampling(steps=2, guidance_scale=3.0, seed=4)


def test_pictures_and_text_come_in_their_order(chat: Chat) -> None:
    signals = chat.processor.signal_ids["image"]
    options = {"max_new_tokens": 6, "sampling": SAMPLING, **only(chat, "<image_0>")}
    answers = chat.generate([ask("w31 w1"), ask("w32 w2 w3")], **options)
    for answer in answers:
        assert [part.modality for part in answer.parts] == ["image", "image"]
        assert answer == ""
        assert all(Image.open(io.BytesIO(m.data)).size == (16, 16) for m in answer.media)
    alone = chat.generate(ask("w32 w2 w3"), **options)
    one, both = (np.asarray(Image.open(io.BytesIO(a.media[0].data))) for a in (alone, answers[1]))
    assert one.shape == both.shape
    pieces = list(chat.generate(ask("w31 w1"), stream=True, **options))
    assert [piece.data for piece in pieces] == [m.data for m in answers[0].media]
    text = chat.generate(ask("w1"), max_new_tokens=4, **only(chat, "w5", "w6"))
    assert text.media == []
    assert text == text.parts[0].text
    assert len(signals) == 3


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_a_run_that_begins_within_the_longest_answer_is_completed(chat: Chat, longest: int) -> None:
    """Answers that are runs from their first token on, that end in one, and in words alone."""

    def asked_for(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        late = first if input_ids.shape[1] == longest - 1 else word
        wanted = torch.tensor([first, late, word][: len(input_ids)])
        keep = torch.nn.functional.one_hot(wanted, scores.shape[1]).bool()
        return scores.masked_fill(~keep, -torch.inf)

    first = chat.processor.signal_ids["image"][0]
    word = chat.processor.tokenizer.convert_tokens_to_ids("w7")
    options = {"max_new_tokens": longest, "sampling": SAMPLING, "logits_processor": [asked_for]}
    runs, late, words = chat.generate([ask("w1"), ask("w2 w3"), ask("w4")], **options)
    assert [media.modality for media in runs.media] == ["image"] * -(-longest // 3)
    assert (late.split(), len(late.media)) == (["w7"] * (longest - 1), 1)
    assert (words.split(), words.media) == (["w7"] * longest, [])
    streamed = list(chat.generate(ask("w1"), stream=True, **options))
    assert [piece.data for piece in streamed] == [media.data for media in runs.media]


def forced(chat: Chat, *answers: str) -> dict[str, Any]:
    """An option of generate: each conversation is answered by these tokens; of a run of signal
    tokens only the first is said.
    """
    tokenizer, signals = chat.processor.tokenizer, chat.processor.signal_ids["image"]
    end, rows = tokenizer.eos_token_id, []
    for answer in answers:
        ids = tokenizer.convert_tokens_to_ids(answer.split())
        whole = [new for i in ids for new in (signals if i == signals[0] else [i])]
        rows.append([*whole, *[end] * 12])

    def allowed(row: int, given: torch.Tensor) -> list[int]:
        later = len(given) and int(given[-1]) in signals[:-1]
        return [*range(len(tokenizer))] if later else [rows[row][len(given)]]

    return {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": 12}


def test_text_a_picture_and_text_are_one_answer_and_a_batch_is_drawn_together(chat: Chat) -> None:
    """The rest of a run follows its first signal token without being asked for."""
    said, talks = ["w5 <image_0> w6 w7", "<image_0> w8 <image_0>"], [ask("w31 w1"), ask("w32 w2")]
    generator, calls = chat.model.generator("image"), []
    chat.model.need("image", PARTS)
    handle = generator.denoiser.register_forward_hook(lambda *_: calls.append(1))
    first, second = chat.generate(talks, sampling=SAMPLING, **forced(chat, *said))
    assert len(calls) == SAMPLING.steps  # of three pictures and their guidance
    handle.remove()
    assert [p.text if isinstance(p, Text) else p.modality for p in first.parts] == [
        "w5", "image", "w6 w7",
    ]  # fmt: skip
    assert [p.text if isinstance(p, Text) else p.modality for p in second.parts] == [
        "image", "w8", "image",
    ]  # fmt: skip
    seeds = replace(SAMPLING, seed=(SAMPLING.seed + 1,))
    alone = chat.generate(talks[1], sampling=seeds, **forced(chat, said[1]))
    for one, both in zip(alone.media, second.media, strict=True):
        assert np.abs(pixels(one) - pixels(both)).mean() < 0.5
    assert np.abs(pixels(second.media[0]) - pixels(second.media[1])).mean() > 1
    stream = chat.generate(talks[0], stream=True, sampling=SAMPLING, **forced(chat, said[0]))
    *pieces, shown = stream
    assert "".join(pieces).split() == ["w5", "w6", "w7"]
    assert np.abs(pixels(shown) - pixels(first.media[0])).mean() < 0.5


def test_seeds_belong_to_conversations_whatever_the_others_answer(chat: Chat) -> None:
    talks, seeds = [ask("w31 w1"), ask("w32 w2")], replace(SAMPLING, seed=(5, 6))
    (words, second), (first, again) = (
        chat.generate(talks, sampling=seeds, **forced(chat, said, "w8 <image_0>"))
        for said in ("w5 w6", "<image_0> w7")
    )
    assert (len(words.media), len(first.media)) == (0, 1)
    assert np.abs(pixels(second.media[0]) - pixels(again.media[0])).mean() < 0.5
    for wrong in ((1,), (1, 2, 3), ()):
        with pytest.raises(ValueError, match=rf"names {len(wrong)} seeds for 2 conversations"):
            chat.generate(talks, sampling=replace(SAMPLING, seed=wrong))


def pixels(media: Media) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(media.data))).astype(float)


def test_a_run_for_which_the_llm_has_no_positions_does_not_begin() -> None:
    force = WholeRuns([[10, 11, 12], [20, 21]], room=4)
    barred = [
        torch.isinf(force(torch.full((1, n), 5), torch.zeros(1, 30))[0, [10, 20]]).tolist()
        for n in range(4)
    ]
    assert barred == [[False, False], [False, False], [True, False], [True, True]]


def test_no_more_media_begin_than_an_answer_may_have() -> None:
    force = WholeRuns([[10, 11, 12], [20, 21]], most=2)
    rows = torch.tensor(
        [[5, 10, 11, 12, 6, 20, 21], [5, 5, 5, 5, 10, 11, 12], [5, 5, 5, 5, 5, 20, 21]]
    )
    found = force(rows, torch.zeros(3, 30))
    assert torch.isinf(found[:, [10, 20]]).all(1).tolist() == [True, False, False]
    within = force(torch.tensor([[20, 21, 10, 11]]), torch.zeros(1, 30))
    assert within.argmax() == 12


def test_an_answer_has_no_more_media_than_it_may(chat: Chat) -> None:
    first = chat.processor.signal_ids["image"][0]
    always = {"max_new_tokens": 30, "sampling": SAMPLING, "sequence_bias": {(first,): 1e4}}
    assert len(chat.generate(ask("w1"), max_media=2, **always).media) == 2
    assert len(chat.generate(ask("w1"), **always).media) == MAX_MEDIA


def test_steps_that_the_sampler_cannot_take_are_refused_before_anything_is_said(
    chat: Chat, stage2: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "sampling.steps is 100, but the DDIMScheduler of .*sd takes 99 at most"
    with pytest.raises(ValueError, match=message):
        chat.generate(ask("w1"), max_new_tokens=1, sampling=Sampling(steps=100))
    with pytest.raises(SystemExit):
        main(["chat", str(stage2), "--media_steps=100", "--device=cpu"])
    assert re.search(f"--media_steps=100 cannot be: {message}", capsys.readouterr().err)
    bad = {"media_samples": 1, "sampling": {"steps": 101}}
    with pytest.raises(ValueError, match=r"media_samples is 1, .*\.steps is 101, .* 99 at most"):
        description(str(recipe(home, data__val_sources=val_sources(home), validation=bad)))


def test_a_logits_processor_of_the_caller_works_beside_the_signal_tokens(chat: Chat) -> None:
    first = chat.processor.signal_ids["image"][0]

    def only_the_first(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = torch.arange(scores.shape[1]) == first
        return scores.masked_fill(~wanted, -torch.inf)

    options = {"max_new_tokens": 3, "sampling": SAMPLING, "logits_processor": [only_the_first]}
    answer = chat.generate(ask("w1"), **options)
    assert [media.modality for media in answer.parts] == ["image"]


def test_predictions_count_tokens_and_targets(stage2: Path, home: Path) -> None:
    target = Media("image", Path(save_picture(home)).read_bytes(), "png", caption="w1")
    talk = (*ask("w31"), Message("assistant", (Text("w7 "), target, target)))
    module = load_module(stage2)
    used = Chat(module.model)
    with torch.no_grad():
        (row,) = module.predict_step(used.batch([used.processor.encode(Sample(talk))]), 0)
    assert (row["align_targets"], row["denoise_targets"]) == (2, 2)
    assert row["next_token_tokens"] > 2
    assert not {"align_tokens", "denoise_tokens", "next_token_targets"} & set(row)


def test_signal_tokens_follow_the_first_and_none_comes_alone() -> None:
    force = WholeRuns([[10, 11, 12], [20, 21]])
    scores = torch.zeros(4, 30)
    scores[:, 11] = 9.0
    found = force(torch.tensor([[5, 10], [10, 11], [11, 12], [5, 20]]), scores)
    assert found[[0, 1, 3]].argmax(1).tolist() == [11, 12, 21]
    assert (found[[0, 1, 3]] == -torch.inf).sum(1).tolist() == [29] * 3
    assert torch.isinf(found[2]).nonzero().flatten().tolist() == [11, 12, 21]
    start = force(torch.zeros(1, 0, dtype=torch.int64), scores[:1])
    assert torch.isinf(start[0]).nonzero().flatten().tolist() == [11, 12, 21]


def test_a_run_that_was_cut_is_no_picture() -> None:
    ids = torch.tensor([[10, 11, 12, 10, 11], [5, 10, 5, 11, 12]])
    assert find_runs(ids, {"image": [10, 11, 12]}) == [Run(0, 0, 3, "image")]


def test_the_chat_saves_what_it_is_answered(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_new_tokens": 3, "sampling": SAMPLING, **only(chat, "<image_0>")}
    session = Session(chat, options, media_dir=tmp_path / "answers")
    session.handle("w31 w1")
    session.handle("w32 w4")
    out = capsys.readouterr().out
    files = sorted((tmp_path / "answers").iterdir())
    assert [file.name for file in files] == ["0001.png", "0002.png"]
    assert all(f"(image {file})" in out for file in files)
    assert [message.role for message in session.history] == ["user", "assistant"] * 2


def test_media_that_cannot_be_saved_leave_the_conversation_as_it_is(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_new_tokens": 3, "sampling": SAMPLING, **only(chat, "<image_0>")}
    folder = tmp_path / "answers"
    session = Session(chat, options, media_dir=folder)
    folder.write_text("a file")
    session.handle("w31 w1")
    assert f"error: [Errno 17] File exists: '{folder}'" in capsys.readouterr().out
    assert [message.role for message in session.history] == ["user", "assistant"]
    assert [part.modality for part in session.history[1].content] == ["image"]
    folder.unlink()
    session.handle("w31 w1")
    assert [file.name for file in folder.iterdir()] == ["0001.png"]


def test_a_picture_for_which_there_is_no_room_leaves_no_file(chat: Chat, tmp_path: Path) -> None:
    """Files may grow to 40 bytes."""
    session = Session(chat, {}, media_dir=tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/0001\.png'"):
            session._save(Media("image", bytes(60_000), "png"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["afile", "afile/answers", "dangling"])
def test_a_folder_that_cannot_hold_answers_is_refused_before_the_first(
    stage2: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "afile").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        main(["chat", str(stage2), f"--media_dir={tmp_path}/{name}", "--device=cpu"])
    place = tmp_path / name.partition("/")[0]
    said = capsys.readouterr()
    assert f"--media_dir={tmp_path}/{name}: {place} is no folder that can be written" in said.err
    assert "is ready" not in said.out
