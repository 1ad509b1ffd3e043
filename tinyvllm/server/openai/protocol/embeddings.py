"""/v1/embeddings: OpenAI's request and answer, with vLLM's further fields."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.errors import RequestError
from tinyvllm.server.openai.protocol.common import (
    POOLING_IGNORED,
    POOLING_UNSUPPORTED,
    TruncatePromptTokens,
    TruncationSide,
    refuse_unsupported_fields,
    unsupported,
)
from tinyvllm.server.openai.protocol.completions import check_prompt

MAX_INPUTS = 2048  # per request, as at OpenAI

Inputs = Annotated[
    list[Any], BeforeValidator(check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings: a text, texts, token ids, or lists of them."""

    model_config = ConfigDict(extra="allow", strict=True)

    input: Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1)] = None
    pooling: Literal["mean", "cls", "last"] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: TruncatePromptTokens = None
    truncation_side: TruncationSide = None
    use_activation: bool | None = None
    priority: Annotated[int | None, Field(ge=-(2**31), lt=2**31)] = None
    user: str | None = None

    def refuse_unsupported(self, hidden_size: int, *, is_embedding_model: bool = False) -> None:
        refuse_unsupported_fields(self.model_extra or {}, POOLING_UNSUPPORTED, POOLING_IGNORED)
        if self.use_activation is False:
            raise unsupported("use_activation", False, "embeddings have length 1: leave it out")
        if len(self.input) > MAX_INPUTS:
            raise RequestError(
                f"input has {len(self.input)} texts, but a request takes at most {MAX_INPUTS}: split it", param="input"
            )
        if self.dimensions in (None, hidden_size):
            return
        if self.dimensions > hidden_size or not is_embedding_model:
            reason = "" if is_embedding_model else " and were not trained to be shortened"
            raise RequestError(
                f"dimensions is {self.dimensions}, but this model's embeddings have {hidden_size}{reason}: "
                "leave it out",
                param="dimensions",
            )

    def encoded(self, embedding: NDArray[np.float32]) -> list[float] | str:
        """The vector in the requested encoding: numbers, or base64 of little-endian float32. If it is to be shortened,
        its first numbers, again with length 1 (Kusupati et al. 2022, Matryoshka representations)."""
        if self.dimensions is not None and self.dimensions < len(embedding):
            embedding = embedding[: self.dimensions]
            embedding = (embedding / max(float(np.linalg.norm(embedding)), 1e-12)).astype(np.float32)
        if self.encoding_format == "base64":
            return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
        return embedding.tolist()  # type: ignore[no-any-return]


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    id: str
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
