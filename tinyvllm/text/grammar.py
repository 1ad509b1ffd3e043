"""Grammars: which tokens may come next, so that the output is a JSON document, a choice or another requested format.

llguidance does the work (MIT; abi3 wheels for Python 3.10 and later on Linux and macOS; no dependencies): it walks a
trie of the vocabulary with an Earley parser over lexemes, which takes about 50 us per mask for 49,152 tokens. Its work
is limited by counts rather than time, so a malicious grammar ends in an error instead of a stall.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from tinyvllm.config import GRAMMAR_TOO_COMPLEX, GrammarSpec
from tinyvllm.errors import RequestError
from tinyvllm.faults import reach
from tinyvllm.text.json_schema import parse_schema, prepare_schema, refuse, subschemas
from tinyvllm.text.regex_size import MAX_SIZE, expanded_size
from tinyvllm.text.tokenizer import check_characters

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer

MAX_CHOICES = 1000
_MAX_FORCED_BYTES = 1024  # bytes of a forced text to encode for one mask: 1 ms
_MAX_TOKEN_BYTES = 1024  # llguidance panics at longer ones
_LOCATE_TRIES = 200  # subschemas that are compiled separately to find the faulty one


@dataclass(frozen=True)
class GrammarLimits:
    """Limits for one grammar. Fuel counts llguidance's regular-expression nodes, items count its parser's rows."""

    max_chars: int = 256 * 1024  # of schema, expression or grammar; compiles in at most 0.3 s
    compile_s: float = 10.0  # how long a caller waits before the request is refused
    lexer_fuel: int = 1_000_000  # to build a grammar: 20 ms
    step_fuel: int = 200_000  # per mask: 14 ms
    step_items: int = 50_000  # per mask: 3 ms
    lexer_states: int = 50_000  # 1 to 2 KB each, so a grammar stays below 100 MB

    def for_parser(self) -> LLParserLimits:
        return LLParserLimits(
            initial_lexer_fuel=self.lexer_fuel,
            step_lexer_fuel=self.step_fuel,
            step_max_items=self.step_items,
            max_lexer_states=self.lexer_states,
            verbose_errors=False,
        )


class Vocabulary:
    """A tokenizer as llguidance needs it: the bytes of every token, and which tokens end a text.

    Slow to build (0.1 s for 49,152 tokens). May be shared between threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        """vocab_size: width of the logits, which may exceed the number of tokens. eos_ids: at least one."""
        if not eos_ids:
            raise RequestError("the model's files name no EOS token, which structured output requires")
        self.vocab_size = vocab_size
        wrapper = TokenizerWrapper(_Bytes(tokenizer, vocab_size, eos_ids))
        self.trie = LLTokenizer(wrapper, eos_token=sorted(eos_ids))


