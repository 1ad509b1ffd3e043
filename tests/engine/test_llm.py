from __future__ import annotations

import dataclasses
import logging
import threading
from typing import Any

import pytest

from tests.engine.fakes import EOS_ID, FakeModelRunner, make_loaded, say
from tests.scheduling.fakes import make_request, run_alone
from tinyvllm import LLM, SamplingParams
from tinyvllm.config import EngineConfig, GenerationDefaults
from tinyvllm.engine import llm as llm_module
from tinyvllm.errors import ContextLengthError, EngineDeadError, RequestError, TinyvllmError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture
def make_llm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """make_llm(runner, defaults, **fields): an LLM around a fake runner."""

    def make(runner: FakeModelRunner | None = None, defaults: GenerationDefaults | None = None, **fields: Any) -> LLM:
        def load(config: EngineConfig, progress: object) -> object:
            return make_loaded(runner or FakeModelRunner(), defaults)

        monkeypatch.setattr(llm_module, "load_engine", load)
        return LLM("tiny", **fields)

    return make


def test_prompts_are_answered_in_their_order(make_llm: Any) -> None:
    prompts = [f"prompt {'x' * i}" for i in range(20)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + i % 5) for i in range(20)]
    outputs = make_llm().generate(prompts, params)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        assert (output.prompt, output.prompt_token_ids) == (prompt, list(prompt.encode()))
        assert output.finished
        (choice,) = output.outputs
        alone = run_alone(make_request(prompt=prompt.encode(), max_tokens=one.max_tokens or 0))
        assert choice.token_ids == alone or choice.token_ids == alone[: alone.index(EOS_ID) + 1]
    assert len({output.request_id for output in outputs}) == 20


def test_text_and_ids_are_the_same_prompt(make_llm: Any) -> None:
    llm = make_llm()
    answers = [
        llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
        for prompt in ("héllo", {"prompt": "héllo"}, {"prompt_token_ids": list("héllo".encode())}, ["héllo"])
    ]
    assert all(answer == answers[0] for answer in answers)
    assert llm.generate({"prompt_token_ids": [1, 2]}, GREEDY)[0].prompt is None


def test_an_output_has_vllms_names(make_llm: Any) -> None:
    runner = FakeModelRunner()
    runner.choose = say("hi")
    (output,) = make_llm(runner).generate("prompt", SamplingParams(logprobs=1))
    choice = output.outputs[0]
    assert (choice.index, choice.text, choice.finish_reason, choice.stop_reason) == (0, "hi", "stop", None)
    assert choice.token_ids == [*b"hi", EOS_ID]
    assert choice.cumulative_logprob == -1.5
    assert choice.logprobs is not None and len(choice.logprobs) == 3
    first = choice.logprobs[0][ord("h")]
    assert (first.logprob, first.rank, first.decoded_token) == (-0.5, 1, "h")


def test_the_prompts_logprobs_come_once_whatever_n_is(make_llm: Any) -> None:
    runner = FakeModelRunner(max_num_seqs=2)
    (output,) = make_llm(runner).generate("prompt", SamplingParams(n=3, prompt_logprobs=2, max_tokens=2))
    first, *others = output.prompt_logprobs
    assert first is None
    assert [next(iter(entry)) for entry in others] == list(b"rompt")
    assert all(len(entry) >= 2 for entry in others)
    assert sum(entry.num_scored for plan in runner.plans for entry in plan.entries) == 5
    (plain,) = make_llm(runner).generate("prompt", SamplingParams(max_tokens=2))
    assert plain.prompt_logprobs is None


def test_without_logprobs_there_are_none(make_llm: Any) -> None:
    choice = make_llm().generate("prompt", GREEDY)[0].outputs[0]
    assert (choice.logprobs, choice.cumulative_logprob) == (None, None)


def test_n_choices_have_their_own_seeds(make_llm: Any) -> None:
    llm = make_llm()
    params = SamplingParams(n=3, seed=5, max_tokens=8)
    choices = llm.generate("prompt", params)[0].outputs
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in choices}) == 3
    alone = llm.generate("prompt", SamplingParams(seed=6, max_tokens=8))[0].outputs[0]
    assert alone.token_ids == choices[1].token_ids


