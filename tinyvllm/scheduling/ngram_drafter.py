"""Prompt lookup: guesses that the text's last tokens are followed by what followed their latest earlier occurrence.

It needs no model, and guesses well wherever an output repeats its prompt or itself: edits of code, summaries, answers
with quotations, structured data (Saxena 2023, "Prompt Lookup Decoding"; vLLM's method ngram).

Each request has an index of its n-grams of the shortest length, as in LZ77: a hash table of the latest position, and
for each position the one before it with the same hash. A lookup follows at most `MAX_LINKS` of these links. It takes
the occurrence whose match with the text's end is longest, up to the longest n-gram, and of several the latest. So a
token costs the same however long the text is. Memory: 16 to 24 bytes for each token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.request import Request

MAX_LINKS = 32  # occurrences that a lookup compares: of a frequent n-gram, the latest ones
SMALLEST_TABLE = 256  # places
VECTOR_TOKENS = 64  # so many new tokens are indexed with NumPy; fewer are faster one by one
_FACTOR, _MASK = 0x9E3779B1, 0xFFFFFFFF  # of the hash: Knuth's multiplicative one, modulo 2**32


class NgramDrafter:
    """Owns an index of the n-grams of each request that it was shown."""

    is_free = True  # a guess takes no time on the device

    def __init__(self, shortest: int, longest: int) -> None:
        """Tokens of the shortest n-gram that counts as a match, and of the longest that is compared."""
        assert 1 <= shortest <= longest, f"{shortest=} {longest=}"
        self._shortest, self._longest = shortest, longest
        self._texts: dict[Request, NgramIndex] = {}

    def expects(self, request: Request) -> bool:
        """Whether the known text's end has occurred before. What is in flight then probably continues a repetition."""
        return self._index_of(request).find() > 0

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        return [self._index_of(request).guess(count) for request, count in zip(requests, counts, strict=True)]

    def committed(self, plan: StepPlan, output: StepOutput) -> None:
        """Nothing to do: an index takes over new tokens when it is asked."""

    def forget(self, request: Request) -> None:
        self._texts.pop(request, None)

    def _index_of(self, request: Request) -> NgramIndex:
        """The request's index, with all known tokens."""
        index = self._texts.get(request)
        if index is None:
            index = self._texts[request] = NgramIndex(self._shortest, self._longest)
            index.extend(request.prompt_ids)
        num_new = len(request.prompt_ids) + len(request.output_ids) - len(index)
        if num_new:
            index.extend(request.output_ids[-num_new:])
        return index


class NgramIndex:
    """A growing text, and where its n-grams occur in it.

    An n-gram's position is the one after its last token, so its continuation begins there. All positions up to the last
    token are in the index; the text's end itself has no continuation yet. Position 0 stands for none.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest
        self._tokens = array("i")
        self._earlier = array("i")  # by position: the previous one with the same hash
        self._latest = array("i", bytes(4 * SMALLEST_TABLE))  # by hash
        self._num_indexed = 0  # positions [0, num_indexed] are in the index
        self._found = (0, 0)  # the latest search: the text's length, and the position
        self._earlier.append(0)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the text."""
        self._tokens.extend(token_ids)
        if len(self._tokens) > len(self._latest):
            self._enlarge()
        elif len(token_ids) >= VECTOR_TOKENS:
            self._index_many()
        else:
            self._index_each()

    def find(self) -> int:
        """The position after the latest of the longest matches with the text's end; 0 if the end is new."""
        length = len(self._tokens)
        if self._found[0] != length:
            self._found = (length, self._search())
        return self._found[1]

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens that may follow. A match that reaches the end repeats, as in LZ77."""
        position = self.find()
        if not position:
            return []
        out = self._tokens[position : position + count].tolist()
        while len(out) < count:
            out += out[: count - len(out)]
        return out

    def _search(self) -> int:
        tokens, shortest, end = self._tokens, self._shortest, len(self._tokens)
        if end <= shortest:
            return 0
        suffix = tokens[end - shortest : end]
        best, best_length = 0, 0
        position = self._latest[self._place(end)]
        for _ in range(MAX_LINKS):
            if not position:
                break
            if tokens[position - shortest : position] == suffix:  # else another n-gram has the same hash
                length = self._match_length(position)
                if length > best_length:
                    best, best_length = position, length
                    if length == self._longest:
                        break
            position = self._earlier[position]
        return best

    def _match_length(self, position: int) -> int:
        """How many tokens before `position` equal those before the end, from `shortest` up to `longest`."""
        tokens, end, length = self._tokens, len(self._tokens), self._shortest
        limit = min(self._longest, position)
        while length < limit and tokens[position - length - 1] == tokens[end - length - 1]:
            length += 1
        return length

    def _place(self, position: int) -> int:
        """The table's place for the n-gram before a position."""
        value = 0
        for token_id in self._tokens[position - self._shortest : position]:
            value = (value * _FACTOR + token_id + 1) & _MASK
        return (value ^ value >> 15) & (len(self._latest) - 1)

    def _index_each(self) -> None:
        """Index the positions before the last token."""
        for position in range(self._num_indexed + 1, len(self._tokens)):
            if position < self._shortest:
                self._earlier.append(0)
                continue
            place = self._place(position)
            self._earlier.append(self._latest[place])
            self._latest[place] = position
        self._num_indexed = max(self._num_indexed, len(self._tokens) - 1)

    def _index_many(self) -> None:
        """The same at once, for many."""
        first = max(self._num_indexed + 1, self._shortest)
        stop = len(self._tokens)
        self._earlier.extend([0] * (stop - len(self._earlier)))
        self._num_indexed = max(self._num_indexed, stop - 1)
        if first >= stop:
            return
        places = self._places(first, stop)
        order = np.argsort(places, kind="stable")
        positions, sorted_places = (order + first).astype(np.int32), places[order]
        is_first = np.ones(len(order), dtype=bool)  # of its place
        is_first[1:] = sorted_places[1:] != sorted_places[:-1]
        latest = np.frombuffer(self._latest, dtype=np.int32)
        before = np.empty_like(positions)
        before[1:] = positions[:-1]
        before[is_first] = latest[sorted_places[is_first]]
        np.frombuffer(self._earlier, dtype=np.int32)[positions] = before
        is_last = np.append(is_first[1:], True)
        latest[sorted_places[is_last]] = positions[is_last]

    def _places(self, first: int, stop: int) -> NDArray[np.int64]:
        """`_place` of each position in [first, stop)."""
        tokens = np.frombuffer(self._tokens, dtype=np.int32).astype(np.uint64)
        values = np.zeros(stop - first, dtype=np.uint64)
        for back in range(self._shortest, 0, -1):
            before = tokens[first - back : stop - back]
            values = (values * np.uint64(_FACTOR) + before + np.uint64(1)) & np.uint64(_MASK)
        return ((values ^ values >> np.uint64(15)) & np.uint64(len(self._latest) - 1)).astype(np.int64)

    def _enlarge(self) -> None:
        """Double the table until it has a place for each token, and index everything again: on average, a constant
        time for each token."""
        size = len(self._latest)
        while size < len(self._tokens):
            size *= 2
        self._latest = array("i", bytes(4 * size))
        self._earlier = array("i", [0])
        self._num_indexed = 0
        self._index_many()
