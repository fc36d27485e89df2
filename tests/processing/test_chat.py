from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mmfusion.processing.chat import ChatRenderer
from mmfusion.processing.special_tokens import add_placeholders
from mmfusion.types import DataError, Media, Message, Text
from tests.processing.conftest import CHATML, GENERATION, LLAMA2, LLAMA2_BLOCKS, NO_END_TOKEN

QUESTION, ANSWER = "What is in the picture?", "A red apple. größer ☃ 你好"
TALK = [("user", QUESTION), ("assistant", ANSWER), ("user", "two dogs?"), ("assistant", "Yes.")]


def messages(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, (Text(text),)) for role, text in turns]


def renderer(tokenizer: Any, template: str | None) -> ChatRenderer:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    add_placeholders(tokenizer, ["image"])
    return ChatRenderer(tokenizer, ["image"])


def trained_text(chat: ChatRenderer, ids: list[int], trained: list[bool]) -> list[str]:
    """Decoded runs of trained tokens."""
    runs: list[list[int]] = [[]]
    for index, mark in zip(ids, trained, strict=True):
        if mark:
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [chat.tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def squeeze(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (LLAMA2, "</s>"), (GENERATION, "<|im_end|>")],
    ids=["chatml", "llama2", "generation"],
)
def test_answers_and_their_end_tokens_are_trained(
    trained_tokenizer: Any, template: str, end: str
) -> None:
    chat = renderer(trained_tokenizer, template)
    ids, trained = chat.chat(messages(*TALK))
    turns = [{"role": role, "content": text} for role, text in TALK]
    assert ids == chat.tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    runs = [squeeze(run) for run in trained_text(chat, ids, trained)]
    unknown = chat.tokenizer.decode(
        chat.tokenizer(ANSWER, add_special_tokens=False)["input_ids"], skip_special_tokens=False
    )
    assert runs == [squeeze(unknown) + end, "Yes." + end]


ENDINGS = [
    "Yes.",
    "great 😀",
    "ok 👍🏽",
    "是的",
    "猫です。",
    "e\u0301",
    "🇩🇪",
    "x\n",
    " y",
    "नमस्ते",
    "👩‍👩‍👧",
    "\u0301",
]


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
def test_generation_blocks_train_what_the_same_template_without_them_does(
    trained_tokenizer: Any, template: str
) -> None:
    blocks = {CHATML: GENERATION, LLAMA2: LLAMA2_BLOCKS}[template]
    rng = random.Random(0)
    for _ in range(60):
        answers = [" ".join(rng.choices(ENDINGS, k=rng.randint(1, 4))) for _ in range(2)]
        talk = [("user", rng.choice(ENDINGS)), ("assistant", answers[0])]
        talk += [("user", "two?"), ("assistant", answers[1])]
        plain, marked = (renderer(trained_tokenizer, one) for one in (template, blocks))
        ids, trained = plain.chat(messages(*talk))
        found_ids, found = marked.chat(messages(*talk))
        assert found_ids == ids
        assert found == trained, talk
        assert (
            found_ids
            == marked.tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in talk]
            )["input_ids"]
        )


def test_a_block_that_holds_its_end_token_trains_nothing_after_it(trained_tokenizer: Any) -> None:
    """The next special token opens the next turn."""
    inside = GENERATION.replace(
        "{{ m['content'] }}{% endg", "{{ m['content'] + '<|im_end|>\n' }}{% endg"
    )
    inside = inside.replace(
        "{{ '<|im_end|>\n' }}", "{% if m['role'] == 'user' %}<|im_end|>\n{% endif %}"
    )
    assert inside.count("im_end") == 2
    chat = renderer(trained_tokenizer, inside)
    runs = trained_text(chat, *chat.chat(messages(*TALK)))
    assert [squeeze(run)[-10:] for run in runs] == ["<|im_end|>"] * 2


def test_end_token_is_trained_though_it_pads(trained_tokenizer: Any) -> None:
    chat = renderer(trained_tokenizer, LLAMA2)
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id
    ids, trained = chat.chat(messages(*TALK))
    assert [trained[i] for i, index in enumerate(ids) if index == chat.tokenizer.eos_token_id] == [
        True,
        True,
    ]


def test_template_without_end_token_trains_the_whole_turn(trained_tokenizer: Any) -> None:
    chat = renderer(trained_tokenizer, NO_END_TOKEN)
    runs = trained_text(chat, *chat.chat(messages(*TALK)))
    assert [squeeze(run)[-4:] for run in runs][1] == "Yes."
    assert not any("dogs" in run for run in runs)


def test_generation_prompt_is_the_templates_own(trained_tokenizer: Any) -> None:
    chat = renderer(trained_tokenizer, CHATML)
    ids, trained = chat.chat(messages(("user", QUESTION)), generation_prompt=True)
    turns = [{"role": "user", "content": QUESTION}]
    expected = chat.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids == expected
    assert not any(trained)
    whole, _ = chat.chat(messages(("user", QUESTION), ("assistant", "Yes.")))
    assert whole[: len(ids)] == ids


def test_placeholder_stands_where_the_media_is(trained_tokenizer: Any) -> None:
    chat = renderer(trained_tokenizer, CHATML)
    image = Media("image", b"", "jpg")
    talk = [
        Message("user", (Text("a"), image, Text("b"), image)),
        Message("assistant", (Text("Yes."),)),
    ]
    ids, _ = chat.chat(talk)
    text = squeeze(chat.tokenizer.decode(ids))
    assert "user" + "a<image>b<image>" + "<|im_end|>" in text


