"""Drawings of the things a scene may hold, in the manner of a picture book.

Every drawing is made with a `Pen`, whose unit is the thing's height: (0, 0) is the middle of
its foot, y grows upwards. The pen draws the same shape on a label picture, so that the drawing
itself says which pixels belong to which thing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

PAINTS: dict[str, Colour] = {
    "red": (214, 40, 46),
    "orange": (246, 140, 28),
    "yellow": (252, 220, 64),
    "green": (44, 160, 74),
    "blue": (44, 98, 214),
    "purple": (142, 66, 188),
    "white": (246, 246, 242),
}

# Width of a thing in its own heights.
WIDTHS = {
    "house": 0.95,
    "boat": 1.0,
    "car": 1.65,
    "tree": 0.8,
    "tent": 1.25,
    "balloon": 0.72,
    "umbrella": 1.0,
    "cat": 0.75,
    "flower": 0.68,
    "bird": 1.05,
    "kite": 0.75,
}

IN_THE_SKY = {"balloon", "kite"}


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with a share of `b` in it."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


def shade(colour: Colour, factor: float) -> Colour:
    """A darker (below 1) or lighter (above 1) tone of a colour."""
    if factor > 1:
        return mix(colour, (255, 255, 255), factor - 1)
    return tuple(round(x * factor) for x in colour)


class Pen:
    """Draws shapes in the units of one thing, on the picture and on its label picture."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        labels: ImageDraw.ImageDraw,
        label: int,
        foot: Point,
        height: float,
        light: tuple[float, float, float],
        lamps: bool,
        flip: bool,
    ):
        self.draw, self.labels, self.label = draw, labels, label
        self.foot, self.height = foot, height
        self.light, self.lamps = light, lamps
        self.side = -1 if flip else 1

    def lit(self, colour: Colour, alpha: int = 255) -> tuple[int, int, int, int]:
        """The colour as the light of the hour shows it."""
        tone = [min(255, round(channel * light)) for channel, light in zip(colour, self.light)]
        return (*tone, alpha)

    def at(self, x: float, y: float) -> Point:
        """A point of the thing on the picture."""
        return self.foot[0] + self.side * x * self.height, self.foot[1] - y * self.height

    def width(self, width: float) -> int:
        """The width of a line in pixels."""
        return max(1, round(width * self.height))

    def poly(self, points: list[Point], fill: Colour, edge: Colour | None = None) -> None:
        """A polygon, with a darker rim if `edge` is given."""
        spots = [self.at(*point) for point in points]
        self.draw.polygon(spots, fill=self.lit(fill))
        self.labels.polygon(spots, fill=self.label)
        if edge:
            self.draw.line([*spots, spots[0], spots[1]], fill=self.lit(edge), width=self.width(0.016), joint="curve")

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour, edge: Colour | None = None) -> None:
        """An ellipse round (x, y)."""
        cx, cy = self.at(x, y)
        box = (cx - rx * self.height, cy - ry * self.height, cx + rx * self.height, cy + ry * self.height)
        rim = self.lit(edge) if edge else None
        self.draw.ellipse(box, fill=self.lit(fill), outline=rim, width=self.width(0.016))
        self.labels.ellipse(box, fill=self.label)

    def line(self, points: list[Point], width: float, fill: Colour) -> None:
        """A line of some width."""
        spots = [self.at(*point) for point in points]
        self.draw.line(spots, fill=self.lit(fill), width=self.width(width), joint="curve")
        self.labels.line(spots, fill=self.label, width=self.width(width), joint="curve")

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, edge: Colour | None = None) -> None:
        """A rectangle."""
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, edge)

    def glass(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A window pane: sky by day, a lamp behind it in the dark."""
        if not self.lamps:
            self.box(x0, y0, x1, y1, (176, 214, 232))
            return
        light, self.light = self.light, (1.0, 1.0, 1.0)
        self.box(x0, y0, x1, y1, (255, 224, 138))
        self.light = light

    def shadow(self, half: float, strength: int) -> None:
        """A soft shadow on the ground under the thing."""
        for grow, share in ((1.25, 0.35), (1.0, 0.45), (0.75, 0.5)):
            cx, cy = self.at(0.06, 0.0)
            rx, ry = half * grow * self.height, 0.06 * grow * self.height
            self.draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=(20, 24, 40, round(strength * share)))

    def pond(self, half: float) -> None:
        """A little water for a boat that is not at sea."""
        for grow, tone in ((1.0, (70, 124, 168)), (0.86, (96, 158, 200))):
            cx, cy = self.at(0, 0.02)
            rx, ry = half * grow * self.height, 0.12 * grow * self.height
            self.draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=self.lit(tone))


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, steps: int = 16) -> list[Point]:
    """Points on an ellipse from `start` to `end`, in half turns (0 right, 0.5 up, 1 left)."""
    angles = [math.pi * (start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


WOOD, DARK, CREAM, SLATE = (124, 84, 52), (52, 46, 56), (250, 240, 214), (96, 84, 96)


def house(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """Painted walls, a slate roof, a door and windows."""
    edge = shade(paint, 0.6)
    pen.box(0.18, 0.72, 0.29, 0.98, (140, 96, 84), (90, 60, 54))
    pen.box(-0.4, 0, 0.4, 0.6, paint, edge)
    pen.box(0.2, 0.01, 0.39, 0.59, shade(paint, 0.86))
    pen.poly([(-0.48, 0.58), (0.48, 0.58), (0.3, 0.9), (-0.3, 0.9)], SLATE, shade(SLATE, 0.6))
    for y in (0.68, 0.79):
        pen.line([(-0.4 + y * 0.1, y), (0.4 - y * 0.1, y)], 0.012, shade(SLATE, 0.72))
    pen.box(-0.08, 0, 0.1, 0.34, WOOD, shade(WOOD, 0.6))
    pen.oval(0.065, 0.16, 0.013, 0.013, CREAM)
    for x in (-0.34, 0.17):
        pen.box(x - 0.02, 0.22, x + 0.18, 0.46, shade(CREAM, 0.94))
        pen.glass(x, 0.24, x + 0.16, 0.44)
        pen.line([(x + 0.08, 0.24), (x + 0.08, 0.44)], 0.014, shade(CREAM, 0.9))
        pen.line([(x, 0.34), (x + 0.16, 0.34)], 0.014, shade(CREAM, 0.9))


def boat(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """A painted hull with a stripe, a mast and two sails of which one is painted."""
    edge = shade(paint, 0.6)
    pen.line([(0.02, 0.2), (0.02, 1.0)], 0.03, WOOD)
    pen.poly([(0.05, 0.97), (0.05, 0.34), (0.42, 0.34), (0.2, 0.66)], shade(CREAM, 0.97), (170, 160, 140))
    pen.poly([(-0.01, 0.9), (-0.01, 0.34), (-0.33, 0.34)], paint, edge)
    pen.poly([(-0.5, 0.28), (0.5, 0.28), (0.36, 0.02), (-0.36, 0.02)], paint, edge)
    pen.poly([(-0.5, 0.28), (0.5, 0.28), (0.47, 0.22), (-0.47, 0.22)], shade(WOOD, 1.15))
    pen.poly([(-0.4, 0.1), (0.4, 0.1), (0.36, 0.02), (-0.36, 0.02)], shade(paint, 0.8))
    for x in (-0.2, 0.0, 0.2):
        pen.oval(x, 0.16, 0.03, 0.03, CREAM, edge)


def car(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """Rounded body, two windows, two wheels."""
    edge = shade(paint, 0.6)
    roof = [(-0.5, 0.5), *reversed(arc(-0.08, 0.5, 0.42, 0.44, 0, 1)), (0.44, 0.5)]
    pen.poly(roof[1:-1], paint, edge)
    body = [
        (-0.8, 0.18),
        *reversed(arc(-0.68, 0.42, 0.13, 0.14, 0.5, 1, 6)),
        *reversed(arc(0.6, 0.36, 0.21, 0.2, 0, 0.5, 6)),
        (0.8, 0.18),
    ]
    pen.poly(body, paint, edge)
    pen.box(-0.8, 0.16, 0.8, 0.27, shade(paint, 0.78))
    for start, end, gap in ((0.5, 0.95, -0.03), (0.05, 0.5, 0.03)):
        curve = arc(-0.08, 0.53, 0.33, 0.32, start, end, 8)
        corner = (-0.08 + gap, 0.53)
        pen.poly(
            [(x + gap, y) for x, y in curve] + [corner], (186, 216, 232) if not pen.lamps else (120, 140, 170), edge
        )
    for x in (-0.45, 0.45):
        pen.oval(x, 0.17, 0.175, 0.175, DARK)
        pen.oval(x, 0.17, 0.085, 0.085, (200, 204, 210))
    pen.oval(0.75, 0.38, 0.05, 0.05, (255, 238, 170))
    pen.box(-0.81, 0.36, -0.75, 0.44, (190, 50, 50))


def tree(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """A trunk with branches under a crown of leafy tufts."""
    pen.poly([(-0.08, 0), (0.09, 0), (0.045, 0.5), (-0.045, 0.5)], WOOD, shade(WOOD, 0.6))
    pen.line([(0, 0.28), (0.17, 0.46)], 0.04, WOOD)
    pen.line([(0, 0.32), (-0.16, 0.46)], 0.035, WOOD)
    tufts = [
        (0, 0.78, 0.2),
        (-0.2, 0.68, 0.17),
        (0.2, 0.68, 0.17),
        (-0.13, 0.52, 0.15),
        (0.14, 0.52, 0.15),
        (0, 0.62, 0.2),
    ]
    for x, y, r in tufts:
        pen.oval(x, y, r + 0.018, r + 0.018, shade(paint, 0.62))
    for x, y, r in tufts:
        pen.oval(x, y - 0.01, r, r, shade(paint, 0.86))
        pen.oval(x - 0.02, y + 0.02, r * 0.82, r * 0.82, paint)
    for _ in range(26):
        a, d = rng.random() * 2 * math.pi, 0.3 * math.sqrt(rng.random())
        x, y = d * math.cos(a), 0.66 + 0.85 * d * math.sin(a)
        pen.oval(x, y, 0.026, 0.018, shade(paint, rng.choice((0.74, 0.78, 1.25))))


def tent(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """A ridge tent with an open flap, a side wall and guy ropes."""
    edge = shade(paint, 0.55)
    pen.line([(-0.62, 0.0), (-0.2, 0.9)], 0.016, shade(CREAM, 0.7))
    pen.line([(0.64, 0.0), (0.3, 0.86)], 0.016, shade(CREAM, 0.7))
    pen.poly([(-0.12, 0.94), (0.28, 0.86), (0.58, 0), (0.28, 0)], shade(paint, 0.72), edge)
    pen.poly([(-0.54, 0), (0.3, 0), (-0.12, 0.94)], paint, edge)
    pen.poly([(-0.27, 0), (0.03, 0), (-0.12, 0.64)], DARK)
    pen.poly([(0.03, 0), (-0.12, 0.64), (0.13, 0.0)], shade(paint, 1.35), edge)
    pen.line([(-0.12, 0.92), (-0.12, 1.0)], 0.024, WOOD)
    pen.poly([(-0.12, 1.0), (-0.12, 0.93), (0.02, 0.965)], CREAM)


def balloon(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """A hot-air balloon: a striped envelope, ropes and a basket."""
    edge = shade(paint, 0.55)
    for x in (-0.1, 0.1):
        pen.line([(x * 2.2, 0.42), (x, 0.13)], 0.014, WOOD)
    pen.box(-0.11, 0, 0.11, 0.14, (176, 124, 70), shade(WOOD, 0.7))
    pen.line([(-0.11, 0.08), (0.11, 0.08)], 0.012, shade(WOOD, 0.7))
    outline = [(-0.12, 0.22), *reversed(arc(0, 0.65, 0.36, 0.345, -0.12, 1.12, 28)), (0.12, 0.22)]
    pen.poly(outline, paint, edge)
    for x in (-0.19, 0.0, 0.19):
        band = arc(x, 0.65, 0.055, 0.33 if x == 0 else 0.28, 0, 2, 24)
        pen.poly(band, shade(CREAM, 0.98) if paint != PAINTS["white"] else (196, 200, 208))
    pen.box(-0.13, 0.2, 0.13, 0.25, shade(paint, 0.7))


def umbrella(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """A wide scalloped canopy on a pole with a crook."""
    edge = shade(paint, 0.6)
    pen.line([(0, 0.06), (0, 1.0)], 0.035, shade(WOOD, 0.8))
    pen.line(arc(0.07, 0.07, 0.07, 0.07, 1, 2, 8), 0.035, shade(WOOD, 0.8))
    canopy = list(reversed(arc(0, 0.5, 0.5, 0.44, 0, 1, 24)))
    scallops = [p for i in (3, 2, 1, 0) for p in arc(-0.375 + 0.25 * i, 0.5, 0.125, 0.07, 0, 1, 6)]
    pen.poly(canopy + scallops, paint, edge)
    for x in (-0.25, 0.0, 0.25):
        curve = [(x * (1 - t * t), 0.56 + 0.38 * t) for t in (0, 0.25, 0.5, 0.75, 1)]
        pen.line(curve, 0.018, edge)
    pen.poly([*arc(0.0, 0.5, 0.5, 0.44, 0.02, 0.3, 8), (0.25, 0.56)], shade(paint, 0.82))


def cat(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """A sitting cat with pointed ears, whiskers and a curled tail."""
    edge = shade(paint, 0.55)
    pen.line([(0.18, 0.07), (0.32, 0.1), (0.37, 0.26), (0.31, 0.4)], 0.1, edge)
    pen.line([(0.18, 0.07), (0.32, 0.1), (0.37, 0.26), (0.31, 0.38)], 0.07, paint)
    pen.poly([*arc(0, 0.1, 0.25, 0.1, 1, 2, 8), *arc(0, 0.14, 0.25, 0.48, 0, 1, 16)], paint, edge)
    pen.oval(0, 0.22, 0.12, 0.18, shade(paint, 1.45) if paint != PAINTS["white"] else (226, 226, 230))
    for x in (-0.09, 0.09):
        pen.oval(x, 0.05, 0.08, 0.05, paint, edge)
    for s in (-1, 1):
        pen.poly([(s * 0.24, 0.78), (s * 0.22, 1.0), (s * 0.05, 0.88)], paint, edge)
        pen.poly([(s * 0.2, 0.82), (s * 0.195, 0.94), (s * 0.1, 0.87)], (240, 170, 170))
    pen.oval(0, 0.72, 0.26, 0.2, paint, edge)
    for s in (-1, 1):
        pen.oval(s * 0.11, 0.75, 0.045, 0.055, (250, 250, 210))
        pen.oval(s * 0.11, 0.75, 0.022, 0.05, DARK)
        for dy in (-0.02, 0.03):
            pen.line([(s * 0.12, 0.66), (s * 0.33, 0.66 + dy)], 0.01, DARK)
    pen.poly([(-0.03, 0.69), (0.03, 0.69), (0, 0.65)], (220, 110, 120))


def flower(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """A tall stem with two leaves and a daisy of eight petals."""
    stem = (66, 140, 60)
    pen.line([(0.03, 0), (0, 0.3), (0, 0.64)], 0.05, stem)
    pen.poly([(0.02, 0.12), (0.16, 0.3), (0.33, 0.3), (0.2, 0.14)], stem, shade(stem, 0.6))
    pen.poly([(0.0, 0.06), (-0.14, 0.23), (-0.31, 0.22), (-0.18, 0.07)], shade(stem, 0.88), shade(stem, 0.6))
    turn = rng.random() * 0.25
    for i in range(8):
        a = math.pi * (i / 4 + turn)
        pen.oval(0.22 * math.cos(a), 0.67 + 0.22 * math.sin(a), 0.112, 0.112, paint, shade(paint, 0.62))
    pen.oval(0, 0.67, 0.15, 0.15, (110, 70, 40), (80, 50, 30))
    pen.oval(-0.02, 0.69, 0.09, 0.09, (150, 100, 56))


def bird(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """A round bird on two thin legs: beak, wing and tail."""
    edge = shade(paint, 0.55)
    for x in (-0.06, 0.1):
        pen.line([(x, 0), (x, 0.26)], 0.03, (220, 130, 40))
        pen.line([(x - 0.05, 0.01), (x + 0.09, 0.01)], 0.028, (220, 130, 40))
    pen.poly([(-0.3, 0.5), (-0.52, 0.74), (-0.54, 0.56), (-0.5, 0.44), (-0.2, 0.34)], shade(paint, 0.74), edge)
    pen.oval(0.0, 0.5, 0.36, 0.3, paint, edge)
    pen.oval(0.24, 0.76, 0.22, 0.21, paint, edge)
    pen.oval(0.1, 0.4, 0.2, 0.15, shade(paint, 1.5) if paint != PAINTS["white"] else (224, 226, 230))
    pen.poly(
        [(0.43, 0.82), (0.43, 0.7), (0.58, 0.745)],
        (244, 160, 40) if paint != PAINTS["orange"] else (250, 214, 70),
        DARK,
    )
    wing = [(0.1, 0.6), *reversed(arc(-0.14, 0.56, 0.24, 0.17, 1.0, 2.0, 10)), (-0.34, 0.62)]
    pen.poly(wing, shade(paint, 0.7), edge)
    pen.oval(0.31, 0.8, 0.045, 0.045, (250, 250, 250))
    pen.oval(0.32, 0.8, 0.026, 0.026, DARK)


def kite(pen: Pen, paint: Colour, rng: random.Random) -> None:
    """A diamond with crossed spars and a tail of bows."""
    edge = shade(paint, 0.55)
    tail = [(0, 0.4), (0.1, 0.32), (-0.04, 0.22), (0.08, 0.12), (-0.02, 0.0)]
    pen.line(tail, 0.018, shade(CREAM, 0.6))
    for x, y in tail[1:]:
        for s in (-1, 1):
            pen.poly([(x, y), (x + s * 0.09, y + 0.05), (x + s * 0.09, y - 0.05)], paint, edge)
    pen.poly([(0, 1.0), (0.35, 0.72), (0, 0.36), (-0.35, 0.72)], paint, edge)
    pen.poly([(0, 1.0), (0.35, 0.72), (0, 0.72)], shade(paint, 0.78))
    pen.poly([(0, 0.36), (-0.35, 0.72), (0, 0.72)], shade(paint, 0.78))
    pen.line([(0, 1.0), (0, 0.36)], 0.022, shade(WOOD, 0.8))
    pen.line([(-0.35, 0.72), (0.35, 0.72)], 0.022, shade(WOOD, 0.8))


DRAWINGS: dict[str, Callable[[Pen, Colour, random.Random], None]] = {
    thing.__name__: thing for thing in (house, boat, car, tree, tent, balloon, umbrella, cat, flower, bird, kite)
}
