"""Writes tests/fixtures/reference: tiny BLIP models of random weights, and what the reference makes of them.

The reference is `BlipForConditionalGeneration` of Hugging Face transformers with `BlipImageProcessorPil`, in f32 on a
CPU. Every model differs from the published sizes in another way, so that nothing can be hard-wired. The weights are
scaled so that a wrong result cannot hide: captions differ between images, end at different lengths, and no choice of a
token is close. The script asserts this of what it writes.

    python -m venv .venv && .venv/bin/pip install -r tests/reference/requirements.txt
    .venv/bin/python tests/reference/make_fixtures.py
"""

import itertools
import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

ROOT = Path(__file__).resolve().parents[1] / "fixtures" / "reference"
TOLERANCE = 1e-3
IMAGES = 6
MAX_NEW_TOKENS = 20
WORDS = """a an the two red green blue dark bright small large round dog cat bird boat tree house river street stream
forest field table cup plate man woman child hat coat with of in on under near behind beside over and is are standing
sitting running looking flying parked old wooden cloudy sunny night it that its not do n't ' . , ! ? ##s ##ing ##ed
##er ##y 're 've 'm""".split()


@dataclass
class Spec:
    """A tiny model, and the prompt that it is asked to continue."""

    name: str
    prompt: str
    vision: dict
    text: dict
    found: tuple  # seed and ending that an earlier search found
    spare_words: int  # tokens of the model beyond the tokenizer's vocabulary; the first of them is [DEC]
    tied: bool = True
    gain: float = 1.7  # of the linear layers
    position_spread: float = 1.0
    even_words: bool = False
    layouts: list = field(default_factory=list)


SPECS = [
    # The proportions of base: equal widths, four times as wide inside, square patches that fill the image.
    Spec(
        name="proportions",
        prompt="a photo of the",
        vision=dict(hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                    image_size=48, patch_size=16),
        text=dict(hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4),
        found=(15, 12.0),
        spare_words=2,
        layouts=["sharded"],
    ),
    # As in large, the encoder is not as wide as the decoder; patches leave a remainder; nothing is a power of two.
    Spec(
        name="widths",
        prompt="two dogs, running",
        vision=dict(hidden_size=60, intermediate_size=91, num_hidden_layers=3, num_attention_heads=5,
                    image_size=53, patch_size=7, layer_norm_eps=1e-6),
        text=dict(hidden_size=36, intermediate_size=77, num_hidden_layers=2, num_attention_heads=3,
                  layer_norm_eps=1e-5),
        found=(10, 12.0),
        spare_words=1,
        tied=False,
        layouts=["pickle"],
    ),
    # Many narrow heads, other depths, and a vocabulary well beyond the tokenizer's.
    Spec(
        name="depths",
        prompt="it is",
        vision=dict(hidden_size=72, intermediate_size=50, num_hidden_layers=5, num_attention_heads=12,
                    image_size=40, patch_size=10),
        text=dict(hidden_size=40, intermediate_size=110, num_hidden_layers=3, num_attention_heads=10,
                  max_position_embeddings=40),
        found=(5, 11.0),
        spare_words=13,
        gain=0.7,
        position_spread=1.5,
        even_words=True,
    ),
]


def vocabulary():
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def text_config(spec):
    """Sizes and special tokens of the language model."""
    words = len(vocabulary())
    common = dict(
        vocab_size=words + spec.spare_words,
        bos_token_id=words,
        eos_token_id=2,
        pad_token_id=0,
        sep_token_id=3,
        max_position_embeddings=64,
    )
    return common | spec.text


