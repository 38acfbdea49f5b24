"""Renders the training and validation sets once, as arrays of the model's own size."""

from __future__ import annotations

import io
import random
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

from grammar import COLOURS, KINDS, PLACES, TIMES, WEATHERS, sample_scene
from scenes import render
from vocabulary import CAPTION_LENGTH, encode

SIDE = 112
LABEL_SIDE = 56
ATTRIBUTES = ("place", "weather", "time", "first_count", "second_count")
VALIDATION_SEED = 5_000_000
EXAMPLE_FIELDS = ("images", "labels", "centres", "groups", "facts", "ids")


def random_size(rng: random.Random, wide: bool) -> tuple[int, int]:
    """A picture size as cameras and screens have them; `wide` is landscape or square."""
    ratio = rng.uniform(1.0, 1.8) if wide else rng.uniform(0.72, 1.0)
    area = rng.uniform(200, 290) ** 2
    return round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)


def make_example(seed: int, reserved: bool) -> tuple[np.ndarray, ...]:
    """One scene as the model sees it, with everything the training is told about it."""
    rng = random.Random(seed)
    wide = rng.random() < 0.8
    scene = sample_scene(rng, reserved, wide)
    picture = render(scene, rng.getrandbits(48), random_size(rng, wide), finer=1)
    image = picture.image
    if rng.random() < 0.4:  # as a small file
        share = rng.uniform(120, 200) / max(image.size)
        size = (round(image.width * share), round(image.height * share))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if rng.random() < 0.4:  # as a JPEG file
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(72, 95))
        image = Image.open(buffer)
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    labels = picture.labels.resize((LABEL_SIDE, LABEL_SIDE), Image.Resampling.NEAREST)
    centres = np.full((4, 3), -1, dtype=np.float32)
    centres[: len(picture.centres)] = picture.centres
    groups = np.zeros((3, 2), dtype=np.int64)  # by label: kind and colour, 0 for the background
    for i, group in enumerate(scene.groups):
        groups[i + 1] = 1 + KINDS.index(group.kind), 1 + COLOURS.index(group.colour)
    counts = [group.count for group in scene.groups] + [0]
    facts = np.array(
        [
            list(PLACES).index(scene.place),
            WEATHERS.index(scene.weather),
            TIMES.index(scene.time),
            counts[0],
            counts[1],
        ],
        dtype=np.int64,
    )
    ids = np.array(encode(scene.caption()), dtype=np.int64)
    return np.asarray(image), np.asarray(labels), centres, groups, facts, ids


def _training_example(seed: int) -> tuple[np.ndarray, ...]:
    return make_example(seed, reserved=False)


def _validation_example(seed: int) -> tuple[np.ndarray, ...]:
    return make_example(VALIDATION_SEED + seed, reserved=True)


def load_or_render(cache: Path, count: int, reserved: bool, workers: int) -> dict[str, np.ndarray]:
    """The set of `count` examples, from the cache if it was rendered before."""
    folder = cache / f"{'validation' if reserved else 'training'}-{count}"
    if not folder.exists():
        shapes = {
            "images": ((count, SIDE, SIDE, 3), np.uint8),
            "labels": ((count, LABEL_SIDE, LABEL_SIDE), np.uint8),
            "centres": ((count, 4, 3), np.float32),
            "groups": ((count, 3, 2), np.int64),
            "facts": ((count, len(ATTRIBUTES)), np.int64),
            "ids": ((count, CAPTION_LENGTH), np.int64),
        }
        arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        work = _validation_example if reserved else _training_example
        with Pool(workers) as pool:
            for i, example in enumerate(pool.imap(work, range(count), chunksize=64)):
                for name, value in zip(EXAMPLE_FIELDS, example):
                    arrays[name][i] = value
        partial = folder.with_suffix(".part")
        partial.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        partial.rename(folder)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in EXAMPLE_FIELDS}
