"""The preprocessing in Pillow: open, convert to RGB, stretch with the bicubic filter. Beside
`blipstream bench preprocessing`, whose fields it prints as far as `compare.py` reads them.

    pillow.py SECONDS SIDE FILE ...     measures; prints one JSON object
    pillow.py --make DIR                writes photographs of several sizes and prints their names
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from PIL import Image

SIZES = [(640, 427), (1024, 683), (2048, 1365), (4000, 3000)]


# How fast the detail of a photograph falls off with its fineness, and the quality it is saved with: many fine details,
# as in published collections, and few.
KINDS = {"detailed": (1.1, 85), "smooth": (1.6, 75)}


def make(folder):
    """Pictures with the spectrum of photographs."""
    import numpy as np

    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for (kind, (slope, quality)), (width, height) in itertools.product(KINDS.items(), SIZES):
        file = folder / f"{kind}-{width}x{height}.jpg"
        fineness = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        fineness = np.maximum(fineness, 1 / max(width, height)) ** slope

        def layer():
            waves = random.normal(size=fineness.shape) + 1j * random.normal(size=fineness.shape)
            values = np.fft.irfft2(waves / fineness, s=(height, width))
            return values / values.std()

        light = layer()
        channels = [(light + layer() / 2) * 45 + 118 for _ in range(3)]
        Image.fromarray(np.stack(channels, -1).clip(0, 255).astype("uint8")).save(file, quality=quality)
        print(file)


def measure(file, side, seconds):
    times = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        image = Image.open(file).convert("RGB")
        decoded = time.perf_counter()
        image.resize((side, side), Image.BICUBIC)
        end = time.perf_counter()
        times.append((decoded - start, end - decoded, end - start))
    decode, resize, both = (1e3 * statistics.median(column) for column in zip(*times))
    return {"name": str(file), "width": image.width, "height": image.height, "decode": decode, "resize": resize, "both": both}


def main():
    if sys.argv[1] == "--make":
        return make(Path(sys.argv[2]))
    seconds, side, *files = sys.argv[1:]
    images = [measure(Path(file), int(side), float(seconds)) for file in files]
    print(json.dumps({"images": images}))


if __name__ == "__main__":
    main()
