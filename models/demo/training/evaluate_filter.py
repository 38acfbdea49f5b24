"""Judges the evaluation pairs with Hugging Face's own classes: `python evaluate_filter.py --model WHOLE`.

`WHOLE` is what `export_filter.py --whole` has written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import BlipForImageTextRetrieval, BlipProcessor

SCENES = Path(__file__).resolve().parents[3] / "tests/fixtures/scenes"


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = BlipProcessor.from_pretrained(options.model)
    model = BlipForImageTextRetrieval.from_pretrained(options.model).eval()
    pairs = json.loads((SCENES / "pairs.json").read_text())
    right = {"right": 0, "wrong": 0}
    for entry in pairs:
        image = Image.open(SCENES / entry["file"])
        for kind in right:
            inputs = processor(images=image, text=entry[kind], return_tensors="pt")
            scores = model(**inputs, use_itm_head=True).itm_score[0]
            judged = "right" if scores[1] > scores[0] else "wrong"
            right[kind] += judged == kind
            if judged != kind:
                print(f"{entry['file']}: {entry[kind]!r} is {kind} ({scores.softmax(0)[1]:.3f})")
    print(f"{sum(right.values())} of {2 * len(pairs)} judged right: {right}")


if __name__ == "__main__":
    main()
