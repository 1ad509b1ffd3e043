from __future__ import annotations

from typing import Any

import pytest

from tests.engine.fakes import EOS_ID, FakeModelRunner, join, make_loaded, say
from tests.scheduling.fakes import GuessingDrafter
from tinyvllm.config import SamplingParams
from tinyvllm.engine.loading import LoadedEngine
from tinyvllm.engine.output import Delta, TextEngine
from tinyvllm.scheduling.drafts import AlwaysDraft, Speculator
from tinyvllm.scheduling.request import Request, Status


def answer(text: str | bytes, **params: Any) -> list[Delta]:
    """The deltas of a request that the model answers with `text`."""
    runner = FakeModelRunner()
    runner.choose = say(text)
    return ask(make_loaded(runner), **params)


def ask(loaded: LoadedEngine, **params: Any) -> list[Delta]:
    (request,) = loaded.factory.make_requests(
        "x", list(b"prompt"), SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **params})
    )
    loaded.engine.add(request)
    deltas = []
    while loaded.engine.has_work:
        deltas += [delta for _, delta in loaded.engine.step()]
    assert request.status is Status.FINISHED
    assert loaded.engine.core.stats.num_free_blocks == 999
    assert not loaded.engine._processors
    assert (request.finish_reason, request.stop_reason) == (deltas[-1].finish_reason, deltas[-1].stop_reason)
    return deltas


def test_text_comes_token_by_token_and_eos_is_no_part_of_it() -> None:
    deltas = answer("hello")
    assert [delta.text for delta in deltas] == ["h", "e", "l", "l", "o", ""]
    assert join(deltas).token_ids == (*b"hello", EOS_ID)
    assert [delta.finish_reason for delta in deltas] == [None] * 5 + ["stop"]
    last = deltas[-1]
    assert (last.stop_reason, last.num_prompt_tokens, last.num_output_tokens, last.num_cached_tokens) == (None, 6, 6, 0)


def test_characters_of_many_tokens_come_whole() -> None:
    deltas = answer("aé€😀z")
    assert [delta.text for delta in deltas] == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    deltas = answer("ab😀", max_tokens=4)
    assert join(deltas).text == "ab\ufffd"
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one END")])
def test_a_stop_string_across_tokens_ends_the_request_and_is_cut(include: bool, text: str) -> None:
    deltas = answer("one END two", stop=("END",), include_stop_str_in_output=include)
    whole = join(deltas)
    assert (whole.text, whole.finish_reason, whole.stop_reason) == (text, "stop", "END")
    assert whole.num_output_tokens == len(whole.token_ids) == len("one END")
    assert [delta.text for delta in deltas[4:6]] == ["", ""], "what may begin a stop string is held back"


def test_held_back_text_comes_when_it_was_none() -> None:
    assert join(answer("one ENd", stop=("END",))).text == "one ENd"
    assert join(answer("one EN", stop=("END",))).text == "one EN"


def test_a_stop_string_on_the_last_allowed_token_is_a_stop() -> None:
    whole = join(answer("one END two", stop=("END",), max_tokens=7))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("one ", "stop", "END")


def test_a_stop_string_before_min_tokens_is_text() -> None:
    whole = join(answer("END, END", stop=("END",), min_tokens=4))
    assert (whole.text, whole.stop_reason) == ("END, ", "END")
    assert join(answer("END", stop=("END",), min_tokens=3)).finish_reason == "stop"
    assert join(answer("END", stop=("END",), min_tokens=3)).text == "END"


def test_a_stop_id_is_no_part_of_the_text_unless_asked_for() -> None:
    for include, text in ((False, "on"), (True, "one")):
        whole = join(answer("one", stop_token_ids=(ord("e"),), include_stop_str_in_output=include))
        assert (whole.text, whole.finish_reason, whole.stop_reason) == (text, "stop", ord("e"))
        assert whole.token_ids == tuple(b"one")


def test_special_tokens_are_text_only_when_asked_for() -> None:
    def choose(request: Request, digest: int) -> int:
        return [104, 257, 105, EOS_ID][len(request.output_ids)]

    for skip, text in ((True, "hi"), (False, "h<|im_start|>i")):
        runner = FakeModelRunner()
        runner.choose = choose
        assert join(ask(make_loaded(runner), skip_special_tokens=skip)).text == text


