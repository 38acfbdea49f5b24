"""Compares captions with the truth, whole and attribute by attribute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from grammar import COLOURS, COUNT_WORDS, KINDS, PLACES

ATTRIBUTES = ("kinds", "colours", "counts", "place", "weather", "time")
NUMBERS = {"an": 1, **{word: number for number, word in COUNT_WORDS.items()}}


@dataclass(frozen=True)
class Said:
    """What a caption says, attribute by attribute; None where it cannot be understood."""

    kinds: tuple[str, ...] | None = None
    colours: tuple[str, ...] | None = None
    counts: tuple[int, ...] | None = None
    place: str | None = None
    weather: str | None = None
    time: str | None = None


def parse(caption: str) -> Said:
    """Take a caption apart."""
    for place, phrase in PLACES.items():
        things, found, rest = caption.partition(f" {phrase} on a ")
        if found and len(rest.split()) == 2:
            break
    else:
        return Said()
    groups = [group.split() for group in things.split(" and ")]
    if any(len(group) != 3 for group in groups):
        return Said(None, None, None, place, *rest.split())
    counts = tuple(NUMBERS.get(group[0], 0) for group in groups)
    kinds = tuple(group[2].removesuffix("s") for group in groups)
    return Said(kinds, tuple(group[1] for group in groups), counts, place, *rest.split())


def score(captions: list[str], truth: list[str]) -> dict[str, float]:
    """The share of captions exactly right, and right in each attribute."""
    shares = {"exact": sum(a == b for a, b in zip(captions, truth)) / len(truth)}
    pairs = [(parse(a), parse(b)) for a, b in zip(captions, truth)]
    for name in ATTRIBUTES:
        right = sum(getattr(said, name) == getattr(true, name) for said, true in pairs)
        shares[name] = right / len(pairs)
    return {name: round(share, 4) for name, share in shares.items()}


def majority(truth: list[str], frequent: list[str]) -> dict[str, float]:
    """The score of always saying what is most frequent in `frequent`, whole or per attribute."""
    common = Counter(frequent).most_common(1)[0][0]
    shares = {"exact": sum(common == b for b in truth) / len(truth)}
    said, true = [parse(c) for c in frequent], [parse(c) for c in truth]
    for name in ATTRIBUTES:
        most = Counter(getattr(s, name) for s in said).most_common(1)[0][0]
        shares[name] = sum(getattr(t, name) == most for t in true) / len(true)
    return {name: round(share, 4) for name, share in shares.items()}


assert set(COLOURS).isdisjoint(KINDS)
