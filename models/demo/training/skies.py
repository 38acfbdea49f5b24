"""Skies, light and weather: what is behind a landscape and what falls in front of it."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from things import Colour, mix

# The sky from the zenith to the horizon.
SKIES: dict[tuple[str, str], tuple[Colour, Colour]] = {
    ("clear", "day"): ((74, 150, 228), (206, 232, 248)),
    ("clear", "evening"): ((92, 72, 150), (255, 168, 96)),
    ("clear", "night"): ((10, 16, 46), (46, 62, 112)),
    ("rainy", "day"): ((112, 126, 144), (178, 188, 196)),
    ("rainy", "evening"): ((92, 74, 104), (216, 142, 106)),
    ("rainy", "night"): ((18, 22, 36), (46, 52, 70)),
    ("snowy", "day"): ((176, 192, 212), (230, 236, 242)),
    ("snowy", "evening"): ((142, 116, 156), (248, 190, 168)),
    ("snowy", "night"): ((26, 34, 64), (84, 96, 136)),
    ("foggy", "day"): ((186, 196, 202), (222, 226, 228)),
    ("foggy", "evening"): ((176, 138, 150), (248, 198, 158)),
    ("foggy", "night"): ((44, 52, 70), (94, 102, 120)),
}
FOG: dict[str, Colour] = {"day": (222, 226, 228), "evening": (238, 192, 162), "night": (92, 100, 118)}

# How the hour colours the land and the things on it.
LAND_LIGHT = {"day": (1.0, 1.0, 1.0), "evening": (0.94, 0.76, 0.7), "night": (0.36, 0.42, 0.6)}
THING_LIGHT = {"day": (1.0, 1.0, 1.0), "evening": (1.0, 0.93, 0.88), "night": (0.8, 0.81, 0.9)}


class Sky:
    """A picture with a sky, in some weather at some hour."""

    def __init__(self, size: tuple[int, int], weather: str, time: str, rng: random.Random):
        self.w, self.h = size
        self.unit = min(size)
        self.weather, self.time, self.rng = weather, time, rng
        self.horizon = self.h * rng.uniform(0.46, 0.56)
        self.light = LAND_LIGHT[time] if weather != "rainy" else tuple(0.88 * x for x in LAND_LIGHT[time])
        self.image = self._sky()
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self._sky_details()

    def lit(self, colour: Colour, alpha: int = 255) -> tuple[int, ...]:
        """A colour of the land in the light of the hour."""
        tone = [min(255, round(channel * light)) for channel, light in zip(colour, self.light)]
        return (*tone, alpha)

    def snowed(self, colour: Colour, share: float = 0.6) -> Colour:
        """The colour under a thin cover of snow, when it snows."""
        return mix(colour, (240, 244, 250), share) if self.weather == "snowy" else colour

    def _sky(self) -> Image.Image:
        top, low = SKIES[(self.weather, self.time)]
        shift = self.rng.uniform(0.94, 1.06)
        steps = np.clip(np.linspace(0, self.h / self.horizon, self.h), 0, 1)[:, None] ** 0.9
        rows = (np.array(top) * (1 - steps) + np.array(low) * steps) * shift
        rows = np.clip(rows, 0, 255).astype(np.uint8)
        return Image.fromarray(np.repeat(rows[:, None], self.w, axis=1), "RGB")

    def _sky_details(self) -> None:
        rng, u = self.rng, self.unit
        if self.weather == "clear" and self.time == "night":
            for _ in range(70):
                x, y, r = rng.random() * self.w, rng.random() * self.horizon, rng.choice((0.003, 0.004, 0.006)) * u
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 250, 220, rng.randint(150, 255)))
            self._orb(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.2), 0.055, (246, 240, 208))
        elif self.weather == "clear" and self.time == "evening":
            self._orb(rng.uniform(0.15, 0.85), rng.uniform(0.34, 0.42), 0.075, (255, 224, 130))
            self._clouds(3, (255, 196, 160), 150)
        elif self.weather == "clear":
            self._orb(rng.uniform(0.08, 0.92), rng.uniform(0.08, 0.18), 0.06, (255, 240, 170))
            self._clouds(rng.randint(2, 4), (255, 255, 255), 215)
        elif self.weather == "rainy":
            tone = {"day": (92, 102, 118), "evening": (104, 78, 96), "night": (34, 38, 54)}[self.time]
            self._clouds(8, tone, 190, high=0.18)

    def _orb(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """The sun or the moon with its glow."""
        cx, cy = x * self.w, y * self.h
        for grow, alpha in ((2.6, 22), (1.9, 34), (1.4, 60), (1.0, 255)):
            r = radius * grow * self.unit
            self.draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(*colour, alpha))
        if self.time == "night":
            for dx, dy, size in ((-0.3, -0.2, 0.22), (0.25, 0.3, 0.16), (0.3, -0.35, 0.12)):
                r, px, py = size * radius * self.unit, cx + dx * radius * self.unit, cy + dy * radius * self.unit
                self.draw.ellipse((px - r, py - r, px + r, py + r), fill=(214, 208, 180, 255))

    def _clouds(self, count: int, colour: Colour, alpha: int, high: float = 0.3) -> None:
        rng, u = self.rng, self.unit
        layer = Image.new("L", self.image.size, 0)
        pen = ImageDraw.Draw(layer)
        for _ in range(count):
            cx, cy, s = rng.random() * self.w, rng.uniform(0.02, high) * self.h, rng.uniform(0.06, 0.11) * u
            for dx, dy, r in ((-1.1, 0.15, 0.6), (-0.4, -0.15, 0.85), (0.4, -0.05, 0.75), (1.1, 0.2, 0.5)):
                pen.ellipse(
                    (cx + (dx - r) * s, cy + (dy - r * 0.7) * s, cx + (dx + r) * s, cy + (dy + r * 0.7) * s), fill=alpha
                )
            pen.rounded_rectangle((cx - 1.6 * s, cy + 0.1 * s, cx + 1.6 * s, cy + 0.6 * s), radius=0.25 * s, fill=alpha)
        layer = layer.filter(ImageFilter.BoxBlur(max(1, u // 160)))
        self.image.paste(Image.new("RGB", self.image.size, colour), mask=layer)

    def haze(self) -> None:
        """Fog over the land, thickest at the horizon."""
        y = np.arange(self.h) / self.h
        strength = np.clip(0.86 - 1.1 * np.abs(y - self.horizon / self.h), 0.42, 0.8)
        mask = np.repeat((strength * 255).astype(np.uint8)[:, None], self.w, axis=1)
        self.image.paste(Image.new("RGB", self.image.size, FOG[self.time]), mask=Image.fromarray(mask))

    def finish(self) -> None:
        """The weather that falls or drifts in front of everything."""
        rng, u = self.rng, self.unit
        if self.weather == "rainy":
            lean = rng.uniform(-0.35, 0.35)
            alpha = {"day": 170, "evening": 160, "night": 130}[self.time]
            for _ in range(round(95 * self.w * self.h / u**2)):
                x, y, s = rng.uniform(-0.1, 1.1) * self.w, rng.uniform(-0.05, 1) * self.h, rng.uniform(0.05, 0.1) * u
                self.draw.line(
                    [(x, y), (x + lean * s, y + s)], fill=(222, 234, 246, alpha), width=max(1, round(u / 140))
                )
        elif self.weather == "snowy":
            for _ in range(round(110 * self.w * self.h / u**2)):
                x, y, r = rng.random() * self.w, rng.random() * self.h, rng.choice((0.005, 0.007, 0.009, 0.012)) * u
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=(252, 253, 255, 235))
        elif self.weather == "foggy":
            bands = Image.new("L", self.image.size, 46)
            pen = ImageDraw.Draw(bands)
            for _ in range(7):
                x, y = rng.random() * self.w, rng.uniform(0.25, 1.0) * self.h
                pen.ellipse((x - 0.5 * u, y - 0.035 * u, x + 0.5 * u, y + 0.035 * u), fill=104)
            small = bands.resize((max(1, self.w // 8), max(1, self.h // 8))).filter(
                ImageFilter.GaussianBlur(max(1, u / 160))
            )
            self.image.paste(
                Image.new("RGB", self.image.size, FOG[self.time]),
                mask=small.resize(self.image.size, Image.Resampling.BILINEAR),
            )