class _Bytes:
    """The interface of a tokenizer that TokenizerWrapper expects."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(eos_ids)
        self.bos_token_id = tokenizer.bos_id
        all_bytes = map(tokenizer.token_bytes, range(vocab_size))
        self.tokens = [data if len(data) <= _MAX_TOKEN_BYTES else b"" for data in all_bytes]  # empty: never allowed
        self.special_token_ids = sorted(tokenizer.special_ids | eos_ids)
        self._id_of: dict[bytes, int] | None = None
        self._longest = 0

    def __call__(self, data: bytes) -> list[int]:
        """Token ids of `data` in the middle of a text: forced text is generated in these tokens.

        Of a long text, only the beginning: llguidance asks again after each token, so encoding the whole of `a{100000}`
        would take 120 ms of every step."""
        if len(data) > _MAX_FORCED_BYTES:
            data = data[:_MAX_FORCED_BYTES]
        ids = self._encode(data.decode(errors="replace"))
        if self._tokenizer.strips_leading_space:  # it prepends a space to a text, but this is not the beginning
            ids = self._encode("\n" + data.decode(errors="replace"))[len(self._encode("\n")) :]
        if b"".join(self.tokens[token_id] for token_id in ids) == data:
            return ids
        return self._encode_greedily(data)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)

    def _encode_greedily(self, data: bytes) -> list[int]:
        """Repeatedly take the longest matching token. The rest, from the first byte without one on, is not forced."""
        if self._id_of is None:
            special = set(self.special_token_ids)
            self._id_of = {data: token_id for token_id, data in enumerate(self.tokens) if token_id not in special}
            self._longest = max(map(len, self._id_of))
        ids: list[int] = []
        while data:
            lengths = range(min(self._longest, len(data)), 0, -1)
            length = next((length for length in lengths if data[:length] in self._id_of), None)
            if length is None:
                break
            ids.append(self._id_of[data[:length]])
            data = data[length:]
        return ids


class Grammar:
    """A compiled grammar. Makes matchers, on any thread. `source`: the JSON to compile it from again."""

    def __init__(self, source: str, root: LLMatcher, vocab_size: int) -> None:
        self.source = source
        self._root = root
        self._vocab_size = vocab_size

    def matcher(self) -> Matcher:
        """A matcher at the start of the grammar. All matchers share the lexer states that one of them computes."""
        return Matcher(self._root.deep_copy(), self._vocab_size)


class Matcher:
    """Follows one output through a grammar: a `Constraint` of scheduling/request.py. Not thread-safe."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)
        self._failure: Exception | None = None  # of the library: it ends this output only

    def fill_mask(self, out: NDArray[np.int32], after: Sequence[int] = ()) -> None:
        """Set the bits of the ids that may come next, or would come next after tokens that are all allowed. out:
        (ceil(V/32),), four bytes per item, C-contiguous.

        If a limit is hit, all bits are set: whatever is sampled, `accept` refuses it and `error` gives the reason.
        """
        assert out.shape == (self._num_words,) and out.itemsize == 4, f"{out.shape=} {out.dtype=} {self._num_words=}"
        assert out.flags.c_contiguous and out.flags.writeable, f"{out.flags=}"
        matcher = self._matcher
        try:
            reach("grammar.mask")
            if after:
                num_taken = matcher.try_consume_tokens(list(after))
            if after and (num_taken < len(after) or matcher.is_stopped()):
                out.fill(-1)
            else:
                matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
            if after and num_taken:
                matcher.rollback(num_taken)
        except Exception as error:
            self._failure = error
        if self._failure is not None or matcher.is_error():
            out.fill(-1)

    def count_allowed(self, drafts: Sequence[int]) -> int:
        """How many of these ids may come next, one after another. Changes nothing."""
        try:
            return 0 if self._failure is not None else self._matcher.validate_tokens(list(drafts))
        except Exception as error:
            self._failure = error
            return 0

    def accept(self, token_id: int) -> bool:
        """Advance by a sampled token. False if it is not allowed or a limit was hit; then nothing more is accepted."""
        if self._failure is not None:
            return False
        try:
            reach("grammar.accept")
            return self._matcher.consume_token(token_id)
        except Exception as error:
            self._failure = error
            return False

    @property
    def is_finished(self) -> bool:
        """Whether only EOS may follow, or EOS was accepted."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        if self._failure is not None:
            return f"the output cannot be matched with its grammar: {type(self._failure).__name__}: {self._failure}"
        if not self._matcher.is_error():
            return None
        reason = _reason(self._matcher)
        if "satisfy the grammar" in reason:  # the mask was not applied
            return f"the output cannot be matched with its grammar: {reason}"
        return f"{GRAMMAR_TOO_COMPLEX}, {reason}: simplify the repetitions and alternatives in its expressions"


def compile_grammar(spec: GrammarSpec, vocabulary: Vocabulary, limits: GrammarLimits = GrammarLimits()) -> Grammar:
    """Compile a grammar and compute its first mask. Takes milliseconds, up to a second at the limits, without the GIL.

    Raises RequestError, with a param that begins with spec.param, for a grammar that is invalid, too large or cannot be
    enforced.
    """
    check_characters(spec.text, spec.param)
    if len(spec.text) > limits.max_chars:
        raise RequestError(
            f"{spec.param} has {len(spec.text)} characters, but the limit is {limits.max_chars}: simplify it",
            param=spec.param,
        )
    answer = {"name": "answer", **_SOURCES[spec.kind](spec)}
    source = json.dumps({"grammars": [{"lark_grammar": spec.prefix}, answer] if spec.prefix else [answer]})
    root = _compile(source, vocabulary, limits)
    if root.is_error():
        raise _explain(spec, root, vocabulary, limits)
    return Grammar(source, root, vocabulary.vocab_size)


def compile_source(source: str, vocabulary: Vocabulary, limits: GrammarLimits = GrammarLimits()) -> Grammar:
    """Compile `Grammar.source` again, in the process where its matchers are used. Takes no Python code to speak of."""
    root = _compile(source, vocabulary, limits)
    if root.is_error():
        raise RequestError(f"the grammar cannot be compiled: {_reason(root)}", param="structured_outputs")
    return Grammar(source, root, vocabulary.vocab_size)


def _compile(source: str, vocabulary: Vocabulary, limits: GrammarLimits) -> LLMatcher:
    """A matcher at the grammar's start, or one with an error."""
    reach("grammar.compile")
    root = LLMatcher(vocabulary.trie, source, log_level=0, limits=limits.for_parser())
    if root.is_error():
        return root
    # the first mask builds most of the lexer's states: do it here, not on the engine's thread. It is also the first
    # that fails: at a limit, or because no token can begin an output, as in {"$ref": "#"}
    first = root.deep_copy()
    first.compute_bitmask()
    return first if first.is_error() else root


