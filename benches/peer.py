"""Captions batches with Hugging Face transformers, and prints what it took as one JSON object.

    peer.py MODEL {f32,bf16,f16} [--device cuda] [--compile] [--batch 1,4,8] [--tokens 20] [--seconds 8]
    peer.py MODEL --make        writes a model of base's sizes with random weights
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import BlipConfig, BlipForConditionalGeneration

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# A batch that would take longer than so many times the time to measure is left out.
TOO_LONG = 6


def make(folder):
    """Random weights and numbered words: what is captioned does not matter to the time."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # The published base model has 12 heads, the default of the class 8.
    model = BlipForConditionalGeneration(BlipConfig(text_config={"num_attention_heads": 12}))
    model.save_pretrained(folder)
    size = model.config.text_config.vocab_size
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(special + [f"w{n}" for n in range(size - len(special))]) + "\n")


def wait(device):
    """Until the device has done what it was given; calls return before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Seconds spent in a module's forward."""

    def __init__(self, module, device):
        self.seconds = 0.0
        forward = module.forward

        def timed(*args, **kwargs):
            wait(device)
            begun = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                wait(device)
                self.seconds += time.perf_counter() - begun

        module.forward = timed


def measure(model, encoder, batch, tokens, seconds):
    size = model.config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size, dtype=model.dtype, device=model.device)
    encoder.seconds, images = 0.0, 0
    begun = time.perf_counter()
    with torch.inference_mode():
        while images == 0 or time.perf_counter() - begun < seconds:
            model.generate(pixel_values=pixels, max_new_tokens=tokens, min_new_tokens=tokens, num_beams=1, do_sample=False)
            images += batch
        wait(model.device)
    took = time.perf_counter() - begun
    encode = encoder.seconds / images
    return {"batch": batch, "images_per_second": images / took, "encode": encode, "decode": took / images - encode}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("dtype", choices=DTYPES, nargs="?")
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--compile", action="store_true", help="the vision encoder under torch.compile, with freezing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", default="1,2,4,8,16,32")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=8)
    args = parser.parse_args()
    if args.make:
        return make(args.model)
    begun = time.perf_counter()
    model = BlipForConditionalGeneration.from_pretrained(args.model, dtype=DTYPES[args.dtype]).eval().to(args.device)
    if args.compile:
        from torch._inductor import config

        config.freezing = True
        model.vision_model.forward = torch.compile(model.vision_model.forward, dynamic=False)
    encoder = Timer(model.vision_model, model.device)
    once = measure(model, encoder, 1, args.tokens, 0)
    first = time.perf_counter() - begun
    slowest, batches = 1 / once["images_per_second"], []
    for batch in map(int, args.batch.split(",")):
        if batches and slowest * batch > args.seconds * TOO_LONG:
            print(f"batch {batch} is left out: it would take too long", file=sys.stderr)
            continue
        # Also compiles for this shape.
        measure(model, encoder, batch, args.tokens, 0)
        batches.append(measure(model, encoder, batch, args.tokens, args.seconds))
        slowest = 1 / batches[-1]["images_per_second"]
    print(json.dumps({
        "versions": f"transformers {__import__('transformers').__version__}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "first_caption": first,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "batches": batches,
    }))


if __name__ == "__main__":
    main()