def test_the_prefix_cache_lasts_from_call_to_call(make_llm: Any) -> None:
    llm = make_llm()
    assert llm.generate("the same long prompt", GREEDY)[0].num_cached_tokens == 0
    assert llm.generate("the same long prompt", GREEDY)[0].num_cached_tokens == 16
    salted = {"prompt": "the same long prompt", "cache_salt": "secret"}
    assert [llm.generate(salted, GREEDY)[0].num_cached_tokens for _ in range(2)] == [0, 16]
    with pytest.raises(RequestError, match="cache_salt must be a string"):
        llm.generate({**salted, "cache_salt": ""}, GREEDY)
    assert llm.stats.prefix_hits == 32


def test_chat_writes_the_template(make_llm: Any) -> None:
    llm = make_llm()
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids[0] == 257
    assert len(llm.chat([messages, messages], GREEDY)) == 2
    (output,) = llm.chat([*messages, {"role": "assistant", "content": "i"}], GREEDY, continue_final_message=True)
    assert output.prompt is not None and output.prompt.endswith("assistant\ni")
    with pytest.raises(RequestError):
        llm.chat([{"role": "user", "content": 5}], GREEDY)
    llm._loaded = dataclasses.replace(llm._loaded, chat_template=None)
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat(messages, GREEDY)


def test_no_params_are_the_models_own(make_llm: Any) -> None:
    llm = make_llm(defaults=GenerationDefaults(temperature=0.25, top_k=7, eos_ids=(65,)))
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25, top_k=7)
    assert len(llm.generate("prompt")[0].outputs[0].token_ids) <= 16
    assert make_llm().get_default_sampling_params() == SamplingParams()


def test_the_ends_of_the_generation_config_count(make_llm: Any) -> None:
    runner = FakeModelRunner()
    runner.choose = say("BA")
    (output,) = make_llm(runner, GenerationDefaults(eos_ids=(65,))).generate("prompt", GREEDY)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("B", "stop")


def test_a_refused_prompt_stops_the_call_before_it_begins(make_llm: Any) -> None:
    runner = FakeModelRunner()
    llm = make_llm(runner)
    with pytest.raises(ContextLengthError, match=r"256 tokens, .* 304 of the prompt|the prompt has 304"):
        llm.generate(["fine", "too long" * 38], GREEDY)
    assert not runner.plans
    with pytest.raises(RequestError, match="empty"):
        llm.generate("", GREEDY)
    with pytest.raises(RequestError, match="a prompt is int 5"):
        llm.generate([5], GREEDY)
    with pytest.raises(RequestError, match="2 sampling params for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])
    assert llm.generate([], GREEDY) == []


def test_an_unknown_setting_lists_the_known(make_llm: Any) -> None:
    with pytest.raises(TinyvllmError, match=r"no setting max_len: it has .*max_model_len"):
        make_llm(max_len=5)
    assert make_llm(max_model_len=128, max_num_seqs=4).config.max_num_seqs == 4


def test_an_interrupted_call_leaves_nothing_running(make_llm: Any) -> None:
    runner = FakeModelRunner()
    llm = make_llm(runner)

    def interrupt(plan: object) -> None:
        if len(runner.plans) == 3:
            runner.before_step = lambda plan: None
            raise KeyboardInterrupt

    runner.before_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY)
    assert (llm.stats.num_running, llm.stats.num_waiting, llm.stats.num_free_blocks) == (0, 0, 999)
    assert llm.generate("a", GREEDY)[0].finished


def test_a_failed_step_is_an_error_in_the_output_and_many_end_the_call(
    make_llm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runner = FakeModelRunner()
    llm = make_llm(runner)

    def fail(plan: object) -> None:
        raise OSError("gone")

    runner.before_step = fail
    with caplog.at_level(logging.CRITICAL):
        (output,) = llm.generate("a", GREEDY)
        assert (output.outputs[0].finish_reason, output.finished) == ("error", True)
        with pytest.raises(EngineDeadError):
            llm.generate(["a"] * 20, GREEDY)
    assert llm.stats.num_waiting == 0


def test_another_thread_is_told_to_use_the_async_engine(make_llm: Any) -> None:
    llm, caught = make_llm(), []

    def use() -> None:
        try:
            llm.generate("x", GREEDY)
        except TinyvllmError as error:
            caught.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert "AsyncEngine" in caught[0]


def test_a_bar_is_drawn_on_terminals_only(make_llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    llm = make_llm()
    llm.generate("x", GREEDY)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    llm.generate(["x", "y"], GREEDY)
    assert "2/2" in capsys.readouterr().err
    llm.generate("x", GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_close_gives_the_device_back(make_llm: Any) -> None:
    runner = FakeModelRunner()
    make_llm(runner).close()
    assert runner.is_closed
