"""Renders a scene: the landscape, its things with their labels, and the weather in front.

Pictures are drawn larger than wanted and scaled down, which smooths every edge. The same seed
always gives the same picture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from grammar import Scene
from places import Landscape
from skies import THING_LIGHT
from things import DRAWINGS, IN_THE_SKY, PAINTS, WIDTHS, Pen, mix


@dataclass
class Picture:
    """A rendered scene.

    `labels` has the picture's size: 0 for the background, n for the n-th group from the left.
    `centres` are the middles of the things as (x, y, group) in shares of the picture's sides.
    """

    image: Image.Image
    labels: Image.Image
    centres: list[tuple[float, float, int]]


@dataclass
class Slot:
    """Where one thing stands: its foot, its height, and the group it belongs to."""

    x: float
    y: float
    height: float
    group: int


def render(scene: Scene, seed: int, size: tuple[int, int], finer: int = 2) -> Picture:
    """Draw the scene `finer` times larger than `size` and scale it down."""
    rng = random.Random(seed)
    width, height = size[0] * finer, size[1] * finer
    land = Landscape((width, height), scene.place, scene.weather, scene.time, rng)
    labels = Image.new("L", (width, height), 0)
    label_draw = ImageDraw.Draw(labels)
    slots = _slots(scene, land, rng)
    centres = []
    for slot in sorted(slots, key=lambda slot: slot.y):
        group = scene.groups[slot.group]
        light = THING_LIGHT[scene.time]
        dark = scene.time == "night" or (scene.time == "evening" and rng.random() < 0.5)
        flip = rng.random() < 0.5
        pen = Pen(land.draw, label_draw, slot.group + 1, (slot.x, slot.y), slot.height, light, dark, flip)
        if group.kind not in IN_THE_SKY:
            pen.shadow(WIDTHS[group.kind] * 0.45, 60 if scene.weather == "clear" else 40)
        if group.kind == "boat":
            pen.pond(0.62)
        paint = _vary(PAINTS[group.colour], rng)
        DRAWINGS[group.kind](pen, paint if group.colour != "white" else PAINTS["white"], rng)
        centres.append((slot.x / width, (slot.y - 0.5 * slot.height) / height, slot.group + 1))
    land.finish()
    image = land.image.resize(size, Image.Resampling.BOX) if finer > 1 else land.image
    labels = labels.resize(size, Image.Resampling.NEAREST) if finer > 1 else labels
    return Picture(image, labels, centres)


def _vary(paint: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    """A slightly different tone of a paint."""
    other = rng.choice(((255, 255, 255), (0, 0, 0)))
    return mix(paint, other, rng.uniform(0, 0.08))


def _slots(scene: Scene, land: Landscape, rng: random.Random) -> list[Slot]:
    """Places for all things, left to right, the two groups well apart."""
    width, height = land.w, land.h
    counts = [group.count for group in scene.groups]
    gap = rng.uniform(0.08, 0.14) * width if len(counts) == 2 else 0.0
    edge = 0.03 * width
    room = width - 2 * edge - gap
    # A thing's share of the room follows its shape; a wide car gets more of it than a cat.
    shares = [0.75 + 0.25 * WIDTHS[group.kind] for group in scene.groups for _ in range(group.count)]
    widest = 0.46 * width
    slots, left = [], edge
    total = sum(shares)
    items = [i for i, n in enumerate(counts) for _ in range(n)]
    for index, group in enumerate(items):
        if index and items[index - 1] != group:
            left += gap
        wide = room * shares[index] / total
        kind = scene.groups[group].kind
        tall = 0.5 * height if kind != "car" else 0.36 * height
        fit = min(wide * 0.94, widest) / WIDTHS[kind]
        high = min(fit * rng.uniform(0.86, 1.0), tall * rng.uniform(0.84, 1.0))
        free = max(0.0, wide - high * WIDTHS[kind])
        x = left + wide / 2 + free * rng.uniform(-0.3, 0.3)
        slots.append(Slot(x, _foot(kind, scene.place, land, high, rng), high, group))
        left += wide
    return slots


def _foot(kind: str, place: str, land: Landscape, high: float, rng: random.Random) -> float:
    """How far down the picture a thing stands, floats or flies."""
    if kind in IN_THE_SKY:
        top = land.h * rng.uniform(0.03, 0.12)
        return top + high + max(0.0, 0.3 * land.h - high) * rng.random()
    if kind == "boat" and place == "sea":
        return land.h * rng.uniform(0.68, 0.76)
    low = 0.86 if place == "sea" else 0.74
    return land.h * rng.uniform(low, 0.95)


def to_array(picture: Picture, side: int) -> np.ndarray:
    """The picture as the model sees it: stretched to a square, bicubic."""
    return np.asarray(picture.image.resize((side, side), Image.Resampling.BICUBIC))
