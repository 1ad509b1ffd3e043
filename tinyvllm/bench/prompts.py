"""Prompts for measurements: a text of our own, whose tokens are those of real language, and random ids, which need no
tokenizer and are the same on every machine."""

from __future__ import annotations

import random

from tinyvllm.errors import TinyvllmError

SENTENCES = (
    "The harbour wakes before the town does.",
    "Long ahead of sunrise the first boats leave, their lamps small and yellow against the water, and the gulls follow "
    "them out as far as the breakwater.",
    "Nobody who lives here remembers who built the old crane at the end of the pier, but every child can tell you how "
    "it groans when the wind turns east.",
    "In the ledger of 1874 the harbour master wrote down 212 ships, 31 of them under foreign flags, and one balloon.",
    "Baker, chandler, rope maker, smith: the names over the doors have changed, yet the trades behind them moved very "
    "little.",
    "On Tuesdays the fish market sells out by half past seven, and whoever comes later has to be content with eels.",
    "The smith's daughter keeps a notebook of the tides, and next to each of them she records what the sea brought in.",
    "Most of it is driftwood, some of it is glass, and once there was a violin without strings in a box of tar.",
    "She dried it by the stove for a month, and when it was strung again it played, although not quite in tune.",
    "Visitors ask for the lighthouse, which has been dark since the automatic beacon took over on the outer reef.",
    "Its keeper stayed on all the same; he says that a light may be switched off, but that a view may not.",
    "From his window one sees the whole bay: the salt pans in the north, the dunes, and the railway that ends there.",
    "The railway was meant to go further, across the marsh and on to the capital, until bridges ate the money.",
    "What is left of it carries salt in the morning, schoolchildren at noon, and in the evening nothing but the mail.",
    "When fog comes in, the train whistles three times at every crossing, and the boats answer with their bells.",
    "An engineer from the capital once measured how far the sound travels: 4.6 kilometres over water, 2.9 over sand.",
    "He published a table of it, which is still quoted, and married the teacher who had held the tape's other end.",
    "In winter the bay freezes only at its edges, in thin plates that ring when the waves push them together.",
    "People say that this ringing is where the tune of the harbour song comes from, but they say so of many things.",
    "What can be proved is that the song has nine verses, of which the seventh is never sung in front of strangers.",
    "Spring begins on the day when the nets are laid out on the square to be mended and the square smells of tar.",
    "Then the doors stand open, the accounts of the past year are read aloud, and whoever owes pays or promises.",
    "By noon all is settled, the tables are carried out, and the crane on the pier is painted red once more.",
    "It has never been clear who pays for the paint.",
)
LENGTHS = {"short": 1, "medium": 8, "long": len(SENTENCES)}  # sentences


def make_text(length: str, number: int = 0) -> str:
    """A prompt of real text: short, medium or long, which is about 10, 200 or 600 tokens. Each `number` begins with
    another sentence, so that prompts of a batch do not share their first block. Raises TinyvllmError for an unknown
    length."""
    if length not in LENGTHS:
        raise TinyvllmError(f"--prompts has {length!r}: choose from {', '.join(LENGTHS)}")
    return " ".join(SENTENCES[(number + index) % len(SENTENCES)] for index in range(LENGTHS[length]))


def make_ids(length: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids. The same seed gives the same ids on every machine."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(length)]
