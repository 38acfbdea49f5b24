"""Captions a folder of pictures with the exported model and scores it.

    python evaluate.py --model .. --scenes ../../../tests/fixtures/scenes/scenes.jsonl
    python evaluate.py --model .. --scenes ../images/captions.json

Everything goes through Hugging Face's own processor and `generate`, file by file.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

from grammar import sample_scene
from scoring import majority, score


def read_scenes(path: Path) -> list[tuple[str, str]]:
    """File names and true captions, from `scenes.jsonl` or `captions.json`."""
    if path.suffix == ".json":
        return list(json.loads(path.read_text()).items())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["file"], line["caption"]) for line in lines]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = BlipProcessor.from_pretrained(options.model)
    model = BlipForConditionalGeneration.from_pretrained(options.model).eval()
    scenes = read_scenes(options.scenes)
    captions = []
    for file, truth in scenes:
        image = Image.open(options.scenes.parent / file)
        inputs = processor(images=image, return_tensors="pt")
        ids = model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=24)
        captions.append(processor.decode(ids[0], skip_special_tokens=True))
        if captions[-1] != truth:
            print(f"{file}: {captions[-1]!r} for {truth!r}")
    truth = [caption for _, caption in scenes]
    rng = random.Random(0)
    trained = [sample_scene(rng, reserved=False).caption() for _ in range(20_000)]
    print("model              ", json.dumps(score(captions, truth)))
    print("most frequent here ", json.dumps(majority(truth, truth)))
    print("most frequent seen ", json.dumps(majority(truth, trained)))


if __name__ == "__main__":
    main()
