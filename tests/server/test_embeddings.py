"""/v1/embeddings over ASGI: shapes, formats, refusals, and the openai client."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI

from tests.patience import jump_over_waits
from tests.server.client import client_of, post
from tests.server.fake_engine import FakeEngine
from tinyvllm.errors import DeviceError


async def embed(engine: FakeEngine, **body: Any) -> httpx.Response:
    return await post(engine, "/v1/embeddings", body)


@pytest.mark.parametrize(
    ("value", "vectors"),
    [
        ("abc", [[3, 97, 99, 1]]),
        (["a", "xyz"], [[1, 97, 97, 1], [3, 120, 122, 1]]),
        ([5, 6], [[2, 5, 6, 1]]),
        ([[5, 6], [7]], [[2, 5, 6, 1], [1, 7, 7, 1]]),
    ],
)
async def test_each_text_has_a_vector_in_order(value: Any, vectors: list[list[int]]) -> None:
    response = await embed(FakeEngine(), input=value)
    assert response.status_code == 200, response.text
    body = response.json()
    assert [item["embedding"] for item in body["data"]] == vectors
    assert [item["index"] for item in body["data"]] == list(range(len(vectors)))
    assert (body["object"], body["data"][0]["object"], body["model"]) == ("list", "embedding", "tiny")
    num_tokens = sum(vector[0] for vector in vectors)
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


async def test_base64_is_little_endian_float32_and_pooling_can_be_the_last_token() -> None:
    response = await embed(FakeEngine(), input="abc", encoding_format="base64", pooling="last", dimensions=4)
    (item,) = response.json()["data"]
    assert np.frombuffer(base64.b64decode(item["embedding"]), "<f4").tolist() == [3, 97, 99, 0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [300]}, "input"),
        ({"input": "a" * 1000}, "input"),
        ({"input": "a", "dimensions": 2}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncation_side": "both"}, "truncation_side"),
        ({"input": "a", "use_activation": False}, "use_activation"),
        ({"input": "a", "normalize": False}, "normalize"),
        ({"input": "a", "task": "retrieval.query"}, "task"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": ["a"] * 2049}, "input"),
    ],
)
async def test_bad_fields_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    response = await embed(FakeEngine(), **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_a_text_is_cut_to_the_tokens_that_the_request_keeps() -> None:
    for fields, vector in (
        ({"truncate_prompt_tokens": 2}, [2, 97, 98, 1]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, [2, 98, 99, 1]),
        ({"truncate_prompt_tokens": 2, "input": [97, 98, 99]}, [2, 97, 98, 1]),
        ({"truncate_prompt_tokens": -1, "input": "a" * 2000}, [999, 97, 97, 1]),
    ):
        (item,) = (await embed(FakeEngine(), **{"input": "abc", **fields})).json()["data"]
        assert item["embedding"] == vector, fields


async def test_fields_without_effect_are_accepted() -> None:
    fields = {"user": "u", "request_id": "r", "padding": "do_not_pad", "endianness": "native", "unheard_of": 1}
    response = await embed(FakeEngine(), input="a", use_activation=True, embed_dtype="float32", task=None, **fields)
    assert response.status_code == 200, response.text


async def test_an_embedding_model_has_a_pooling_of_its_own_and_can_be_shortened() -> None:
    engine = FakeEngine()
    engine.model_config.pooling = "last"
    (item,) = (await embed(engine, input="abc", dimensions=2)).json()["data"]
    np.testing.assert_allclose(item["embedding"], np.array([3, 97]) / np.hypot(3, 97), rtol=1e-6)
    (item,) = (await embed(engine, input="abc")).json()["data"]
    assert item["embedding"] == [3, 97, 99, 0]  # of the last token
    response = await embed(engine, input="abc", dimensions=5)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "dimensions")


async def test_one_failure_ends_the_request_and_all_its_texts() -> None:
    engine = FakeEngine(refuse=DeviceError("the step failed"))
    response = await embed(engine, input=["a", "b", "c"])
    assert response.status_code == 500 and "error" in response.json()
    await asyncio.sleep(0)
    assert not engine.running


async def test_a_late_embedding_is_a_timeout() -> None:
    jump_over_waits()
    engine = FakeEngine(hang_before=True)
    response = await post(engine, "/v1/embeddings", {"input": "a"}, request_timeout_s=50)
    assert response.status_code in (408, 504), response.text
    assert not engine.running


async def test_openais_client_reads_it() -> None:
    async with client_of(FakeEngine()) as client_of_app:
        http: Any = client_of_app  # openai may come with a fork of httpx
        client = AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
        answer = await client.embeddings.create(model="tiny", input=["abc", "z"])  # it requests base64
    assert [item.embedding for item in answer.data] == [[3, 97, 99, 1], [1, 122, 122, 1]]
    assert answer.usage.total_tokens == 4
