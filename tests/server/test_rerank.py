"""/v1/rerank and /v1/score over ASGI: formats and refusals. Scores of real models are in tests/families."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.client import error_of, post
from tests.server.fake_engine import FakeEngine

RERANK, SCORE = "/v1/rerank", "/v1/score"


def embedder() -> FakeEngine:
    """Its vectors are a text's length, first and last byte, and 0."""
    engine = FakeEngine()
    engine.model_config.pooling = "last"
    return engine


async def test_documents_come_in_the_order_of_their_scores() -> None:
    body = {"query": "a", "documents": ["b", {"text": "z"}, "b"]}
    answer = (await post(embedder(), RERANK, body)).json()
    assert [(result["index"], result["document"]["text"]) for result in answer["results"]] == [
        (1, "z"),
        (0, "b"),
        (2, "b"),
    ]
    assert answer["results"][0]["relevance_score"] == 1 + 2 * 97 * 122
    assert answer["id"].startswith("rerank-") and answer["model"] == "tiny"
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}  # of each text once
    answer = (await post(embedder(), RERANK, body | {"top_n": 1, "return_documents": False})).json()
    assert [set(result) for result in answer["results"]] == [{"index", "relevance_score"}]


async def test_texts_are_scored_in_pairs_or_all_against_one() -> None:
    for first, second in (("a", ["b", "c"]), (["a", "a"], ["b", "c"])):
        answer = (await post(embedder(), SCORE, {"text_1": first, "text_2": second})).json()
        assert [(item["index"], item["score"]) for item in answer["data"]] == [
            (0, 1 + 2 * 97 * 98),
            (1, 1 + 2 * 97 * 99),
        ]
    assert answer["object"] == "list" and answer["data"][0]["object"] == "score"


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_other_servers_paths_and_fields_are_answered(path: str) -> None:
    body = {"query": "a", "documents": ["bc", "z"], "top_n": 0, "priority": 3, "user": "u", "unheard_of": 1}
    results = (await post(embedder(), path, body)).json()["results"]
    assert [result["index"] for result in results] == [1, 0]
    cut = (await post(embedder(), path, body | {"max_tokens_per_doc": 1})).json()["results"]
    assert {result["index"]: result["relevance_score"] for result in cut}[0] == 1 + 2 * 97 * 98
    assert cut[1]["document"]["text"] == "bc"  # as sent
    cut = (await post(embedder(), path, body | {"truncate_prompt_tokens": 1})).json()["results"]
    assert {result["index"]: result["relevance_score"] for result in cut}[0] == 1 + 2 * 97 * 98


@pytest.mark.parametrize("names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2")])
async def test_scored_texts_have_further_names(names: tuple[str, str]) -> None:
    answer = (await post(embedder(), "/score", {names[0]: "a", names[1]: ["b"]})).json()
    assert answer["data"][0]["score"] == 1 + 2 * 97 * 98


async def test_a_classifiers_score_is_a_probability_or_its_logit() -> None:
    engine = FakeEngine()
    engine.model_config.num_labels = 1
    body = {"text_1": "a", "text_2": "b"}
    scores = []
    for fields in ({}, {"use_activation": False}, {"use_activation": False, "truncate_prompt_tokens": 300}):
        scores.append((await post(engine, SCORE, body | fields)).json()["data"][0]["score"])
    probability, logit, cut = scores  # the fake's logit is the length of the prompt
    assert logit > 300 and probability == 1.0 and cut == 300
    refused = await post(engine, SCORE, body | {"truncate_prompt_tokens": 3})
    assert error_of(refused)["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (RERANK, {"documents": ["a"]}, "query"),
        (RERANK, {"query": "a", "documents": []}, "documents"),
        (RERANK, {"query": "a", "documents": [1]}, "documents.0"),
        (RERANK, {"query": "a", "documents": ["a"] * 1001}, "documents"),
        (RERANK, {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        (RERANK, {"query": "a", "documents": ["a"], "rank_fields": ["text"]}, "rank_fields"),
        (RERANK, {"query": "a", "documents": ["a"], "max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        (RERANK, {"query": "a", "documents": ["a"], "truncation_side": "left"}, "truncation_side"),
        (RERANK, {"query": "a", "documents": ["a"], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (RERANK, {"query": "a", "documents": ["a" * 1000]}, "documents"),
        (SCORE, {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        (SCORE, {"text_1": "a"}, "text_2"),
    ],
)
async def test_bad_fields_are_refused_by_name(path: str, body: dict[str, Any], param: str) -> None:
    response = await post(embedder(), path, body)
    assert (response.status_code, error_of(response)["param"]) == (400, param), response.text


async def test_a_model_that_cannot_judge_is_refused() -> None:
    body = {"text_1": "a", "text_2": "b"}
    response = await post(FakeEngine(), SCORE, body)  # its tokenizer has no token "yes"
    assert response.status_code == 400 and "no reranker" in error_of(response)["message"]
    engine = FakeEngine()
    engine.model_config.num_labels = 3
    response = await post(engine, SCORE, body)
    assert response.status_code == 400 and "3 labels" in error_of(response)["message"]