def build_model(spec, seed, ending):
    """Random weights whose every part matters; `ending` is added to the score of the end token."""
    text = text_config(spec) | dict(tie_word_embeddings=spec.tied)
    config = BlipConfig(text_config=text, vision_config=spec.vision, tie_word_embeddings=spec.tied)
    config._attn_implementation = "eager"
    model = BlipForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    normal = lambda tensor, std: torch.empty_like(tensor).normal_(0.0, std, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "layer_norm" in name or "LayerNorm" in name or "layernorm" in name
            if norm and name.endswith("weight"):
                parameter.copy_(1.0 + normal(parameter, 0.2))
            elif name.endswith("bias"):
                parameter.copy_(normal(parameter, 0.2))
            elif "text_decoder.bert.embeddings.position" in name:
                # Against the pull of tied embeddings to repeat the latest token.
                parameter.copy_(normal(parameter, spec.position_spread))
            elif "word_embeddings" in name and spec.even_words:
                # All of one length, or the longest would win at every step.
                words = normal(parameter, 1.0)
                parameter.copy_(words / words.norm(dim=1, keepdim=True) * math.sqrt(words.shape[1]))
            elif "embedding" in name:
                parameter.copy_(normal(parameter, 1.0))
            elif "cls.predictions.decoder" in name:
                parameter.copy_(normal(parameter, 1.0))
            else:
                inputs = parameter[0].numel()
                parameter.copy_(normal(parameter, spec.gain / math.sqrt(inputs)))
        model.text_decoder.cls.predictions.bias[3] += ending
        model.text_decoder.cls.predictions.decoder.bias[3] = model.text_decoder.cls.predictions.bias[3]
    return model


def draw_images(size, seed):
    """Blocks of colour, each image another grid of them."""
    random = np.random.default_rng(seed)
    images = []
    for index in range(IMAGES):
        cells = random.integers(0, 256, (2 + index % 3, 2 + index % 3, 3), dtype=np.uint8)
        image = Image.fromarray(cells).resize((size, size), Image.Resampling.NEAREST)
        noise = random.integers(-12, 13, (size, size, 3))
        images.append(np.clip(np.asarray(image, dtype=np.int64) + noise, 0, 255).astype(np.uint8))
    return images


def processor_of(spec, directory):
    (directory / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary())})
    size = spec.vision["image_size"]
    return BlipProcessor(BlipImageProcessorPil(size={"height": size, "width": size}), tokenizer)


