"""Prompt lookup: the latest of the longest matches, at a constant cost for each token."""

from __future__ import annotations

import random
import sys

import pytest

from tests.scheduling.fakes import make_request
from tinyvllm.scheduling import ngram_drafter
from tinyvllm.scheduling.ngram_drafter import NgramDrafter, NgramIndex


def brute_force(tokens: list[int], shortest: int, longest: int, count: int) -> list[int]:
    """What a search of the whole text finds: the latest position of the longest match, whose text repeats."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for position in range(len(tokens) - 1, length - 1, -1):
            if tokens[position - length : position] == tokens[-length:]:
                text = list(tokens)
                for _ in range(count):
                    text.append(text[position + len(text) - len(tokens)])
                return text[len(tokens) :]
    return []


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 3), (2, 4), (3, 3), (5, 9)])
def test_it_finds_what_a_search_of_the_whole_text_finds(
    shortest: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngram_drafter, "MAX_LINKS", 10_000)
    monkeypatch.setattr(ngram_drafter, "VECTOR_TOKENS", 8)
    rng = random.Random(shortest * 100 + longest)
    for _ in range(8):
        index = NgramIndex(shortest, longest)
        tokens: list[int] = []
        vocab_size = rng.choice((2, 5, 40))
        while len(tokens) < 700:
            new = [rng.randrange(vocab_size) for _ in range(rng.choice((0, 1, 1, 2, 7, 8, 60)))]
            if len(tokens) > 20 and rng.random() < 0.3:
                start = rng.randrange(len(tokens) - 10)
                new = tokens[start : start + rng.randrange(1, 30)]
            index.extend(new)
            tokens += new
            count = rng.randrange(1, 12)
            assert len(index) == len(tokens)
            assert index.guess(count) == brute_force(tokens, shortest, longest, count)


def test_a_repetition_that_reaches_the_end_goes_on() -> None:
    index = NgramIndex(2, 4)
    index.extend([9, 1, 2, 3, 1, 2, 3, 1, 2])
    assert index.guess(7) == [3, 1, 2, 3, 1, 2, 3]


def test_a_request_gets_what_followed_in_its_prompt() -> None:
    drafter = NgramDrafter(2, 4)
    request = make_request(prompt=[5, 6, 7, 8, 9, 1])
    assert not drafter.expects(request) and drafter.propose([request], [4]) == [[]]
    request.output_ids += [5, 6]
    other = make_request("other", [1, 2, 1, 2])
    assert drafter.expects(request)
    assert drafter.propose([request, other], [3, 2]) == [[7, 8, 9], [1, 2]]
    request.output_ids.append(3)
    assert not drafter.expects(request)
    drafter.forget(request)
    drafter.forget(request)
    request.output_ids += [7, 8]
    assert drafter.propose([request], [1]) == [[9]]


def test_memory_and_links_are_bounded() -> None:
    index = NgramIndex(2, 4)
    index.extend([7] * 100_000)  # every position is a link
    assert index.guess(2) == [7, 7]
    arrays = (index._tokens, index._earlier, index._latest)
    assert sum(sys.getsizeof(one) for one in arrays) < 28 * 100_000