# One of llguidance's grammars, as an object in its JSON.
Source = dict[str, Any]


def _from_json_object(spec: GrammarSpec) -> Source:
    return _json_source({"type": "object"}, spec.param)


def _from_json_schema(spec: GrammarSpec) -> Source:
    return _json_source(parse_schema(spec.text, spec.param), spec.param)


def _json_source(schema: Any, param: str) -> Source:
    return {"json_schema": prepare_schema(schema, param)}


def _from_regex(spec: GrammarSpec) -> Source:
    if not spec.text:
        raise RequestError(f"{spec.param} is empty: give a regular expression", param=spec.param)
    _check_size(spec.text, spec.param)
    [source] = json.loads(LLMatcher.grammar_from_regex(spec.text))["grammars"]  # escaped for Lark
    return {"lark_grammar": source["lark_grammar"]}


def _from_choice(spec: GrammarSpec) -> Source:
    choices = parse_schema(spec.text, spec.param)
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
        raise RequestError(f"{spec.param} must be a list of non-empty strings", param=spec.param)
    if len(choices) > MAX_CHOICES:
        raise RequestError(
            f"{spec.param} has {len(choices)} strings: give at most {MAX_CHOICES}, or use a regex", param=spec.param
        )
    return {"lark_grammar": "start: " + " | ".join(lark_string(text) for text in dict.fromkeys(choices))}


def lark_string(text: str) -> str:
    """A string literal in Lark, which has JSON's syntax."""
    return json.dumps(text, ensure_ascii=False)


def lark_json(schema: Any, param: str) -> str:
    """The body of a Lark rule for a document of `schema`. Raises RequestError for what cannot be enforced."""
    return "%json " + json.dumps(prepare_schema(schema, param), ensure_ascii=False)


def pattern_fault(pattern: str, limits: GrammarLimits = GrammarLimits()) -> str | None:
    """Why strings of a JSON schema cannot be made to match `pattern`; None if they can."""
    if len(pattern) > limits.max_chars:
        return f"it has {len(pattern)} characters, but the limit is {limits.max_chars}"
    if (size := expanded_size(pattern)) > MAX_SIZE:
        return f"it has {size} characters with its repetitions written out, but the limit is {MAX_SIZE}"
    grammar = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern})
    fault = LLMatcher.validate_grammar(grammar, limits=limits.for_parser())
    return _on_one_line(fault) if fault else None


