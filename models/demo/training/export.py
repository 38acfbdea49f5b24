"""Writes trained weights in the published layout: `python export.py --weights RUN/model.pt --out ..`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BlipForConditionalGeneration

from dataset import SIDE
from model import config
from train import MEAN, STD
from vocabulary import write_tokenizer

# What transformers adds to every configuration and BLIP has no use for.
UNUSED = (
    "_name_or_path",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
)


def published_config() -> dict:
    """config.json with every field spelt out, as the published files have it."""
    own = config()
    value = own.to_dict()
    value["text_config"] = own.text_config.to_dict()
    value["vision_config"] = own.vision_config.to_dict()
    for part in (value["text_config"], value["vision_config"]):
        part.pop("architectures", None)
    value["architectures"] = ["BlipForConditionalGeneration"]
    value["torch_dtype"] = "float32"
    for part in (value, value["text_config"], value["vision_config"]):
        for name in UNUSED:
            part.pop(name, None)
    return value


def processor_config() -> dict:
    """preprocessor_config.json of a `BlipImageProcessor` that stretches to a square."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "BlipImageProcessor",
        "image_std": list(STD),
        "processor_class": "BlipProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }


def export(weights: Path, out: Path) -> None:
    """Write the model folder."""
    out.mkdir(parents=True, exist_ok=True)
    model = BlipForConditionalGeneration(config())
    model.load_state_dict(torch.load(weights, weights_only=True))
    # The output layer shares its weights with the word embeddings; readers expect both names.
    tensors = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    for name, value in (("config.json", published_config()), ("preprocessor_config.json", processor_config())):
        (out / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    write_tokenizer(out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count} parameters, {(out / 'model.safetensors').stat().st_size} bytes")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    export(options.weights, options.out)


if __name__ == "__main__":
    main()
