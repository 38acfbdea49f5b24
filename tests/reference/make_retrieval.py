"""Writes tests/fixtures/retrieval: tiny models of random weights that judge images and texts, and the reference's judgement.

The reference is `BlipForImageTextRetrieval` of Hugging Face transformers with `BlipProcessor`, in f32 on a CPU. The images
are those of the captioners of `make_fixtures.py`, redrawn for each size; the texts are of many lengths, so that a wrong mask
or position shows. The script asserts that scores depend on both image and text.

    .venv/bin/python tests/reference/make_retrieval.py
"""

import json
import math
import shutil

import numpy as np
import torch
from make_fixtures import ROOT as CAPTIONERS
from make_fixtures import SPECS, draw_images, processor_of, text_config
from safetensors.torch import save_file
from transformers import BlipConfig, BlipForImageTextRetrieval

ROOT = CAPTIONERS.with_name("retrieval")
SHARED = dict(proportions=24, widths=17, depths=40)
TEXTS = [
    "a dog",
    "two red birds under a tree",
    "the small round cat is standing near the house, and it is looking at the river",
    "boat",
    "it's not a dog; a cat is running!",
    "a dark street in the night behind the old wooden house",
    "a man and a woman with a green hat sitting on a table",
    "the green hat is on the table with a cup and a plate, over the field of the forest",
    "Two Dogs Running",
    "zebra",
]


def build_model(spec, seed):
    config = BlipConfig(
        text_config=text_config(spec), vision_config=spec.vision, image_text_hidden_size=SHARED[spec.name]
    )
    config._attn_implementation = "eager"
    model = BlipForImageTextRetrieval(config).eval()
    generator = torch.Generator().manual_seed(seed)
    normal = lambda tensor, std: torch.empty_like(tensor).normal_(0.0, std, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1.0 + normal(parameter, 0.2))
            elif name.endswith("bias"):
                parameter.copy_(normal(parameter, 0.2))
            elif "embedding" in name:
                parameter.copy_(normal(parameter, 1.0))
            else:
                parameter.copy_(normal(parameter, 1.7 / math.sqrt(parameter[0].numel())))
    return model


@torch.no_grad()
def judge(model, processor, pixels):
    pairs, text_embeddings = [], []
    image_embeddings = None
    for text in TEXTS:
        encoded = processor(text=text, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        count = len(pixels)
        asked = dict(input_ids=ids.expand(count, -1), attention_mask=mask.expand(count, -1), pixel_values=pixels)
        matching = model(**asked, use_itm_head=True).itm_score
        contrast = model(**asked, use_itm_head=False).itm_score
        for image in range(count):
            pairs.append(
                dict(image=image, text=text, itm=matching[image].tolist(), itc=float(contrast[image, image]))
            )
        hidden = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        text_embeddings.append(torch.nn.functional.normalize(model.text_proj(hidden), dim=-1)[0].tolist())
    hidden = model.vision_model(pixels).last_hidden_state[:, 0]
    image_embeddings = torch.nn.functional.normalize(model.vision_proj(hidden), dim=-1).tolist()
    return dict(texts=TEXTS, pairs=pairs, image_embeddings=image_embeddings, text_embeddings=text_embeddings)


def check(name, expected):
    margin = {(p["image"], p["text"]): p["itm"][1] - p["itm"][0] for p in expected["pairs"]}
    images = {p["image"] for p in expected["pairs"]}
    over_texts = np.mean([np.std([margin[i, t] for t in TEXTS]) for i in images])
    over_images = np.mean([np.std([margin[i, t] for i in images]) for t in TEXTS])
    contrast = np.std([p["itc"] for p in expected["pairs"]])
    print(f"{name}: spread over texts {over_texts:.3f}, over images {over_images:.3f}, of contrast {contrast:.3f}")
    assert min(over_texts, over_images, contrast) > 0.02


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shutil.rmtree(ROOT, ignore_errors=True)
    for number, spec in enumerate(SPECS):
        directory = ROOT / spec.name
        directory.mkdir(parents=True)
        processor = processor_of(spec, directory)
        model = build_model(spec, 100 + number)
        images = draw_images(spec.vision["image_size"], 100 + number)
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        expected = judge(model, processor, pixels)
        check(spec.name, expected)
        model.save_pretrained(directory)
        processor.tokenizer.save_pretrained(directory)
        processor.image_processor.save_pretrained(directory)
        expected["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        save_file(dict(images=torch.from_numpy(np.stack(images))), directory / "expected.safetensors")
        (directory / "expected.json").write_text(json.dumps(expected) + "\n")
    size = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB")
    assert size < 3e6


if __name__ == "__main__":
    main()
