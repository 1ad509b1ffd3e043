"""What the step loop and its clients say to each other: token ids in one direction, new tokens in the other.

In one process the objects themselves are handed over. Between processes they are MessagePack, as arrays without field
names; msgspec checks every type when it decodes. A client numbers its requests, and all that follows names the number.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from tinyvllm.config import Capacity, ModelConfig, SamplingParams
from tinyvllm.engine.step_clock import Parts
from tinyvllm.scheduling.adapter_slots import AdapterInfo
from tinyvllm.scheduling.request import TokenLogprobs

# ---- To the step loop ----


class NewRequest(Struct, array_like=True, gc=False):
    """One sequence to generate, checked and with all defaults filled in. The fields are those of `Request`."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams  # without its grammar
    eos_ids: frozenset[int]
    max_tokens: int
    seed: int
    number: int = 0  # the client's
    priority: int = 0
    arrival_s: float = 0.0
    grammar: str | None = None  # the source of the compiled grammar (text/grammar.py)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    num_prompt_logprobs: int | None = None
    pooling: str | None = None
    hash_seed: bytes = b""
    adapter: str = ""


class Hello(Struct, tag="hello", array_like=True):
    """A client introduces itself. It is answered with a Welcome; one that routes hears of the prefix cache, too."""

    routes: bool = False


class Submit(Struct, tag="submit", array_like=True):
    """The choices of one call. If one is refused, none runs."""

    requests: list[NewRequest]


class Abort(Struct, tag="abort", array_like=True):
    """End these requests, without an answer: the client has stopped listening."""

    numbers: list[int]


class Ask(Struct, tag="ask", array_like=True):
    """A question to the step loop, answered between two steps (`EngineLoop.QUESTIONS`)."""

    number: int
    question: str
    arguments: list[str] = []


class Goodbye(Struct, tag="goodbye", array_like=True):
    """The client leaves: its requests are aborted."""


class Unreadable(Struct):
    """In place of a client's message that a door could not read. Not sent."""

    reason: str


ToEngine = Hello | Submit | Abort | Ask | Goodbye

# ---- To a client ----


class Output(Struct, array_like=True, gc=False):
    """One new token of one request, or its end, with all that may come with it."""

    number: int
    token_id: int | None  # None: the request ended without a token
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first token, if requested
    num_cached_tokens: int = 0
    queued_s: float = 0.0
    scheduled_s: float = 0.0
    num_preemptions: int = 0
    pooled: bytes | None = None  # (hidden,) float32, with the last token of a request that pools
    # Where its time in the engine went: in the queue and from there to the first token, with that token or with an end
    # before it; after the first token, with the last
    queue: Parts | None = None
    prefill: Parts | None = None
    decode: Parts | None = None
    num_chunks: int = 0
    num_drafted: int = 0  # draft tokens verified for it, so far
    num_accepted: int = 0  # of these, those accepted
    num_restored_tokens: int = 0  # of the cached ones, those from host memory or disk


class Batch(Struct, tag="batch", array_like=True):
    """What one step brought for one client. Each request has at most one entry in the two lists together."""

    time_s: float  # monotonic clock: when the step's tokens were known
    numbers: list[int]  # of requests with a token and nothing else to say ...
    token_ids: list[int]  # ... and that token
    outputs: list[Output]  # first and last tokens, and those with logprobs


class Welcome(Struct, tag="welcome", array_like=True):
    """The engine is ready. What a client must know of it."""

    model_config: ModelConfig
    capacity: Capacity
    adapters: list[AdapterInfo] = []


class AdapterList(Struct, tag="adapters", array_like=True):
    """The adapters that are loaded now, after one was loaded or unloaded."""

    adapters: list[AdapterInfo]


class Blocks(Struct, tag="blocks", array_like=True):
    """What has changed in the prefix cache: the first 8 bytes of each block's hash, one after the other."""

    stored: bytes
    removed: bytes


class Refused(Struct, tag="refused", array_like=True):
    """A call cannot run. The fields are those of RequestError, unless the engine is at fault."""

    numbers: list[int]  # of all its choices
    message: str
    param: str | None = None
    code: str | None = None
    is_own_fault: bool = False  # the engine's, not the caller's


class Answer(Struct, tag="answer", array_like=True):
    """To a question; an error has a message and no value."""

    number: int
    value: Any = None
    error: str | None = None
    # the caller's mistake: the fields are those of RequestError
    is_refusal: bool = False
    param: str | None = None
    code: str | None = None


class Lost(Struct, tag="lost", array_like=True):
    """Messages to or from this client could not be handled: its calls have ended. The engine goes on."""

    reason: str


class Closed(Struct, tag="closed", array_like=True):
    """The engine has stopped. Nothing follows."""

    reason: str


ToClient = Batch | Welcome | AdapterList | Blocks | Refused | Answer | Lost | Closed

encode_message = msgspec.msgpack.Encoder().encode
decode_for_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_for_client = msgspec.msgpack.Decoder(ToClient).decode
