"""What a scene may contain, the sentence that describes it, and the reserved combinations.

A scene is one or two groups of things, left to right, in a place, in some weather, at some
time of day. Its caption is canonical: one scene has exactly one sentence.

    two red boats and a yellow house by the sea on a rainy night
"""

from __future__ import annotations

import random
from dataclasses import dataclass

KINDS = ("house", "boat", "car", "tree", "tent", "balloon", "umbrella", "cat", "flower", "bird", "kite")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
PLACES = {
    "sea": "by the sea",
    "meadow": "in a meadow",
    "desert": "in the desert",
    "mountains": "in the mountains",
    "town": "in a town",
    "forest": "in a forest",
}
WEATHERS = ("clear", "rainy", "snowy", "foggy")
TIMES = ("day", "evening", "night")
COUNT_WORDS = {1: "a", 2: "two", 3: "three"}

# Weather that does not happen somewhere is never drawn there.
IMPOSSIBLE = {("desert", "snowy"), ("mountains", "rainy")}


@dataclass(frozen=True)
class Group:
    """Some things of one kind and one colour."""

    count: int
    kind: str
    colour: str

    def words(self) -> str:
        """The group as a noun phrase: `an orange cat`, `two red boats`."""
        if self.count == 1:
            article = "an" if self.colour[0] in "aeiou" else "a"
            return f"{article} {self.colour} {self.kind}"
        return f"{COUNT_WORDS[self.count]} {self.colour} {self.kind}s"


@dataclass(frozen=True)
class Scene:
    """Everything the caption says about a picture."""

    groups: tuple[Group, ...]
    place: str
    weather: str
    time: str

    def caption(self) -> str:
        """The one true caption of the scene."""
        things = " and ".join(group.words() for group in self.groups)
        return f"{things} {PLACES[self.place]} on a {self.weather} {self.time}"


def is_reserved(kind: str, colour: str, place: str) -> bool:
    """Whether training must never show this kind in this colour at this place.

    A Latin-square rule: of the seven colours, each kind at each place has exactly one reserved,
    so reserved triples are spread evenly and every pair of attributes is left to training.
    """
    shift = 2 * KINDS.index(kind) + 3 * list(PLACES).index(place)
    return (COLOURS.index(colour) + shift) % len(COLOURS) == 0


def check_reserved() -> tuple[int, int]:
    """Check that every pair of attributes is left to training; count reserved and all triples."""
    triples = [(k, c, p) for k in KINDS for c in COLOURS for p in PLACES]
    seen = [triple for triple in triples if not is_reserved(*triple)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = {(t[first], t[second]) for t in triples}
        assert pairs == {(t[first], t[second]) for t in seen}, "a pair is never trained on"
    return len(triples) - len(seen), len(triples)


def sample_scene(rng: random.Random, reserved: bool, wide: bool = True) -> Scene:
    """Draw a scene whose every group is reserved (evaluation) or is not (training).

    A picture that is not `wide` has no room for four things side by side.
    """
    place = rng.choice(list(PLACES))
    weather = rng.choice([w for w in WEATHERS if (place, w) not in IMPOSSIBLE])
    time = rng.choice(TIMES)
    choices = [(k, c) for k in KINDS for c in COLOURS if is_reserved(k, c, place) == reserved]
    counts = rng.choice(_layouts(wide))
    kinds_colours = rng.sample(choices, len(counts))
    groups = tuple(Group(n, k, c) for n, (k, c) in zip(counts, kinds_colours))
    return Scene(groups, place, weather, time)


def _layouts(wide: bool) -> list[tuple[int, ...]]:
    """The counts of things, left to right, a picture may have; repeats are weights."""
    layouts = [(1,), (2,), (3,), (1, 1), (1, 1), (1, 2), (2, 1)]
    if wide:
        layouts += [(2, 2), (1, 3), (3, 1)]
    return layouts


def words() -> list[str]:
    """All word pieces of the captions, in a fixed order; plurals are a word and `##s`."""
    pieces = ["a", "an", "two", "three", "and", "##s", *COLOURS, *KINDS]
    for phrase in [*PLACES.values(), "on", *WEATHERS, *TIMES]:
        pieces += [word for word in phrase.split() if word not in pieces]
    return pieces
