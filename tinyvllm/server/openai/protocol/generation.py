"""What all requests that generate text share: sampling, limits, the form of the output.

Requests are strict (a quoted number is an error) and keep fields that they do not know. A field that would change the
output but is not supported is refused by name, so that nothing is silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.config import MAX_CHOICES, GenerationDefaults, GrammarSpec, SamplingParams
from tinyvllm.engine.beam import BeamSettings
from tinyvllm.errors import RequestError
from tinyvllm.server.openai.protocol.common import (
    TruncatePromptTokens,
    TruncationSide,
    refuse_unsupported_fields,
    truncated,
    unsupported,
)
from tinyvllm.server.sampling import SpecialTokens, sampling_params

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer

# Unsupported fields that would change the output, each with the values (besides null) that request nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (False,),  # in chats: the template writes them
    "audio": (),
    "chat_template": (),
    "detokenize": (True,),
    "documents": ([],),
    "echo": (False,),  # in chats; completions have a field for it
    "function_call": ("none",),
    "functions": ([],),
    "ec_transfer_params": ({},),
    "kv_transfer_params": ({},),  # vLLM's, for prompts that another server computes
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prompt_embeds": ([],),
    "repetition_detection": ({},),
    "return_prompt_text": (False,),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}

# Known fields that do not affect the output: the caller's bookkeeping, hints and settings for a hosted service; and
# other services' names of a reasoning effort, which chats read.
# fmt: off
_IGNORED = frozenset((
    "access_programs", "background_options", "client_metadata", "context_management", "enable_thinking", "image",
    "media_io_kwargs", "metadata", "mm_processor_kwargs", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "reasoning", "request_id", "return_mm_kwargs", "return_token_offsets",
    "routed_experts_prompt_start", "safety_identifier", "service_tier", "session_id", "store", "stream_interval",
    "thinking", "user", "verbosity",
))
# fmt: on

# Fields that are copied to SamplingParams under the same name, if they are given.
_COPIED = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty",
    "n", "frequency_penalty", "presence_penalty", "seed", "min_tokens", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "bad_words", "allowed_token_ids",
    "prompt_logprobs",
)  # fmt: skip


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis, which this server never sends


def _check_schema(value: object) -> object:
    """A JSON schema, as an object or as text."""
    if value is None or isinstance(value, dict | str | bool):
        return value
    raise ValueError("give a JSON schema: an object")


Schema = Annotated[Any, BeforeValidator(_check_schema, json_schema_input_type=dict[str, Any] | str | bool | None)]


class JsonSchemaFormat(BaseModel):
    """response_format.json_schema. The schema is enforced whether or not `strict` is set."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)

    name: str | None = None
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's form, or llama.cpp's with the schema next to the type. A schema in either place is enforced."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Annotated[Schema, Field(alias="schema")] = None

    def grammar(self, name: str) -> GrammarSpec | None:
        """name: the field of the request, for messages."""
        if self.type == "text":
            return None
        if self.schema_ is not None:
            return schema_grammar(self.schema_, f"{name}.schema")
        if self.type == "json_object":
            return GrammarSpec("json_object", param=name)
        param = f"{name}.json_schema"
        if self.json_schema is None or self.json_schema.schema_ is None:
            missing = param if self.json_schema is None else f"{param}.schema"
            raise RequestError(f"{missing} is missing: give the schema of the output", param=missing)
        return schema_grammar(self.json_schema.schema_, f"{param}.schema")


def schema_grammar(schema: object, param: str) -> GrammarSpec:
    """The grammar of a document of this schema, which is an object or text."""
    return GrammarSpec("json_schema", schema if isinstance(schema, str) else json.dumps(schema), param=param)


class StructuredOutputs(BaseModel):
    """vLLM's structured_outputs: one of these fields."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    json_: Annotated[Schema, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


def _check_stop(value: object) -> object:
    """One string or a list of strings, as a list."""
    if value is None or isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("give a string or a list of strings")


def _check_biases(value: object) -> object:
    """Convert the token ids, which are strings because they are JSON keys, to numbers."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("give an object that maps token ids to numbers")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not isinstance(key, str | int) or not str(key).isdecimal() or len(str(key)) > 10:
            raise ValueError(f"{ascii(key)[:40]} is not a token id: give decimal numbers as keys")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ValueError(f"the bias of {key} is not a number")
        try:
            biases[int(key)] = float(bias)
        except OverflowError:
            raise ValueError(f"the bias of {key} is too large for a number") from None
    return biases


