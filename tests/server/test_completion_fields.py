"""What /v1/completions has beyond text and logprobs: suffix, token ids, and prompts that are cut to fit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.client import CHAT, chat, complete, error_of, events, post
from tests.server.fake_engine import FakeEngine
from tinyvllm.text.fim import FillInTheMiddle

FIM = FillInTheMiddle(prefix_id=1, suffix_id=2, middle_id=3, is_suffix_first=False, end_ids=frozenset({1, 2, 3, 256}))


def coder(**options: Any) -> FakeEngine:
    engine = FakeEngine(**options)
    engine.tokenizer.fim = FIM
    return engine


async def test_a_suffix_asks_for_the_middle_and_its_marks_end_the_answer() -> None:
    engine = coder(reply="mid")
    answer = await complete(engine, prompt=["ab", "c"], suffix="ef", stop_token_ids=[9, 2])
    assert [call.prompt_ids for call in engine.calls] == [[1, *b"ab", 2, *b"ef", 3], [1, *b"c", 2, *b"ef", 3]]
    assert engine.calls[0].params.stop_token_ids == (9, 2, 1, 3)  # 256 is EOS, which ends every answer
    assert answer["choices"][0]["text"] == "mid" and answer["usage"]["prompt_tokens"] == 7 + 6
    await complete(engine, prompt=[97, 98], suffix="ef")
    assert engine.calls[-1].prompt_ids == [1, *b"ab", 2, *b"ef", 3]
    await complete(engine, suffix="")
    assert engine.calls[-1].prompt_ids == [*b"ab"] and engine.calls[-1].params.stop_token_ids == ()


async def test_a_suffix_counts_towards_the_context() -> None:
    response = await post(coder(), "/v1/completions", {"prompt": "ab", "suffix": "x" * 1000})
    assert error_of(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("has_echo", [False, True])
async def test_token_ids_are_returned_whole_and_streamed(has_echo: bool) -> None:
    body: dict[str, Any] = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 3, "return_token_ids": True, "echo": has_echo}
    answer = await complete(FakeEngine(), **body)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[97, 98], [97, 98], [99], [99]]
    assert [choice["token_ids"] for choice in answer["choices"]] == [[1, 1, 1]] * 4
    streamed: dict[int, list[dict[str, Any]]] = {}
    for event in await events(FakeEngine(), "/v1/completions", body):
        for choice in event["choices"]:
            streamed.setdefault(choice["index"], []).append(choice)
    for choice in answer["choices"]:
        first, *others = streamed[choice["index"]]
        assert first["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in other for other in others)
        pieces = streamed[choice["index"]]
        assert [one for piece in pieces for one in piece.get("token_ids", ())] == choice["token_ids"]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]


async def test_answers_have_no_token_ids_unless_requested() -> None:
    (choice,) = (await complete(FakeEngine()))["choices"]
    assert "token_ids" not in choice and "prompt_token_ids" not in choice


async def test_logprobs_may_name_tokens_by_their_ids() -> None:
    fields = {"return_tokens_as_token_ids": True, "logprobs": 2, "echo": True, "max_tokens": 1}
    (choice,) = (await complete(FakeEngine(reply="x"), **fields))["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:97", "token_id:98", "token_id:99"]
    assert set(choice["logprobs"]["top_logprobs"][2]) == {"token_id:0", "token_id:1", "token_id:99"}
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


async def test_chats_have_token_ids_too() -> None:
    body = {**CHAT, "n": 2, "return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True}
    body |= {"max_tokens": 3, "top_logprobs": 1}
    answer = await chat(FakeEngine(), **body)
    assert bytes(answer["prompt_token_ids"]) == b"<user>hi\n<assistant>"
    assert [choice["token_ids"] for choice in answer["choices"]] == [[1, 1, 1]] * 2
    token = answer["choices"][0]["logprobs"]["content"][0]
    assert (token["token"], token["top_logprobs"][0]["token"]) == ("token_id:99", "token_id:0")
    first, *others = await events(FakeEngine(), "/v1/chat/completions", body)
    assert first["prompt_token_ids"] == answer["prompt_token_ids"]
    assert not any("prompt_token_ids" in event for event in others)
    for index in range(2):
        pieces = [choice for event in others for choice in event["choices"] if choice["index"] == index]
        assert [one for piece in pieces for one in piece.get("token_ids", ())] == [1, 1, 1]
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == "Hel"
    assert "token_ids" not in (await chat(FakeEngine()))["choices"][0]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "fgh"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, "fgh"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": 99}, "abcdefgh"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 6}, "efgh"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 2}, "abcdefgh"),
        ({"truncate_prompt_tokens": 3, "prompt": [*b"abcdefgh"]}, "fgh"),
    ],
)
async def test_a_prompt_is_cut_to_the_tokens_that_the_request_keeps(fields: dict[str, Any], kept: str) -> None:
    engine = FakeEngine(max_model_len=10)
    answer = await complete(engine, **{"prompt": "abcdefgh", "max_tokens": 1, "echo": True, **fields})
    assert engine.calls[0].prompt == kept and answer["choices"][0]["text"].startswith(kept)
    assert answer["usage"]["prompt_tokens"] == len(kept)


async def test_a_chat_is_cut_as_its_rendered_text() -> None:
    engine = FakeEngine()
    await chat(engine, truncate_prompt_tokens=5)
    assert engine.calls[0].prompt == "tant>"
    engine = FakeEngine(max_model_len=20)
    await chat(engine, truncate_prompt_tokens=-1, max_completion_tokens=8)
    assert engine.calls[0].prompt == ">hi\n<assistant>"[-12:]
    body = {**CHAT, "truncate_prompt_tokens": 15, "max_completion_tokens": 8}  # what is kept must fit
    assert (await post(engine, "/v1/chat/completions", body)).status_code == 400
