"""/v1/rerank, in Jina's and Cohere's format, and /v1/score, in vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.errors import RequestError
from tinyvllm.server.openai.protocol.common import (
    POOLING_IGNORED,
    POOLING_UNSUPPORTED,
    TruncatePromptTokens,
    optional,
    refuse_unsupported_fields,
)

MAX_DOCUMENTS = 1000  # per request, as at Cohere


def _texts(value: object) -> object:
    """Documents as strings: a document may be an object with a text."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return value
    return [item["text"] if isinstance(item, dict) and isinstance(item.get("text"), str) else item for item in value]


Texts = Annotated[
    list[str],
    BeforeValidator(_texts, json_schema_input_type=str | list[str | dict[str, Any]]),
    Field(min_length=1, max_length=MAX_DOCUMENTS),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    instruction: str | None = None  # what makes a document relevant; None: the one that Qwen3-Reranker was trained with
    truncate_prompt_tokens: TruncatePromptTokens = None  # of a query with its document: the beginning is kept
    use_activation: bool | None = None  # False: a reranker's logit instead of its probability
    priority: Annotated[int | None, Field(ge=-(2**31), lt=2**31)] = None
    user: str | None = None

    def refuse_unsupported(self) -> None:
        refused = POOLING_UNSUPPORTED | {"truncation_side": ("right",)}
        refuse_unsupported_fields(self.model_extra or {}, refused, POOLING_IGNORED)


class RerankRequest(_Request):
    """POST /v1/rerank: which documents answer a query."""

    query: str
    documents: Texts
    top_n: Annotated[int | None, Field(ge=0)] = None  # 0: all, as in vLLM
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int | None, Field(ge=1)] = None  # Cohere's: the beginning of each is kept


class ScoreRequest(_Request):
    """POST /v1/score: how relevant each text of `text_2` is to that of `text_1`, or to the only one there.

    vLLM has further names for the two."""

    model_config = ConfigDict(populate_by_name=True)

    text_1: Annotated[Texts, Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))]
    text_2: Annotated[Texts, Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Raises RequestError for lists of different lengths."""
        if len(self.text_1) not in (1, len(self.text_2)):
            raise RequestError(
                f"text_1 has {len(self.text_1)} texts and text_2 {len(self.text_2)}: give one in text_1, or as many",
                param="text_1",
            )
        first = self.text_1 * len(self.text_2) if len(self.text_1) == 1 else self.text_1
        return list(zip(first, self.text_2, strict=True))


class ScoreUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Document(BaseModel):
    text: str


class Relevance(BaseModel):
    index: int  # of the document in the request
    relevance_score: float
    document: Document | None = optional()


class RerankAnswer(BaseModel):
    id: str
    model: str
    results: list[Relevance]  # the most relevant first
    usage: ScoreUsage


class Score(BaseModel):
    object: Literal["score"] = "score"
    index: int
    score: float


class ScoreList(BaseModel):
    object: Literal["list"] = "list"
    id: str
    created: int
    model: str
    data: list[Score]
    usage: ScoreUsage
