"""Draws the evaluation scenes and the demo images; all of combinations training never sees.

python make_images.py scenes ../../../tests/fixtures/scenes
python make_images.py sheet ../../../tests/fixtures/scenes
python make_images.py demo ../images
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from grammar import Group, Scene, is_reserved, sample_scene
from scenes import Picture, render, to_array

SCENES = 200
SCENES_SEED = 9_000_000
FILE_LIMIT = 118_000
# Of the sheet: columns and rows of scenes, and the side of one, which is the model's.
SHEET = (20, 15)
SHEET_SEED = 9_500_000
SIDE = 112

# File, width, height, groups, place, weather, time, seed.
DEMO = [
    ("harbour-night.jpg", 1280, 960, "2 purple boat", "sea", "clear", "night", 1),
    ("beach-morning.png", 640, 480, "1 yellow umbrella, 1 green car", "sea", "clear", "day", 2),
    ("coast-road.webp", 960, 540, "1 red house, 2 orange tree", "sea", "rainy", "day", 3),
    ("shore-camp.jpg", 800, 600, "1 white tent, 1 red cat", "sea", "clear", "evening", 4),
    ("over-the-bay.webp", 720, 720, "3 blue balloon", "sea", "clear", "evening", 5),
    ("winter-pier.jpg", 1024, 768, "1 purple boat, 1 green bird", "sea", "snowy", "evening", 6),
    ("farm-noon.jpg", 1200, 900, "1 blue house, 1 purple tree", "meadow", "clear", "day", 7),
    ("picnic.webp", 640, 360, "1 white umbrella, 1 red car", "meadow", "clear", "day", 8),
    ("meadow-walk.png", 480, 640, "1 purple kite", "meadow", "foggy", "day", 9),
    ("garden-gate.jpg", 900, 675, "3 yellow flower, 1 blue cat", "meadow", "rainy", "day", 10),
    ("fairground.jpg", 1280, 800, "2 orange balloon, 1 green tent", "meadow", "clear", "evening", 11),
    ("starlit-field.webp", 960, 720, "2 red bird", "meadow", "clear", "night", 12),
    ("caravan-stop.jpg", 1280, 720, "1 red tent, 1 blue car", "desert", "clear", "day", 13),
    ("dunes.webp", 768, 576, "1 orange cat, 1 green umbrella", "desert", "clear", "evening", 14),
    ("oasis.png", 400, 300, "1 white boat, 2 yellow tree", "desert", "clear", "day", 15),
    ("desert-sky.jpg", 1000, 750, "1 purple balloon, 1 orange house", "desert", "clear", "night", 16),
    ("desert-haze.webp", 640, 480, "1 blue bird, 1 yellow kite", "desert", "foggy", "evening", 17),
    ("alpine-hut.jpg", 1120, 840, "1 purple house, 1 white tree", "mountains", "snowy", "day", 18),
    ("base-camp.webp", 1280, 854, "3 blue tent", "mountains", "clear", "night", 19),
    ("pass-road.jpg", 960, 640, "1 orange car, 1 red umbrella", "mountains", "snowy", "evening", 20),
    ("summit-flight.jpg", 600, 800, "1 yellow balloon", "mountains", "clear", "day", 21),
    ("market-square.jpg", 1280, 960, "2 blue umbrella, 1 red flower", "town", "rainy", "day", 22),
    ("quiet-street.png", 320, 240, "1 yellow house, 1 green tree", "town", "clear", "day", 23),
    ("night-drive.jpg", 1200, 800, "2 purple car", "town", "rainy", "night", 24),
    ("rooftops.webp", 800, 500, "1 white balloon, 1 yellow cat", "town", "clear", "evening", 25),
    ("cabin.jpg", 1024, 683, "1 white house, 1 red tree", "forest", "snowy", "night", 26),
    ("forest-edge.webp", 640, 640, "1 yellow bird, 2 blue flower", "forest", "foggy", "day", 27),
    ("lost-thing.png", 240, 180, "1 orange umbrella, 1 white cat", "forest", "clear", "day", 28),
]


def save(image: Image.Image, path: Path, quality: int) -> None:
    """Write a picture, as small as the file limit demands."""
    if path.suffix == ".png":
        image.save(path, optimize=True)
        if path.stat().st_size > FILE_LIMIT:
            image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    while path.suffix != ".png":
        options = {"method": 6} if path.suffix == ".webp" else {"optimize": True}
        image.save(path, quality=quality, **options)
        if path.stat().st_size <= FILE_LIMIT:
            break
        quality -= 3
    assert path.stat().st_size <= FILE_LIMIT, path


def check(scene: Scene) -> None:
    """Every group must be of a reserved combination."""
    for group in scene.groups:
        assert is_reserved(group.kind, group.colour, scene.place), (group, scene.place)


def draw(seed: int) -> tuple[Scene, Picture]:
    """A small picture of a reserved scene."""
    rng = random.Random(seed)
    ratio = rng.uniform(0.75, 1.78)
    scene = sample_scene(rng, reserved=True, wide=ratio >= 1)
    check(scene)
    side = rng.randint(128, 160)
    size = (side, round(side / ratio)) if ratio >= 1 else (round(side * ratio), side)
    return scene, render(scene, rng.getrandbits(48), size, finer=4)


def make_sheet(out: Path) -> None:
    """Further scenes as the model sees them, row by row on one sheet: `sheet.jpg` and `sheet.json`, their captions."""
    columns, rows = SHEET
    sheet = Image.new("RGB", (columns * SIDE, rows * SIDE))
    captions = []
    for number in range(columns * rows):
        scene, picture = draw(SHEET_SEED + number)
        tile = Image.fromarray(to_array(picture, SIDE))
        sheet.paste(tile, (number % columns * SIDE, number // columns * SIDE))
        captions.append(scene.caption())
    sheet.save(out / "sheet.jpg", quality=92, optimize=True)
    (out / "sheet.json").write_text(json.dumps(captions, indent=0) + "\n")


def make_scenes(out: Path) -> None:
    """The evaluation scenes: small pictures and `scenes.jsonl`."""
    lines, formats = [], ("png", "webp", "jpg")
    for number in range(SCENES):
        scene, picture = draw(SCENES_SEED + number)
        name = f"scene-{number:03}.{formats[number % 3 if number % 5 else 1]}"
        save(picture.image, out / name, quality=92)
        lines.append(json.dumps({"file": name, "caption": scene.caption()}))
    (out / "scenes.jsonl").write_text("\n".join(lines) + "\n")


def make_demo(out: Path) -> None:
    """The demo images and `captions.json`."""
    captions = {}
    for name, width, height, things, place, weather, time, seed in DEMO:
        words = [group.split() for group in things.split(", ")]
        groups = tuple(Group(int(count), kind, colour) for count, colour, kind in words)
        scene = Scene(groups, place, weather, time)
        check(scene)
        picture = render(scene, seed, (width, height), finer=3)
        save(picture.image, out / name, quality=88)
        captions[name] = scene.caption()
    (out / "captions.json").write_text(json.dumps(captions, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scenes", "sheet", "demo"))
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    {"scenes": make_scenes, "sheet": make_sheet, "demo": make_demo}[options.what](options.out)


if __name__ == "__main__":
    main()
