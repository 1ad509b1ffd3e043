"""What /api/tags, /api/ps and /api/show say about a model, from its files. It does not reveal where they are."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from tinyvllm.config import GenerationDefaults, ModelFiles
from tinyvllm.server.openai.protocol.common import optional
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.model_config import read_generation_defaults
from tinyvllm.storage.model_summary import ModelSummary, finite, summarize
from tinyvllm.text import gguf_tokenizer, hf_tokenizer
from tinyvllm.text.chat import load_chat_template
from tinyvllm.text.fim import find_marks
from tinyvllm.text.reasoning import find_reasoning_format

if TYPE_CHECKING:
    from tinyvllm.server.shelf import ShelvedModel

log = logging.getLogger(__name__)

TEMPLATE_KEY = "tokenizer.chat_template"
# Ollama's names of parameters -> GenerationDefaults'
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
}


class Details(BaseModel):
    """Ollama's ModelDetails."""

    parent_model: str = ""
    format: str = ""
    family: str = ""
    families: list[str] | None = None
    parameter_size: str = ""
    quantization_level: str = ""
    context_length: int | None = optional()
    embedding_length: int | None = optional()


class Tensor(BaseModel):
    name: str
    type: str
    shape: list[int]


@dataclass(frozen=True)
class Description:
    """A model as its files describe it."""

    summary: ModelSummary
    capabilities: tuple[str, ...]
    template: str  # "" if there is none
    defaults: GenerationDefaults

    @property
    def family(self) -> str:
        return str(self.summary.info["general.architecture"])

    def details(self, max_model_len: int | None) -> Details:
        """max_model_len: the server's; None if the model has not been loaded."""
        summary = self.summary
        return Details(
            format=summary.format,
            family=self.family,
            families=[self.family],
            parameter_size=human_count(summary.num_parameters),
            quantization_level=summary.quantization,
            context_length=self.context_length(max_model_len),
            embedding_length=summary.config.hidden_size,
        )

    def context_length(self, max_model_len: int | None) -> int:
        """Tokens that a request may have: the model's own limit, or the server's if it is smaller."""
        own = self.summary.config.max_position
        return own if max_model_len is None else min(own, max_model_len)

    def model_info(self, max_model_len: int | None, *, verbose: bool, files: ModelFiles) -> dict[str, Any]:
        """The model's metadata under GGUF's keys. verbose: with vocabularies, if the files have them there."""
        info = dict(self.summary.info)
        if verbose and files.kind == "gguf":
            info |= {key: finite(value) for key, value in GGUFFile(files.path).metadata.items()}
        info.pop("general.name", None)
        info.pop(TEMPLATE_KEY, None)
        info[f"{self.family}.context_length"] = self.context_length(max_model_len)
        return info

    def parameters(self, max_model_len: int | None) -> dict[str, int | float]:
        """The defaults of requests that the model's files or the server set."""
        given = {name: getattr(self.defaults, field) for name, field in _PARAMETERS.items()}
        return {name: value for name, value in {"num_ctx": max_model_len, **given}.items() if value is not None}


def describe(model: ShelvedModel) -> Description | None:
    """A model's description; None if its files are not on this machine or cannot be read. For a worker thread."""
    try:
        files = model.files()
        if files is None:
            return None
        summary = summarize(files)
        return _describe(files.kind, files.path, summary, model.chat_template, model.reasoning_parser)
    except Exception as error:  # damaged files can raise anything in the libraries that read them
        log.warning("the files of %s cannot be described: %s", model.name, error)
        return None


@lru_cache(maxsize=64)
def _describe_cached(
    kind: str, path: Path, fingerprint: str, chat_template: str | None, reasoning_parser: str | None
) -> tuple[tuple[str, ...], str, GenerationDefaults]:
    """(capabilities of the template, the template, defaults). fingerprint: of the files, which may change."""
    files = ModelFiles(kind, path, path.name)
    template = load_chat_template(files, chat_template)
    defaults = read_generation_defaults(files)
    capabilities = ["insert"] if _can_fill_in(files) else []
    if template is None:
        return tuple(capabilities), "", defaults
    if template.renders_tools():
        capabilities.append("tools")
    if find_reasoning_format(reasoning_parser, template.source) is not None:
        capabilities.append("thinking")
    return tuple(capabilities), template.sources.get("default", template.source), defaults


def _can_fill_in(files: ModelFiles) -> bool:
    """Whether the vocabulary has tokens for filling in the middle."""
    stated: dict[str, int] = {}
    if files.kind == "gguf":
        metadata = GGUFFile(files.path).metadata
        vocabulary = gguf_tokenizer.read_vocabulary(metadata, files.path, may_repeat=True)
        texts, stated = vocabulary.tokens, gguf_tokenizer.read_fim_ids(metadata, vocabulary, files.path)
    else:
        texts = hf_tokenizer.read_token_texts(files.path)
    ids = {text: position for position, text in enumerate(texts)}
    return find_marks(ids.get, lambda token_id: texts[token_id], stated) is not None


def _describe(
    kind: str, path: Path, summary: ModelSummary, chat_template: str | None, reasoning_parser: str | None
) -> Description:
    of_template, template, defaults = _describe_cached(kind, path, summary.fingerprint, chat_template, reasoning_parser)
    config = summary.config
    capabilities = ("completion", *of_template) if config.has_head else ()
    if config.pooling is not None:
        capabilities = (*capabilities, "embedding")
    return Description(summary=summary, capabilities=capabilities, template=template, defaults=defaults)


def human_count(count: int) -> str:
    """A number of parameters as Ollama writes it: 7.6B, 134.52M, 70B."""
    for unit, size, digits in (("B", 10**9, 1), ("M", 10**6, 2)):
        if count >= size:
            return f"{count // size}{unit}" if count % size == 0 else f"{count / size:.{digits}f}{unit}"
    return f"{count // 1000}K" if count >= 1000 else str(count)


def rfc3339(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="microseconds")[:-6] + "Z"
