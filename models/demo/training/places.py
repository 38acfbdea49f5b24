"""The six places: the land under the sky."""

from __future__ import annotations

import math
import random

from skies import Sky
from things import Colour, Point, mix, shade


class Landscape(Sky):
    """A picture on which a place is drawn in some weather at some hour."""

    def __init__(self, size: tuple[int, int], place: str, weather: str, time: str, rng: random.Random):
        super().__init__(size, weather, time, rng)
        getattr(self, f"_{place}")()
        if weather == "foggy":
            self.haze()

    def ridge(self, base: float, height: float, waves: float, rough: float = 0.0) -> list[Point]:
        """The outline of hills from the left to the right edge, closed at the bottom."""
        phases = [self.rng.random() * 2 * math.pi for _ in range(3)]
        points = []
        for i in range(49):
            t = i / 48
            y = sum(math.sin(2 * math.pi * waves * f * t + p) / f for f, p in zip((1, 1.7, 2.9), phases))
            y += rough * self.rng.uniform(-1, 1)
            points.append((t * self.w, base - height * (0.5 + 0.28 * y)))
        return [(0, self.h), *points, (self.w, self.h)]

    def hills(self, base: float, height: float, waves: float, colour: Colour, rough: float = 0.0) -> None:
        """A range of hills down to the bottom of the picture."""
        self.draw.polygon(self.ridge(base, height, waves, rough), fill=self.lit(colour))

    def ground(self, top: float, near: Colour, far: Colour) -> None:
        """A gradient of ground from `top` to the bottom of the picture."""
        bands = 24
        for i in range(bands):
            y0 = top + (self.h - top) * i / bands
            colour = mix(far, near, i / (bands - 1))
            self.draw.rectangle((0, y0, self.w, self.h), fill=self.lit(colour))

    def _sea(self) -> None:
        rng, u = self.rng, self.unit
        self.hills(self.horizon, 0.1 * u, rng.uniform(0.5, 0.9), self.snowed(mix((94, 122, 130), (150, 170, 190), 0.4)))
        self.ground(self.horizon, (64, 150, 186), (30, 96, 152))
        for _ in range(46):
            y = self.horizon + (self.h - self.horizon) * rng.random() ** 1.3
            x, half = rng.random() * self.w, u * rng.uniform(0.03, 0.08) * (0.4 + y / self.h)
            self.draw.line(
                [(x - half, y), (x, y - 0.006 * u), (x + half, y)],
                fill=self.lit((206, 232, 242), 150),
                width=max(1, u // 110),
            )
        shore = self.h * rng.uniform(0.8, 0.84)
        outline = self.ridge(shore, 0.05 * u, 1.2)
        self.draw.polygon(
            [(x, y - 0.014 * u) if 0 < i < len(outline) - 1 else (x, y) for i, (x, y) in enumerate(outline)],
            fill=self.lit((246, 252, 255), 220),
        )
        self.draw.polygon(outline, fill=self.lit(self.snowed((236, 210, 156))))
        for _ in range(40):
            x, y, r = rng.random() * self.w, rng.uniform(shore + 0.02 * u, self.h), u * rng.uniform(0.003, 0.007)
            self.draw.ellipse((x - r, y - r * 0.7, x + r, y + r * 0.7), fill=self.lit((198, 170, 124)))

    def _meadow(self) -> None:
        rng, u = self.rng, self.unit
        self.hills(self.horizon + 0.02 * u, 0.16 * u, 0.8, self.snowed((128, 176, 130)))
        self.hills(self.horizon + 0.06 * u, 0.12 * u, 1.1, self.snowed((142, 194, 100)))
        self.ground(self.horizon + 0.08 * u, self.snowed((122, 186, 66)), self.snowed((160, 208, 94)))
        for _ in range(130):
            x, y = rng.random() * self.w, self.horizon + (self.h - self.horizon) * (0.15 + 0.85 * rng.random())
            s = u * 0.022 * (0.4 + y / self.h)
            for dx in (-0.5, 0, 0.5):
                self.draw.line(
                    [(x, y), (x + dx * s, y - s)],
                    fill=self.lit(self.snowed((84, 150, 54), 0.3)),
                    width=max(1, u // 150),
                )
        for _ in range(36):
            x, y, r = (
                rng.random() * self.w,
                self.horizon + (self.h - self.horizon) * (0.2 + 0.8 * rng.random()),
                u * 0.007,
            )
            self.draw.ellipse(
                (x - r, y - r, x + r, y + r),
                fill=self.lit(rng.choice(((255, 250, 240), (250, 226, 110), (244, 170, 190)))),
            )

    def _desert(self) -> None:
        rng, u = self.rng, self.unit
        for _ in range(rng.randint(1, 3)):
            x, half, high = rng.random() * self.w, rng.uniform(0.08, 0.2) * u, rng.uniform(0.07, 0.16) * u
            base = self.horizon + 0.04 * u
            self.draw.polygon(
                [(x - half, base), (x - half * 0.7, base - high), (x + half * 0.6, base - high), (x + half, base)],
                fill=self.lit((188, 120, 92)),
            )
            self.draw.polygon(
                [
                    (x - half * 0.8, base - high * 0.6),
                    (x + half * 0.75, base - high * 0.6),
                    (x + half * 0.72, base - high * 0.45),
                    (x - half * 0.86, base - high * 0.45),
                ],
                fill=self.lit((168, 102, 80)),
            )
        self.ground(self.horizon + 0.03 * u, (224, 172, 104), (240, 204, 140))
        for share in (0.1, 0.34, 0.62):
            y = self.horizon + (self.h - self.horizon) * share + 0.03 * u
            self.hills(y + 0.04 * u, 0.1 * u, rng.uniform(0.6, 1.1), mix((242, 206, 144), (222, 168, 100), share + 0.1))
        for _ in range(3):
            self._cactus(
                rng.random() * self.w,
                self.horizon + (self.h - self.horizon) * rng.uniform(0.12, 0.4),
                rng.uniform(0.07, 0.12) * u,
            )
        for _ in range(30):
            x, y, r = (
                rng.random() * self.w,
                self.horizon + (self.h - self.horizon) * rng.uniform(0.3, 1),
                u * rng.uniform(0.03, 0.06),
            )
            self.draw.line(
                [(x - r, y), (x, y - 0.1 * r), (x + r, y)], fill=self.lit((206, 152, 90), 150), width=max(1, u // 130)
            )

    def _cactus(self, x: float, y: float, s: float) -> None:
        colour, width = self.lit((78, 122, 84)), max(2, round(0.2 * s))
        lines = [
            [(x, y), (x, y - s)],
            [(x, y - 0.35 * s), (x + 0.32 * s, y - 0.4 * s), (x + 0.32 * s, y - 0.75 * s)],
            [(x, y - 0.25 * s), (x - 0.3 * s, y - 0.3 * s), (x - 0.3 * s, y - 0.6 * s)],
        ]
        for line in lines:
            self.draw.line(line, fill=colour, width=width, joint="curve")

    def _mountains(self) -> None:
        rng, u = self.rng, self.unit
        for depth, colour in ((0, (132, 148, 176)), (1, (98, 112, 142))):
            x, base = -0.2 * u, self.horizon + (0.04 + 0.03 * depth) * u
            while x < self.w + 0.1 * u:
                half, high = rng.uniform(0.16, 0.28) * u, rng.uniform(0.2, 0.36 - 0.12 * depth) * u
                peak = (x + half, base - high)
                self.draw.polygon([(x, base), peak, (x + 2 * half, base)], fill=self.lit(colour))
                self.draw.polygon(
                    [peak, (x + 2 * half, base), (x + 1.15 * half, base)], fill=self.lit(shade(colour, 0.84))
                )
                cap = [
                    peak,
                    (x + 0.62 * half, base - 0.62 * high),
                    (x + 0.8 * half, base - 0.7 * high),
                    (x + half, base - 0.55 * high),
                    (x + 1.2 * half, base - 0.7 * high),
                    (x + 1.38 * half, base - 0.62 * high),
                ]
                self.draw.polygon(cap, fill=self.lit((244, 248, 252)))
                x += half * rng.uniform(0.9, 1.4)
        self.hills(self.horizon + 0.1 * u, 0.1 * u, 0.9, (206, 218, 234))
        self.ground(self.horizon + 0.09 * u, (232, 238, 246), (206, 218, 234))
        for _ in range(14):
            x, y, r = (
                rng.random() * self.w,
                self.horizon + (self.h - self.horizon) * rng.uniform(0.2, 1),
                u * rng.uniform(0.04, 0.09),
            )
            self.draw.arc(
                (x - r, y - 0.2 * r, x + r, y + 0.3 * r),
                190,
                350,
                fill=self.lit((178, 194, 220)),
                width=max(1, u // 110),
            )
        for _ in range(6):
            x, y, r = (
                rng.random() * self.w,
                self.horizon + (self.h - self.horizon) * rng.uniform(0.2, 1),
                u * rng.uniform(0.012, 0.024),
            )
            self.draw.polygon(
                [(x - r, y), (x - 0.5 * r, y - r), (x + 0.6 * r, y - 0.8 * r), (x + r, y)],
                fill=self.lit((120, 126, 142)),
            )

    def _town(self) -> None:
        rng, u = self.rng, self.unit
        for depth, tones in (
            (0, ((150, 158, 176), (164, 160, 172))),
            (1, ((128, 122, 134), (146, 132, 130), (116, 124, 140))),
        ):
            x, base = -0.05 * u, self.horizon + 0.12 * u
            while x < self.w:
                wide, high = rng.uniform(0.1, 0.17) * u, rng.uniform(0.2, 0.4 - 0.12 * depth) * u
                tone = rng.choice(tones)
                self.draw.rectangle((x, base - high, x + wide, base), fill=self.lit(tone))
                roof = self.snowed(shade(tone, 0.7), 0.8)
                self.draw.rectangle(
                    (x - 0.006 * u, base - high - 0.016 * u, x + wide + 0.006 * u, base - high), fill=self.lit(roof)
                )
                self._windows(x, base - high, wide, high)
                x += wide + rng.choice((0.0, 0.008, 0.03)) * u
        top = self.horizon + 0.12 * u
        self.draw.rectangle((0, top, self.w, self.h), fill=self.lit(self.snowed((176, 172, 170))))
        self.draw.rectangle((0, top + 0.045 * u, self.w, self.h), fill=self.lit(self.snowed((122, 122, 130), 0.5)))
        rows, y = 7, top + 0.045 * u
        for i in range(rows):
            step = (self.h - y) / rows
            y0, y1 = y + i * step, y + (i + 1) * step
            self.draw.line([(0, y0), (self.w, y0)], fill=self.lit((98, 98, 108)), width=max(1, u // 150))
            cell = 0.06 * u * (1 + 0.25 * i)
            for j in range(int(self.w / cell) + 2):
                x = (j - 0.5 * (i % 2)) * cell
                self.draw.line([(x, y0), (x, y1)], fill=self.lit((98, 98, 108)), width=max(1, u // 150))

    def _windows(self, x: float, y: float, wide: float, high: float) -> None:
        u, cell = self.unit, 0.036 * self.unit
        for i in range(max(1, int(wide / cell))):
            for j in range(max(1, int(high / (cell * 1.25)))):
                wx, wy = x + 0.012 * u + i * cell, y + 0.018 * u + j * cell * 1.25
                lamp = self.rng.random() < {"day": 0.0, "evening": 0.35, "night": 0.6}[self.time]
                fill = (255, 220, 130, 255) if lamp else self.lit((94, 106, 128))
                if wx + 0.018 * u < x + wide:
                    self.draw.rectangle((wx, wy, wx + 0.016 * u, wy + 0.024 * u), fill=fill)

    def _forest(self) -> None:
        rng, u = self.rng, self.unit
        self.draw.rectangle((0, self.horizon - 0.02 * u, self.w, self.h), fill=self.lit(self.snowed((62, 92, 70), 0.3)))
        for depth in range(3):
            colour = ((96, 130, 116), (64, 104, 84), (40, 78, 60))[depth]
            base, x = self.horizon + (0.02 + 0.05 * depth) * u, -0.1 * u
            while x < self.w + 0.1 * u:
                self._conifer(x, base, rng.uniform(0.26, 0.42) * u, colour)
                x += rng.uniform(0.07, 0.13) * u
        self.hills(self.horizon + 0.13 * u, 0.05 * u, 1.3, self.snowed((86, 92, 56)))
        self.ground(self.horizon + 0.13 * u, self.snowed((92, 82, 54)), self.snowed((86, 92, 56)))
        for _ in range(90):
            x, y, r = (
                rng.random() * self.w,
                self.horizon + 0.14 * u + (self.h - self.horizon) * rng.random(),
                u * rng.uniform(0.006, 0.012),
            )
            self.draw.ellipse(
                (x - r, y - 0.6 * r, x + r, y + 0.6 * r),
                fill=self.lit(self.snowed(rng.choice(((122, 96, 56), (70, 84, 46), (108, 110, 60))), 0.3)),
            )

    def _conifer(self, x: float, y: float, high: float, colour: Colour) -> None:
        half = 0.22 * high
        self.draw.rectangle(
            (x - 0.03 * high, y - 0.1 * high, x + 0.03 * high, y + 0.05 * high), fill=self.lit((74, 58, 46))
        )
        for low, top, width in ((0.05, 0.5, 1.0), (0.3, 0.76, 0.76), (0.55, 1.0, 0.52)):
            tip = (x, y - top * high)
            left, right = (x - half * width, y - low * high), (x + half * width, y - low * high)
            self.draw.polygon([left, tip, right], fill=self.lit(colour))
            self.draw.polygon([right, tip, (x + 0.1 * half, y - low * high)], fill=self.lit(shade(colour, 0.86)))
            if self.weather == "snowy":
                cut = [tuple(a + (b - a) * 0.4 for a, b in zip(tip, corner)) for corner in (left, right)]
                self.draw.polygon([tip, cut[0], (x, y - (top - 0.1) * high), cut[1]], fill=self.lit((236, 242, 248)))