@pytest.mark.parametrize("forged", ["<|im_end|>", "<image>", "</s>", "x<|im_start|>system"])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_special_token_in_text_is_refused(trained_tokenizer: Any, forged: str, role: str) -> None:
    chat = renderer(trained_tokenizer, CHATML)
    talk = dict(TALK[:2]) | {role: f"see {forged} here"}
    with pytest.raises(DataError, match="special token") as error:
        chat.chat(messages(*talk.items()))
    assert error.value.reason == "special_token_in_text"


def test_special_token_split_over_two_parts_is_refused(trained_tokenizer: Any) -> None:
    chat = renderer(trained_tokenizer, CHATML)
    split = Message("user", (Text("<|im_"), Text("end|>")))
    with pytest.raises(DataError, match="special token"):
        chat.chat([split, Message("assistant", (Text("Yes."),))])


def test_missing_template_says_what_to_do(trained_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="chat_template"):
        renderer(trained_tokenizer, None).chat(messages(*TALK))


def test_template_that_rewrites_earlier_turns_is_named(trained_tokenizer: Any) -> None:
    counting = "{{ messages | length }}" + CHATML
    with pytest.raises(ValueError, match="generation") as error:
        renderer(trained_tokenizer, counting).chat(messages(*TALK))
    assert not isinstance(error.value, DataError)


def test_template_that_drops_thoughts_of_earlier_turns_still_works(trained_tokenizer: Any) -> None:
    """Some templates put an empty thought before the last answer only."""
    thinking = CHATML.replace(
        "+ m['content'] +",
        "+ ('<think></think>' if loop.last and m['role'] == 'assistant' else '') + m['content'] +",
    )
    chat = renderer(trained_tokenizer, thinking)
    runs = trained_text(chat, *chat.chat(messages(*TALK)))
    assert len(runs) == 2
    assert all(run.endswith("<|im_end|>") for run in runs)


@pytest.mark.parametrize("template", [LLAMA2, LLAMA2_BLOCKS], ids=["llama2", "blocks"])
def test_template_that_refuses_roles_is_a_data_error(trained_tokenizer: Any, template: str) -> None:
    chat = renderer(trained_tokenizer, template)
    with pytest.raises(DataError, match="alternate") as error:
        chat.chat(messages(("system", "a"), *TALK))
    assert error.value.reason == "template_refused"


@pytest.mark.parametrize("roles", [["assistant"], ["user", "system"], ["system"], []])
def test_wrong_order_is_a_data_error(trained_tokenizer: Any, roles: list[str]) -> None:
    with pytest.raises(DataError) as error:
        renderer(trained_tokenizer, CHATML).chat(messages(*((role, "a") for role in roles)))
    assert error.value.reason == "wrong_order"


def test_plain_sample_starts_with_bos_and_may_end_with_eos(trained_tokenizer: Any) -> None:
    chat = renderer(trained_tokenizer, CHATML)
    talk = messages(("user", "caption:"), ("assistant", " a black bird.\n"))
    ids, trained = chat.plain(talk, eos=True)
    assert ids[0] == chat.tokenizer.bos_token_id
    assert ids[-1] == chat.tokenizer.eos_token_id
    assert trained[-1]
    joined = chat.tokenizer("caption: a black bird.\n", add_special_tokens=False)["input_ids"]
    assert ids[1:-1] == joined
    assert squeeze(trained_text(chat, ids[:-1], trained[:-1])[0]) == "ablackbird."
    assert chat.plain(talk, eos=False)[0] == ids[:-1]


def test_start_token_without_bos_is_the_chats_first(trained_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(trained_tokenizer)
    tokenizer.bos_token = None
    chat = renderer(tokenizer, CHATML)
    ids, _ = chat.plain(messages(("assistant", "bird")), eos=False)
    assert ids[0] == chat.tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_tokenizer_that_trims_white_space_from_offsets(tmp_path: Any) -> None:
    """Their newline before the answer has an empty range that touches it."""
    from tokenizers import processors

    from tests.processing.conftest import train

    tokenizer = train("bpe", tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    chat = renderer(tokenizer, CHATML)
    runs = trained_text(chat, *chat.chat(messages(("user", "a"), ("assistant", "Yes. \n"))))
    assert runs == ["Yes. \n<|im_end|>"]


@pytest.fixture(scope="module")
def smollm(real_weights: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(real_weights["smollm2-135m-instruct"])


@pytest.mark.slow
def test_smollm_ids_equal_apply_chat_template(smollm: Any) -> None:
    chat = renderer(smollm, smollm.chat_template)
    for talk in (TALK, [("system", "Be brief."), *TALK], TALK[:2]):
        ids, trained = chat.chat(messages(*talk))
        turns = [{"role": role, "content": text} for role, text in talk]
        assert ids == smollm.apply_chat_template(turns, tokenize=True)["input_ids"]
        answers = [text + "<|im_end|>" for role, text in talk if role == "assistant"]
        assert trained_text(chat, ids, trained) == answers


def test_a_template_that_prints_the_date_gives_the_same_ids_every_day(
    trained_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for template in (CHATML, GENERATION):
        chat = renderer(trained_tokenizer, "Today: {{ strftime_now('%d') }}\n" + template)
        ids, trained = chat.chat(messages(*TALK))
        assert chat.tokenizer.decode(ids).startswith("Today: 26")
        assert squeeze(trained_text(chat, ids, trained)[0]).startswith(squeeze(ANSWER))
        prompt, _ = chat.chat(messages(*TALK[:1]), generation_prompt=True)
        assert chat.tokenizer.decode(prompt).startswith("Today: 26")
