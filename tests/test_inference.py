"""A run trained by the real command, loaded and used: generation against a slow full recompute."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import mmfusion
from mmfusion.inference import Answer, Chat
from mmfusion.objectives.next_token import NextToken
from mmfusion.training.rebuild import load_module
from mmfusion.types import Media, Message, Sample, Text
from tests.training.tiny import fit, write_recipe

IMAGE = b"\5\6\7"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("inference"), trainer__max_steps=8)
    return fit(recipe).path


@pytest.fixture(scope="module")
def chat(run_dir: Path) -> Chat:
    return mmfusion.load(run_dir, device="cpu")


def ask(image: bytes, text: str) -> list[Message]:
    return [Message("user", (Media("image", image, "bin"), Text(text)))]


PROMPTS = [ask(IMAGE, "w1 w2"), ask(b"\1", "w3"), [Message("user", (Text("w9 w8 w7 w6"),))]]


def greedy(chat: Chat, messages: list[Message], steps: int) -> str:
    """Without a cache: the whole sequence again for every token."""
    batch = chat.batch([chat.processor.prompt(messages)])
    embeds = chat.model.embed(batch)[0]
    ids: list[int] = []
    for _ in range(steps):
        positions = torch.arange(embeds.shape[1])[None]
        hidden = chat.model.llm(embeds, positions, torch.tensor([0, embeds.shape[1]]))
        ids.append(int(chat.model.llm.logits(hidden[0, -1]).argmax()))
        if ids[-1] == chat.processor.tokenizer.eos_token_id:
            break
        embeds = torch.cat([embeds, chat.model.llm.embed(torch.tensor([[ids[-1]]]))], 1)
    return chat.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_generation_compiles_nothing_where_training_does(run_dir: Path) -> None:
    chat = mmfusion.load(run_dir, device="cpu")
    chat.model.llm.compile_layers()
    torch._dynamo.utils.counters.clear()
    assert chat.generate(PROMPTS[0], max_new_tokens=3)
    assert not torch._dynamo.utils.counters["stats"]


def test_another_dtype_is_that_of_the_weights_not_of_the_positions(run_dir: Path) -> None:
    chat = mmfusion.load(run_dir, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in chat.model.parameters()} == {torch.bfloat16}
    buffers = {name: b.dtype for name, b in chat.model.named_buffers() if "inv_freq" in name}
    assert buffers
    assert set(buffers.values()) == {torch.float32}
    assert chat.generate(PROMPTS[0], max_new_tokens=3)


@torch.no_grad()
def test_generation_with_cache_equals_full_recompute(chat: Chat) -> None:
    answers = [chat.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert answers == [greedy(chat, prompt, 12) for prompt in PROMPTS]
    assert len(set(answers)) > 1


def test_a_batch_answers_as_its_conversations_alone(chat: Chat) -> None:
    alone = [chat.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert chat.generate(PROMPTS, max_new_tokens=12) == alone


def test_streamed_pieces_join_to_the_whole(chat: Chat) -> None:
    pieces = list(chat.generate(PROMPTS[0], max_new_tokens=12, stream=True))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == chat.generate(PROMPTS[0], max_new_tokens=12)


def test_leaving_a_stream_early_stops_the_model(chat: Chat) -> None:
    stream = chat.generate(PROMPTS[0], max_new_tokens=10_000, min_new_tokens=10_000, stream=True)
    assert next(stream)
    stream.close()  # joins the model's thread; 10,000 tokens would take a minute


def test_an_error_in_a_stream_reaches_the_caller(chat: Chat) -> None:
    with pytest.raises(ValueError, match="temperature"):
        list(chat.generate(PROMPTS[0], do_sample=True, temperature=-1.0, stream=True))


def test_a_seed_of_too_many_bits_is_refused_before_anything_is_said(chat: Chat) -> None:
    for stream in (False, True):
        with pytest.raises(ValueError, match=rf"^seed is {2**70}; expected a whole number of 64"):
            chat.generate(PROMPTS[0], seed=2**70, do_sample=True, stream=stream)


def test_sampling_follows_its_seed_and_leaves_the_global_generator(chat: Chat) -> None:
    before = torch.get_rng_state()
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    first = chat.generate(PROMPTS[0], seed=1, **options)
    assert chat.generate(PROMPTS[0], seed=1, **options) == first
    assert any(chat.generate(PROMPTS[0], seed=seed, **options) != first for seed in range(2, 6))
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_stops_at_the_end_token(chat: Chat) -> None:
    bias = {(chat.processor.tokenizer.eos_token_id,): 1e4}
    assert chat.generate(PROMPTS, max_new_tokens=5, sequence_bias=bias) == ["", "", ""]


def test_bad_messages_and_modalities_are_named(chat: Chat) -> None:
    with pytest.raises(ValueError, match="role 'bot'"):
        chat.generate([{"role": "bot", "content": "a"}])
    with pytest.raises(ValueError, match="video"):
        chat.generate([Message("user", (Media("video", b"1", "mp4"),))])
    with pytest.raises(ValueError, match="a batch"):
        chat.generate(PROMPTS, stream=True)


@pytest.mark.parametrize("messages", [{"role": "user", "content": "a"}, None, 5, b"a", ["a", 5]])
def test_what_is_no_conversation_is_refused(chat: Chat, messages: Any) -> None:
    with pytest.raises(ValueError, match=r"a conversation is .*; expected a text") as error:
        chat.generate(messages)
    assert ("put the message into a list" in str(error.value)) == isinstance(messages, dict)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"num_return_sequences": 2}, "an answer is one text"),
        ({"return_dict_in_generate": True}, "an answer is one text"),
        ({"guidance_scale": 3.0}, r"in sampling=Sampling\(guidance_scale"),
        ({"temprature": 0.5}, "knows no such option"),
        ({"generation_config": GenerationConfig()}, "option by option"),
    ],
)
def test_options_that_it_does_not_take_are_named(chat: Chat, option: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"generate takes no {next(iter(option))}: .*{why}"):
        chat.generate(PROMPTS[0], **option)


def test_scores_equal_the_losses_of_single_batches_in_order(chat: Chat) -> None:
    texts = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10 w11", "w2"]
    samples = [
        Sample((*ask(bytes([i + 1]), "w1"), Message("assistant", (Text(text),))))
        for i, text in enumerate(texts)
    ]
    sums, counts = chat.score(samples, tokens_per_batch=30)
    for i, sample in enumerate(samples):
        batch = chat.batch([chat.processor.encode(sample)])
        with torch.no_grad():
            loss = NextToken()(chat.model, chat.model(batch), batch)
        torch.testing.assert_close(sums[i], loss.total.double(), atol=1e-4, rtol=1e-5)
        assert counts[i] == loss.count
    other = chat.score([Sample((*ask(b"\x55", "w1"), samples[0].messages[1]))])[0][0]
    assert abs(other - sums[0]) > 1e-4


def test_load_takes_the_trained_weights_of_a_step(run_dir: Path, chat: Chat) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000008.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    state = chat.model.state_dict()
    assert saved
    for name, tensor in saved.items():
        assert torch.equal(state[name.removeprefix("model.")], tensor)
    earlier = mmfusion.load(run_dir, step=4, device="cpu").model.state_dict()
    assert any(not torch.equal(earlier[n.removeprefix("model.")], t) for n, t in saved.items())


def test_load_names_what_is_missing(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        mmfusion.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; it has \[4, 8\]"):
        mmfusion.load(run_dir, step=5)
    with pytest.raises(ValueError, match="device 'gpu' cannot be used: "):
        mmfusion.load(run_dir, device="gpu")


def test_load_in_half_precision_answers(run_dir: Path) -> None:
    half = mmfusion.load(run_dir, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert isinstance(half.generate(PROMPTS[0], max_new_tokens=3), str)
    assert half.score([Sample((*PROMPTS[0], Message("assistant", (Text("w1"),))))])[1] > 0


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_is_kept_where_the_cpu_computes_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    rebuilt = load_module(run_dir)
    rebuilt.model.llm.to(torch.bfloat16)
    monkeypatch.setattr(mmfusion.inference, "load_module", lambda *_: rebuilt)
    monkeypatch.setattr(mmfusion.inference, "computes_bfloat16", lambda device: fast)
    chat = mmfusion.load(run_dir, device="cpu")
    expected = torch.bfloat16 if fast else torch.float32
    assert {p.dtype for p in chat.model.llm.parameters()} == {expected}
    assert isinstance(chat.generate(PROMPTS[0], max_new_tokens=3), str)


def test_load_leaves_the_global_generator(run_dir: Path) -> None:
    before = torch.get_rng_state()
    mmfusion.load(run_dir, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_prompt_is_gone_on_with_without_the_template(chat: Chat) -> None:
    encoded = chat.processor.prompt(ask(IMAGE, "w1 w2"), plain=True)
    sample = Sample((*ask(IMAGE, "w1 w2"), Message("assistant", (Text(" w3"),))), format="plain")
    whole = chat.processor.plan(sample).input_ids.tolist()
    ids = encoded.planned.input_ids.tolist()
    assert ids == whole[: len(ids)]
    assert len(ids) < len(chat.processor.prompt(ask(IMAGE, "w1 w2")).planned)
    batch = chat.batch([encoded])
    hidden = chat.model(batch).hidden_states[0, -1]
    likeliest = chat.processor.tokenizer.decode([int(chat.model.llm.logits(hidden).argmax())])
    assert chat.generate(ask(IMAGE, "w1 w2"), plain=True, max_new_tokens=1) == likeliest.strip()


def test_an_answer_ends_at_a_text(chat: Chat) -> None:
    whole = chat.generate(PROMPTS, max_new_tokens=8)
    stop = whole[0].split()[-1]
    for found, answer in zip(
        chat.generate(PROMPTS, max_new_tokens=8, stop=stop), whole, strict=True
    ):
        assert found == answer.partition(stop)[0].strip()
    pieces = list(chat.generate(PROMPTS[0], stream=True, max_new_tokens=8, stop=stop))
    assert "".join(pieces).strip() == whole[0].partition(stop)[0].strip()


def through_pickle(answer: Answer) -> Answer:
    return pickle.loads(pickle.dumps(answer))  # noqa: S301 (our own bytes)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_pickle])
def test_a_copy_of_an_answer_says_the_same(copied: Callable[[Answer], Answer]) -> None:
    answer = Answer([Text("here it is"), Media("image", IMAGE, "bin"), Text("done")])
    found = copied(answer)
    assert (type(found), str(found), found.parts) == (Answer, "here it is done", answer.parts)
    assert found.media == answer.media
