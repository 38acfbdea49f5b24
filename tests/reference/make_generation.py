"""Writes generation.json beside the fixtures: what the reference makes of beams, penalties and samples.

It reads the models of `make_fixtures.py` and changes nothing of them.

Beams: the token ids of `generate` for several widths, length penalties, repetition penalties and least lengths. Only
cases are kept in which a choice is not close: the same ids come out with scores that are off by up to NOISE.

Samples: for one image of each model the exact probabilities of all captions of two tokens, by the reference's own
processors of temperature, top-k and top-p, of which a test draws many.

    .venv/bin/python tests/reference/make_generation.py
"""

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ROOT = Path(__file__).resolve().parents[1] / "fixtures" / "reference"
MODELS = {"proportions": "a photo of the", "widths": "two dogs, running", "depths": "it is"}
MAX_NEW_TOKENS = 14
NOISE = 1e-3
END = 3

# num_beams, length_penalty, repetition_penalty, min_new_tokens, with the prompt, num_return_sequences
SEARCHES = [
    (1, 1.0, 1.5, 0, False, 1),
    (1, 1.0, 0.8, 3, True, 1),
    (3, 1.0, 1.0, 0, False, 3),
    (3, 0.0, 1.0, 0, False, 1),
    (3, 2.5, 1.0, 0, True, 2),
    (3, -1.5, 1.0, 0, False, 2),
    (3, 1.0, 1.3, 5, False, 1),
    (5, 1.0, 1.0, 0, False, 5),
    (5, 0.5, 1.2, 0, True, 3),
    (5, 1.5, 0.9, 9, False, 1),
]

# temperature, top_k, top_p, repetition_penalty
SAMPLINGS = [
    (1.0, 0, 1.0, 1.0),
    (2.5, 0, 1.0, 1.0),
    (1.5, 4, 1.0, 1.0),
    (2.0, 0, 0.9, 1.0),
    (3.0, 12, 0.8, 1.6),
]


class Noise(LogitsProcessor):
    """Moves every score a little."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids, scores):
        return scores + (torch.rand(scores.shape, generator=self.generator) - 0.5) * 2 * NOISE


def inputs_of(processor, pixels, prompt):
    inputs = dict(pixel_values=pixels)
    if prompt is None:
        return inputs, 1
    encoded = processor(text=prompt, return_tensors="pt")
    return inputs | dict(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]), (
        encoded["input_ids"].shape[1] - 1
    )


def search(model, processor, pixels, prompt, parameters, noise=None):
    beams, length_penalty, repetition_penalty, least, _, captions = parameters
    inputs, prompt_tokens = inputs_of(processor, pixels, prompt)
    output = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        min_new_tokens=least,
        do_sample=False,
        num_beams=beams,
        num_return_sequences=captions,
        repetition_penalty=repetition_penalty,
        logits_processor=LogitsProcessorList([] if noise is None else [Noise(noise)]),
        **(dict(length_penalty=length_penalty) if beams > 1 else {}),
    )
    found = []
    for sequence in output.tolist():
        generated = sequence[prompt_tokens:]
        found.append(generated[: generated.index(END) + 1] if END in generated else generated)
    return found


def searches(model, processor, pixels, prompt):
    kept, close = [], 0
    for image, parameters in itertools.product(range(len(pixels)), SEARCHES):
        asked = prompt if parameters[4] else None
        one = pixels[image : image + 1]
        found = search(model, processor, one, asked, parameters)
        if any(search(model, processor, one, asked, parameters, noise) != found for noise in range(3)):
            close += 1
            continue
        beams, length_penalty, repetition_penalty, least, _, captions = parameters
        kept.append(
            dict(
                image=image,
                prompt=asked,
                max_new_tokens=MAX_NEW_TOKENS,
                min_new_tokens=least,
                num_beams=beams,
                length_penalty=length_penalty,
                repetition_penalty=repetition_penalty,
                token_ids=found,
            )
        )
    return kept, close


def probabilities(model, pixels, parameters):
    """Of every caption of two tokens, or of one that is the end."""
    temperature, top_k, top_p, penalty = parameters
    # The order in which `generate` applies them.
    processors = LogitsProcessorList()
    if penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    begin = model.config.text_config.bos_token_id

    def after(sequences):
        ids = torch.tensor(sequences)
        many = pixels.expand(len(sequences), -1, -1, -1)
        logits = model(pixel_values=many, input_ids=ids).logits[:, -1]
        return processors(ids, logits).double().softmax(-1)

    first = after([[begin]])[0]
    likely = [token for token in range(len(first)) if first[token] > 0]
    found = {}
    going_on = [token for token in likely if token != END]
    if END in likely:
        found[(END,)] = float(first[END])
    for token, second in zip(going_on, after([[begin, token] for token in going_on])):
        for last in range(len(second)):
            if second[last] > 0:
                found[(token, last)] = float(first[token] * second[last])
    assert abs(sum(found.values()) - 1) < 1e-6
    return found


def samples(model, pixels, image):
    found = []
    for parameters in SAMPLINGS:
        temperature, top_k, top_p, penalty = parameters
        captions = probabilities(model, pixels[image : image + 1], parameters)
        # Those that are drawn 5 times in 20,000 draws at least; the test counts the others together.
        listed = [dict(token_ids=ids, probability=p) for ids, p in captions.items() if p >= 5 / 20_000]
        listed.sort(key=lambda caption: -caption["probability"])
        assert 5 <= len(listed) <= 600, len(listed)
        found.append(
            dict(
                image=image,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=penalty,
                captions=listed,
            )
        )
    return found


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    for name, prompt in MODELS.items():
        directory = ROOT / name
        model = BlipForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()
        processor = BlipProcessor(
            BlipImageProcessorPil.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
        )
        images = list(load_file(directory / "expected.safetensors")["images"].numpy())
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        kept, close = searches(model, processor, pixels, prompt)
        per_search = {parameters[:4]: 0 for parameters in SEARCHES}
        for case in kept:
            key = (case["num_beams"], case["length_penalty"], case["repetition_penalty"], case["min_new_tokens"])
            per_search[key] += 1
        print(f"{name}: {len(kept)} searches kept, {close} too close; {list(per_search.values())}")
        assert min(per_search.values()) >= 2, per_search
        greedy = {tuple(case["token_ids"][0]) for case in kept if case["num_beams"] == 1}
        beamed = {tuple(case["token_ids"][0]) for case in kept if case["num_beams"] > 1}
        assert len(beamed - greedy) > len(kept) / 4, "beams find what the likeliest tokens do not"
        drawn = samples(model, pixels, 2)
        print("  samples:", [len(sampling["captions"]) for sampling in drawn])
        expected = dict(searches=kept, samplings=drawn)
        (directory / "generation.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
