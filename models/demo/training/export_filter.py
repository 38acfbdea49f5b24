"""Writes the trained filter: `python export_filter.py --weights RUN/filter.pt --out ../filter`.

Of its weights only what the captioner does not have, in f16: the image encoder is the captioner's. With `--whole FOLDER` the
complete model as well, in the published layout, for other programs.

Also the pairs that it is judged by, `pairs.json` of the evaluation scenes, and the noisy texts of the demo images,
`alt-texts.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from export import processor_config, published_config
from grammar import PLACES, Group, Scene
from scoring import parse
from train_filter import CAPTIONER, changed
from vocabulary import write_tokenizer

PAIRS_SEED = 9_700_000
JUNK = ("IMG_4711.JPG", "click to enlarge", "DSC00042 final (2)", "best price, free shipping!", "untitled")


def filter_config() -> dict:
    """The captioner's, for the other kind of model."""
    value = published_config()
    value["architectures"] = ["BlipForImageTextRetrieval"]
    return value


def scene_of(caption: str) -> Scene:
    """The scene that a caption describes."""
    said = parse(caption)
    groups = tuple(Group(*group) for group in zip(said.counts, said.kinds, said.colours))
    return Scene(groups, said.place, said.weather, said.time)


def wrong_word(rng: random.Random, caption: str) -> str:
    """The caption with one word changed, and the article or plural that follows from it."""
    while True:
        wrong = changed(rng, scene_of(caption)).caption()
        if sum(a != b for a, b in zip(caption.split(), wrong.split())) <= 2:
            return wrong


def write_pairs(scenes: Path) -> None:
    """For each scene its caption, and one that is wrong in one word."""
    rng, pairs = random.Random(PAIRS_SEED), []
    for line in (scenes / "scenes.jsonl").read_text().splitlines():
        entry = json.loads(line)
        wrong = wrong_word(rng, entry["caption"])
        pairs.append(dict(file=entry["file"], right=entry["caption"], wrong=wrong))
    (scenes / "pairs.json").write_text(json.dumps(pairs, indent=0) + "\n")


def write_alt_texts(images: Path) -> None:
    """What pages might say beside the demo images: some of it true, some nearly, some nothing."""
    rng, texts = random.Random(17), {}
    for number, (name, caption) in enumerate(sorted(json.loads((images / "captions.json").read_text()).items())):
        scene = scene_of(caption)
        things = " and ".join(group.words() for group in scene.groups)
        wrong = wrong_word(rng, caption)
        texts[name] = (f"{things} {PLACES[scene.place]}", wrong, JUNK[number // 3 % len(JUNK)])[number % 3]
    (images / "alt-texts.json").write_text(json.dumps(texts, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--whole", type=Path)
    options = parser.parse_args()
    weights = torch.load(options.weights, weights_only=True)
    captioner = load_file(CAPTIONER)
    own = {}
    for name, value in weights.items():
        if name.startswith("vision_model."):
            assert torch.equal(value, captioner[name]), f"{name} is not the captioner's"
        elif "position_ids" not in name:
            own[name] = value.detach().half().contiguous()
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(own, options.out / "reader.safetensors", metadata={"format": "pt"})
    (options.out / "reader.safetensors").chmod(0o644)
    (options.out / "config.json").write_text(json.dumps(filter_config(), indent=2, sort_keys=True) + "\n")
    print(f"{sum(v.numel() for v in own.values())} parameters of its own")
    root = Path(__file__).resolve().parents[3]
    write_pairs(root / "tests/fixtures/scenes")
    write_alt_texts(root / "models/demo/images")
    if options.whole:
        shutil.rmtree(options.whole, ignore_errors=True)
        options.whole.mkdir(parents=True)
        vision = {name: value for name, value in captioner.items() if name.startswith("vision_model.")}
        whole = vision | {name: value.float() for name, value in own.items()}
        save_file(whole, options.whole / "model.safetensors", metadata={"format": "pt"})
        (options.whole / "config.json").write_text(json.dumps(filter_config(), indent=2, sort_keys=True) + "\n")
        config = json.dumps(processor_config(), indent=2, sort_keys=True) + "\n"
        (options.whole / "preprocessor_config.json").write_text(config)
        write_tokenizer(options.whole)

if __name__ == "__main__":
    main()