class GenerationRequest(BaseModel):
    """The fields of all generating routes: OpenAI's, and vLLM's for what OpenAI lacks. Null means the default."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[
        dict[int, float] | None, BeforeValidator(_check_biases, json_schema_input_type=dict[str, float] | None)
    ] = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    min_tokens: Annotated[int | None, Field(ge=0)] = None
    stop: Annotated[list[str], BeforeValidator(_check_stop, json_schema_input_type=str | list[str] | None)] = []
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    timings_per_token: bool | None = None  # llama.cpp's: `timings` in the answer, or in every chunk of a stream
    truncate_prompt_tokens: TruncatePromptTokens = None
    truncation_side: TruncationSide = None
    priority: Annotated[int | None, Field(ge=-(2**31), lt=2**31)] = None
    cache_salt: Annotated[str | None, Field(min_length=1)] = None  # vLLM's: who may share the prompt's cached prefix
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # vLLM's older names for structured_outputs
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    def fitted(
        self, tokenizer: Tokenizer, ids: list[int], limit: int, *, has_special_tokens: bool = False
    ) -> list[int]:
        """A prompt's ids, shortened if the request asks for it. limit: for prompt and output together.

        has_special_tokens: the ids have the BOS and EOS that the tokenizer adds, which stay."""
        return truncated(
            tokenizer,
            ids,
            self.truncate_prompt_tokens,
            room=limit - (self.token_limit or 1),
            keeps_end=self.truncation_side != "right",
            has_special_tokens=has_special_tokens,
        )

    @property
    def token_limit(self) -> int | None:
        """Maximum tokens of output; None: as many as fit."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def refuse_unsupported(self) -> None:
        """Raise RequestError for a field that is not supported. Log the names of unknown fields, once each."""
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options is for streams: send stream=true, or leave it out", param="stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise unsupported("prompt_logprobs", self.prompt_logprobs, "streams do not have them: send stream=false")
        if not self.use_beam_search:
            self._refuse_beam_settings()
        refuse_extras(self.model_extra or {})

    def _refuse_beam_settings(self) -> None:
        if self.best_of not in (None, self.num_choices):
            raise unsupported("best_of", self.best_of, "leave it out, or ask for n samples with logprobs and choose")
        for name, neutral in (("length_penalty", 1), ("early_stopping", False)):
            value = getattr(self, name)
            if value not in (None, neutral):
                raise unsupported(name, value, "it is for beam search: leave it out, or send use_beam_search=true")

    def beams(self) -> BeamSettings | None:
        """The settings of beam search; None: sample."""
        if not self.use_beam_search:
            return None
        length_penalty = 1.0 if self.length_penalty is None else self.length_penalty
        return BeamSettings(length_penalty=length_penalty, early_stopping=bool(self.early_stopping))

    @property
    def num_beams(self) -> int:
        """The number of beams that are followed. The best num_choices are the answer."""
        num_beams = self.best_of or self.num_choices
        if num_beams < self.num_choices:
            raise RequestError(f"best_of is {num_beams}: it must be at least n ({self.num_choices})", param="best_of")
        return num_beams

    def grammar(self) -> GrammarSpec | None:
        """The grammar of the output, if any. Raises RequestError if it is given twice or incompletely."""
        found = {**self._response_grammar(), **self._structured_grammar(), **self._guided_grammar()}
        if len(found) > 1:
            names = list(found)
            raise RequestError(f"{' and '.join(names)} both constrain the output: send one", param=names[1])
        return next(iter(found.values()), None)

    def _response_grammar(self) -> dict[str, GrammarSpec]:
        name = "response_format"
        found = None if self.response_format is None else self.response_format.grammar(name)
        return {} if found is None else {name: found}

    def _structured_grammar(self) -> dict[str, GrammarSpec]:
        outputs = self.structured_outputs
        if outputs is None:
            return {}
        found = _specs(
            "structured_outputs.",
            json=outputs.json_,
            regex=outputs.regex,
            choice=outputs.choice,
            grammar=outputs.grammar,
        )
        if outputs.json_object:
            param = "structured_outputs.json_object"
            found[param] = GrammarSpec("json_object", param=param)
        if not found:
            known = "json, regex, choice, grammar and json_object"
            raise RequestError(f"structured_outputs is empty: give one of {known}", param="structured_outputs")
        return found

    def _guided_grammar(self) -> dict[str, GrammarSpec]:
        return _specs(
            "guided_",
            json=self.guided_json,
            regex=self.guided_regex or None,
            choice=self.guided_choice or None,
            grammar=self.guided_grammar or None,
        )

    def make_params(
        self,
        defaults: GenerationDefaults,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        grammar: GrammarSpec | None,
        special_tokens: SpecialTokens = "skip",
    ) -> SamplingParams:
        """The request's settings, else the model's defaults, else vLLM's. Raises RequestError, naming the field.

        special_tokens: what the parser of the output needs of them. "skip": nothing, so the request decides."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in _COPIED}
        settings |= {"logprobs": logprobs, "grammar": grammar, "stop": self.stop, "logit_bias": self.logit_bias or None}
        if self.use_beam_search:  # does not sample, so the model's sampling defaults do not apply
            defaults = GenerationDefaults()
            settings["n"] = self.num_beams
        return sampling_params(settings, defaults, max_tokens=max_tokens, special_tokens=special_tokens)


def refuse_extras(extras: Mapping[str, object]) -> None:
    """Raise RequestError for a known field that is not supported. Log the names of unknown fields, once each."""
    refuse_unsupported_fields(extras, _UNSUPPORTED, _IGNORED)


def _specs(prefix: str, *, json: Any, **texts: Any) -> dict[str, GrammarSpec]:
    """The grammars that are given, by field name."""
    found: dict[str, GrammarSpec] = {}
    if json is not None:
        text = json if isinstance(json, str) else _dumps(json)
        found[f"{prefix}json"] = GrammarSpec("json_schema", text, param=f"{prefix}json")
    for kind, value in texts.items():
        if value is not None:
            text = value if isinstance(value, str) else _dumps(value)
            found[prefix + kind] = GrammarSpec(kind, text, param=prefix + kind)
    return found


def _dumps(value: object) -> str:
    """json.dumps, which a parameter hides in `_specs`."""
    return json.dumps(value)