def test_logprobs_spell_their_tokens() -> None:
    whole = join(answer("hé", logprobs=2))
    assert [entry.token_id for entry in whole.logprobs] == [*"hé".encode(), EOS_ID]
    first, second = whole.logprobs[:2]
    assert (first.token, first.bytes, first.logprob) == ("h", b"h", -0.5)
    assert [(top.token, top.logprob) for top in first.top] == [("h", -0.5), ("i", -1.5)]
    assert (second.token, second.bytes) == ("\ufffd", b"\xc3")
    assert all(entry.top == () for entry in join(answer("hi", logprobs=0)).logprobs)
    assert join(answer("hi")).logprobs == ()


def test_a_request_that_fails_says_why() -> None:
    runner = FakeModelRunner()
    runner.choose = lambda request, digest: -1
    (delta,) = ask(make_loaded(runner))
    assert delta.finish_reason == "error"
    assert str(delta.error).startswith("the model produced no finite logits for the token at position")
    assert (delta.token_ids, delta.text) == ((), "")


def test_abort_gives_what_was_held_back() -> None:
    runner = FakeModelRunner()
    runner.choose = say("one END")
    loaded = make_loaded(runner)
    (request,) = loaded.factory.make_requests("x", [1], SamplingParams(stop=("END",)))
    loaded.engine.add(request)
    text = "".join(delta.text for _ in range(6) for _, delta in loaded.engine.step())
    last = loaded.engine.abort("x")
    assert last is not None
    assert (text, last.text, last.finish_reason) == ("one ", "EN", "abort")
    assert loaded.engine.abort("x") is None
    assert not loaded.engine.has_work


def test_text_that_cannot_be_made_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeModelRunner()
    runner.choose = lambda request, digest: 7 if request.request_id == "bad" and request.output_ids else 65
    loaded = make_loaded(runner)
    engine: TextEngine = loaded.engine

    class Brittle:
        def __getattr__(self, name: str) -> Any:
            return getattr(loaded.tokenizer, name)

        def token_bytes(self, token_id: int) -> bytes:
            if token_id == 7:
                raise KeyError("7")
            return loaded.tokenizer.token_bytes(token_id)

    engine.tokenizer = Brittle()  # type: ignore[assignment]
    for name in ("bad", "good"):
        engine.add(loaded.factory.make_requests(name, [1], SamplingParams(max_tokens=5))[0])
    last = {}
    while engine.has_work:
        last.update({request.request_id: delta for request, delta in engine.step() if delta.finish_reason})
    assert (last["bad"].finish_reason, last["good"].finish_reason) == ("error", "length")
    assert "cannot be detokenized" in str(last["bad"].error)
    engine.core.scheduler.block_manager.audit()


def test_deltas_join() -> None:
    deltas = answer("héllo wörld END", stop=("END",), logprobs=1)
    whole = join(deltas)
    assert whole.text == "héllo wörld "
    assert len(whole.logprobs) == len(whole.token_ids) == whole.num_output_tokens
    assert (whole.finish_reason, whole.stop_reason) == ("stop", "END")


def test_a_step_with_drafts_ends_at_a_stop_string_among_them() -> None:
    """The tokens after it in the same step are dropped. The last delta says how many drafts were verified."""
    plain = join(ask(make_loaded(), max_tokens=24))

    def ask_drafting(**params: Any) -> Delta:
        loaded = make_loaded(FakeModelRunner(max_verify_rows=16))
        drafter = GuessingDrafter(lambda request: list(plain.token_ids), right=1.0)
        loaded.core.scheduler.speculator = Speculator(drafter, AlwaysDraft(), 7)
        return join(ask(loaded, max_tokens=24, **params))

    whole = ask_drafting()
    assert (whole.text, whole.token_ids, whole.finish_reason) == (plain.text, plain.token_ids, "length")
    assert whole.timing is not None and whole.timing.num_drafted == whole.timing.num_accepted > 10
    stop = plain.text[9]
    cut = ask_drafting(stop=(stop,))
    assert cut.text == plain.text[: plain.text.index(stop)] and cut.finish_reason == "stop"