def _from_grammar(spec: GrammarSpec) -> Source:
    if not spec.text.strip():
        raise RequestError(f"{spec.param} is empty: give a grammar in GBNF or Lark", param=spec.param)
    try:
        return _from_lark(GrammarSpec("lark", any_to_lark(spec.text), param=spec.param))
    except RequestError:
        raise
    except Exception as error:  # the GBNF parser can raise anything, RecursionError included
        raise RequestError(
            f"{spec.param} is neither Lark nor GBNF: {error or type(error).__name__}", param=spec.param
        ) from None


def _from_lark(spec: GrammarSpec) -> Source:
    # in the brackets after a rule's name; llguidance only passes it to the sampler, which would ignore it
    if re.search(r"^[^\"/]*\[[^\]]*\btemperature\s*=", spec.text, re.MULTILINE):
        raise RequestError(f"{spec.param}: a rule's temperature is not supported: omit it", param=spec.param)
    for expression in re.findall(r"/(?!/)((?:\\.|[^/\\\n])+)/", spec.text):
        _check_size(expression, spec.param)
    return {"lark_grammar": spec.text}


def _check_size(expression: str, param: str) -> None:
    size = expanded_size(expression)
    if size > MAX_SIZE:
        raise RequestError(
            f"{param} has {size} characters with its repetitions written out, but the limit is {MAX_SIZE}: lower the "
            "counts in {}, or leave them open as in {1,}",
            param=param,
        )


_SOURCES: dict[str, Callable[[GrammarSpec], Source]] = {
    "json_object": _from_json_object,
    "json_schema": _from_json_schema,
    "regex": _from_regex,
    "choice": _from_choice,
    "grammar": _from_grammar,
    "lark": _from_lark,
}


# ---- Error messages ----


def _explain(spec: GrammarSpec, root: LLMatcher, vocabulary: Vocabulary, limits: GrammarLimits) -> RequestError:
    path, reason = spec.param, _reason(root)
    if spec.kind == "json_schema":
        path, reason = _Locator(vocabulary, limits).find(parse_schema(spec.text, spec.param), spec.param, reason)
    return refuse(path, "cannot be enforced", reason)


class _Locator:
    """Finds the subschema that does not compile. Owns the number of remaining tries."""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        self._num_tries = _LOCATE_TRIES

    def find(self, schema: Any, path: str, reason: str) -> tuple[str, str]:
        """(path, reason) of the innermost subschema that fails by itself."""
        if not isinstance(schema, dict):
            return path, reason
        groups = ((keyword, schema.get(keyword)) for keyword in ("$defs", "definitions"))
        definitions = {keyword: group for keyword, group in groups if isinstance(group, dict)}
        candidates = [*subschemas(schema, path)]
        for keyword, group in definitions.items():
            candidates += [(f"{path}.{keyword}.{name}", definition) for name, definition in group.items()]
        while candidates:
            inner_path, inner = candidates.pop(0)
            if self._num_tries == 0:
                break
            self._num_tries -= 1
            inner_reason = self._fault(inner, definitions, inner_path)
            if inner_reason is not None:
                path, reason = inner_path, inner_reason
                candidates = [*subschemas(inner, inner_path)]
        return path, reason

    def _fault(self, schema: Any, definitions: dict[str, Any], path: str) -> str | None:
        if not isinstance(schema, dict):
            return None
        source = json.dumps({"grammars": [_json_source({**definitions, **schema}, path)]})
        matcher = LLMatcher(self._vocabulary.trie, source, log_level=0, limits=self._limits.for_parser())
        return _reason(matcher) if matcher.is_error() else None


def _reason(matcher: LLMatcher) -> str:
    """The library's message on one line, without its markers of the position and its dump of the parser's state."""
    error = _on_one_line(matcher.get_error().partition("<state>")[0])
    if error == "NoExtensionBias":
        return "no token can follow, because no output matches it"
    return error or matcher.stop_reason()


def _on_one_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines()]
    kept = [line for line in lines if line and line != "<non-verbose/>" and not re.fullmatch(r"[\^|\s]*", line)]
    text = " ".join(kept)
    return text if len(text) <= 400 else text[:397] + "..."