def generate(model, processor, pixel_values, prompt, max_new_tokens, min_new_tokens):
    """One greedy caption, and the smallest distance between the best and the second-best token on its way."""
    inputs = dict(pixel_values=pixel_values)
    prompt_tokens = 1
    if prompt is not None:
        encoded = processor(text=prompt, return_tensors="pt")
        inputs |= dict(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
        prompt_tokens = encoded["input_ids"].shape[1] - 1
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    sequence = output.sequences[0].tolist()
    generated = sequence[prompt_tokens:]
    logprobs = [torch.log_softmax(step[0], dim=-1)[token] for step, token in zip(output.logits, generated)]
    margins = [float(top[0] - top[1]) for top in (step[0].topk(2).values for step in output.scores)]
    caption = dict(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sequence=sequence,
        token_ids=generated,
        text=processor.decode(sequence, skip_special_tokens=True),
        logprob=float(sum(logprobs)),
        finish="stop" if generated[-1] == 3 else "length",
    )
    return caption, min(margins)


def caption_all(model, processor, pixels, prompt):
    """Every image without a prompt, with one, and held to other lengths."""
    captions, margins = [], []
    for image in range(IMAGES):
        asked = [(None, MAX_NEW_TOKENS, 0), (prompt, MAX_NEW_TOKENS, 0)]
        asked += [[(None, 5, 0)], [(None, MAX_NEW_TOKENS, 9)], [(prompt, 12, 12)]][image % 3]
        for arguments in asked:
            caption, margin = generate(model, processor, pixels[image : image + 1], *arguments)
            captions.append(dict(image=image) | caption)
            margins.append(margin)
    return captions, min(margins)


def faults(captions, margin):
    """What makes these captions a weak test, if anything."""
    free = [c for c in captions if c["prompt"] is None and (c["max_new_tokens"], c["min_new_tokens"]) == (20, 0)]
    prompted = [c for c in captions if c["prompt"] is not None and c["min_new_tokens"] == 0]
    found = []
    for group in (free, prompted):
        pairs = list(itertools.combinations(group, 2))
        if sum(a["token_ids"] != b["token_ids"] for a, b in pairs) < 0.8 * len(pairs):
            found.append("too many images have the same caption")
    if len({len(c["token_ids"]) for c in free}) < 3:
        found.append("captions end at too few lengths")
    if not {"stop", "length"} <= {c["finish"] for c in captions}:
        found.append("captions end in one way only")
    if min(len(c["token_ids"]) for c in free) < 3:
        found.append("a caption is very short")
    if sum(len(set(c["token_ids"])) for c in free) < 5 * len(free):
        found.append("captions repeat themselves")
    if margin <= 10 * TOLERANCE:
        found.append("a choice of a token is too close")
    return found


def write_layouts(spec, model, directory):
    """The same weights in the other layouts in which models are published."""
    config = (directory / "config.json").read_bytes()
    if "sharded" in spec.layouts:
        sharded = directory.with_name(f"{spec.name}-sharded")
        sharded.mkdir()
        model.save_pretrained(sharded, max_shard_size="250KB")
        assert (sharded / "model.safetensors.index.json").exists()
        (sharded / "generation_config.json").unlink(missing_ok=True)
    if "pickle" in spec.layouts:
        pickle = directory.with_name(f"{spec.name}-pickle")
        pickle.mkdir()
        (pickle / "config.json").write_bytes(config)
        state = model.state_dict()
        # Published files carry this buffer.
        count = model.config.text_config.max_position_embeddings
        state["text_decoder.bert.embeddings.position_ids"] = torch.arange(count).expand((1, -1))
        torch.save(state, pickle / "pytorch_model.bin")


def write(spec, model, processor, images, pixels, captions):
    directory = ROOT / spec.name
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    processor.tokenizer.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)
    assert (directory / "tokenizer.json").exists() and (directory / "preprocessor_config.json").exists()
    tensors = dict(images=torch.from_numpy(np.stack(images)))
    with torch.no_grad():
        tensors["hidden_states"] = model.vision_model(pixels).last_hidden_state
        for image in range(2):
            whole = max((c for c in captions if c["image"] == image), key=lambda c: len(c["sequence"]))
            ids = torch.tensor([whole["sequence"]])
            logits = model(pixel_values=pixels[image : image + 1], input_ids=ids).logits[0]
            tensors[f"forced_ids.{image}"] = ids[0].to(torch.int64)
            tensors[f"logits.{image}"] = logits
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "expected.safetensors")
    # An untied head has a second bias, which the model does not use.
    unused = "" if spec.tied else "text_decoder.cls.predictions.bias"
    parameters = sum(p.numel() for name, p in model.named_parameters() if name != unused)
    expected = dict(parameters=parameters, captions=captions)
    (directory / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    write_layouts(spec, model, directory)


def make(spec):
    directory = ROOT / spec.name
    directory.mkdir(parents=True)
    processor = processor_of(spec, directory)
    for seed, ending in itertools.chain([spec.found], itertools.product(range(200), (6.0, 9.0, 11.0, 13.0))):
        model = build_model(spec, seed, ending)
        images = draw_images(spec.vision["image_size"], seed)
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        captions, margin = caption_all(model, processor, pixels, spec.prompt)
        found = faults(captions, margin)
        if not found:
            break
        print(f"{spec.name}: seed {seed}, ending {ending}: {found[0]}", file=sys.stderr)
    assert not found, f"{spec.name}: no seed gives a strong test"
    write(spec, model, processor, images, pixels, captions)
    print(f"{spec.name}: seed {seed}, ending {ending}, smallest margin {margin:.4f}")
    for caption in captions:
        print(f"  {caption['image']} {len(caption['token_ids']):2} {caption['finish']:6} {caption['text']}")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shutil.rmtree(ROOT, ignore_errors=True)
    for spec in SPECS:
        make(spec)
    size = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB")
    assert size < 4e6


if __name__ == "__main__":
    main()
