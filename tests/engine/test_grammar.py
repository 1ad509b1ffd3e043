"""Grammars through the whole engine, on a tiny model with random weights: outputs are what was asked for."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Iterator

import jsonschema
import pytest

from tinyvllm.config import GrammarSpec, ModelFiles, SamplingParams
from tinyvllm.engine.llm import LLM
from tinyvllm.errors import RequestError

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"type": "array", "items": {"enum": [1, 2]}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tiny_hf_files: ModelFiles) -> Iterator[LLM]:
    """With room for 112 tokens, so that several long outputs preempt each other."""
    llm = LLM(
        str(tiny_hf_files.path),
        max_num_seqs=4,
        max_num_batched_tokens=16,
        num_gpu_blocks_override=8,
        decode_buckets=(4,),
        token_buckets=(16,),
    )
    yield llm
    llm.close()


def params(kind: str, value: object, **settings: object) -> SamplingParams:
    text = value if isinstance(value, str) else json.dumps(value)
    return SamplingParams(grammar=GrammarSpec(kind, text), **{"max_tokens": 90, **settings})  # type: ignore[arg-type]


def test_documents_are_of_their_schema_or_end_by_length(llm: LLM) -> None:
    settings = [params("json_schema", SCHEMA, seed=seed, temperature=1.0) for seed in range(16)]
    outputs = [output.outputs[0] for output in llm.generate(["x"] * 16, settings)]
    reasons = [output.finish_reason for output in outputs]
    assert set(reasons) <= {"stop", "length"} and "stop" in reasons
    for output in outputs:
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), SCHEMA)


def test_neighbors_without_a_grammar_are_left_alone(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=12)
    alone = llm.generate("abc", free)[0].outputs[0].token_ids
    mixed = llm.generate(["abc"] * 3, [params("regex", "[0-9]{20}"), free, params("choice", ["yes", "no"])])
    texts = [output.outputs[0].text for output in mixed]
    assert mixed[1].outputs[0].token_ids == alone
    assert re.fullmatch("[0-9]{20}", texts[0]) and texts[2] in ("yes", "no")
    assert [output.outputs[0].finish_reason for output in mixed] == ["stop", "length", "stop"]


def test_the_last_token_of_a_grammar_is_part_of_the_text_and_no_more_follow(llm: LLM) -> None:
    [output] = llm.generate("x", params("regex", "ab", ignore_eos=True))
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("ab", "stop")
    assert len(output.outputs[0].token_ids) == 2


def test_an_output_that_may_go_on_ends_at_eos(llm: LLM) -> None:
    outputs = llm.generate(["x"] * 8, [params("regex", "a*", seed=seed) for seed in range(8)])
    for output in (output.outputs[0] for output in outputs):
        assert re.fullmatch("a*", output.text) and output.finish_reason in ("stop", "length")


def test_choices_of_one_request_have_matchers_of_their_own(llm: LLM) -> None:
    [output] = llm.generate("x", params("choice", ["yes", "no"], n=4, seed=1))
    assert len(output.outputs) == 4 and {choice.text for choice in output.outputs} <= {"yes", "no"}


def test_a_preempted_request_keeps_its_place_in_the_grammar(llm: LLM) -> None:
    before = llm.stats.num_preemptions
    outputs = llm.generate(["x" * 8] * 4, params("regex", "([a-e][0-9]){30}"))
    assert llm.stats.num_preemptions > before
    assert all(re.fullmatch("([a-e][0-9]){30}", output.outputs[0].text) for output in outputs)


def test_a_bad_grammar_refuses_the_call(llm: LLM) -> None:
    with pytest.raises(RequestError, match="unclosed"):
        llm.generate("x", params("regex", "["))


def test_a_grammar_that_hits_a_limit_ends_its_request_alone(llm: LLM) -> None:
    hostile = params("regex", "(.*){1,1000}x(.*){500}", seed=3)
    outputs = llm.generate(["x", "y"], [hostile, params("regex", "[0-9]{9}")])
    first, second = (output.outputs[0] for output in outputs)
    assert first.finish_reason in ("error", "length")
    assert second.finish_reason == "stop" and len(second.text) == 9


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_five_hundred_documents_of_a_small_model_are_valid(smollm2_files: ModelFiles) -> None:
    """At temperature 1; `pytest -m slow -s` prints the throughput with the mask and without it."""
    llm = LLM(str(smollm2_files.path), max_num_seqs=16, max_model_len=512, decode_buckets=(16,))
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    chat = [{"role": "user", "content": "Describe a person as JSON."}]
    bound = [params("json_schema", schema, seed=seed, temperature=1.0, max_tokens=80) for seed in range(500)]
    free = [dataclasses.replace(one, grammar=None) for one in bound[:100]]
    for name, settings in (("with the mask", bound), ("without", free)):
        start_s = time.perf_counter()
        outputs = [output.outputs[0] for output in llm.chat([chat] * len(settings), settings)]
        num_tokens = sum(len(output.token_ids) for output in outputs)
        print(f"{name}: {num_tokens / (time.perf_counter() - start_s):.1f} tokens/s of {len(settings)} requests")
        if settings is bound:
            reasons = Counter(output.finish_reason for output in outputs)
            print(reasons)
            assert set(reasons) <= {"stop", "length"} and reasons["stop"] > 450
            for output in outputs:
                if output.finish_reason == "stop":
                    jsonschema.validate(json.loads(output.text), schema)
    llm.close()
