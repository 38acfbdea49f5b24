"""Trains the demo model: `python train.py --out RUN --cache CACHE`.

The caption's loss alone teaches shapes slowly. The scenes are drawn by us, so every patch's
kind, colour and group are known, and small heads on the vision encoder learn them as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed, multiprocessing, nn

from dataset import LABEL_SIDE, SIDE, load_or_render
from grammar import check_reserved
from model import PATCH, Helpers, build
from scoring import score
from vocabulary import CAPTION_LENGTH, DEC, PAD, decode

# CLIP's, as in the published BLIP models.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
GRID = SIDE // PATCH
WEIGHTS = {"caption": 1.0, "kind": 1.0, "colour": 0.5, "group": 0.5, "centre": 0.5, "facts": 0.5}
SHIFT = 4
VALIDATION = 512


def normalise(images: np.ndarray) -> torch.Tensor:
    """uint8 NHWC to what the vision encoder takes."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def make_batch(data: dict[str, np.ndarray], rows: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Some training examples, slightly shifted, brightened, tinted and roughened."""
    count = len(rows)
    shift = 2 * rng.integers(-SHIFT // 2, SHIFT // 2 + 1, size=(count, 2))
    images = np.pad(data["images"][rows], ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    half = SHIFT // 2
    labels = np.pad(data["labels"][rows], ((0, 0), (half, half), (half, half)), mode="edge")
    images = np.stack(
        [images[i, SHIFT + y : SHIFT + y + SIDE, SHIFT + x : SHIFT + x + SIDE] for i, (y, x) in enumerate(shift)]
    )
    labels = np.stack(
        [
            labels[i, half + y // 2 : half + y // 2 + LABEL_SIDE, half + x // 2 : half + x // 2 + LABEL_SIDE]
            for i, (y, x) in enumerate(shift)
        ]
    )
    gain = rng.normal(1, 0.06, (count, 1, 1, 1)) * rng.normal(1, 0.02, (count, 1, 1, 3))
    lift = rng.normal(0, 5, (count, 1, 1, 1))
    pixels = images.astype(np.float32) * gain.astype(np.float32) + lift.astype(np.float32)
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(0, 4, (count, 1, 1, 1)).astype(
        np.float32
    )
    batch = {"pixels": normalise(np.clip(pixels, 0, 255))}
    batch |= patch_targets(labels, data["centres"][rows], shift, data["groups"][rows])
    batch["facts"] = torch.from_numpy(data["facts"][rows])
    batch["ids"] = torch.from_numpy(data["ids"][rows])
    return batch


def patch_targets(
    labels: np.ndarray, centres: np.ndarray, shift: np.ndarray, groups: np.ndarray
) -> dict[str, torch.Tensor]:
    """For every patch: the kind, colour and group of what it shows, and whether a thing's middle is in it."""
    count, cell = len(labels), LABEL_SIDE // GRID
    cells = labels.reshape(count, GRID, cell, GRID, cell).transpose(0, 1, 3, 2, 4).reshape(count, GRID * GRID, -1)
    shares = np.stack([(cells == label).mean(-1) for label in range(3)], axis=-1)
    winner = 1 + shares[..., 1:].argmax(-1)
    thing = shares[..., 1:].max(-1)
    group = np.where(thing >= 0.25, winner, np.where(thing <= 0.08, 0, -100))
    rows = np.arange(count)[:, None]
    kind, colour = (np.where(group < 0, -100, groups[rows, np.maximum(group, 0), i]) for i in (0, 1))
    centre = np.zeros((count, GRID * GRID), dtype=np.float32)
    for i in range(count):
        for x, y, label in centres[i]:
            if label > 0:
                column = min(GRID - 1, max(0, int((x * SIDE - shift[i, 1]) / PATCH)))
                row = min(GRID - 1, max(0, int((y * SIDE - shift[i, 0]) / PATCH)))
                centre[i, row * GRID + column] = 1
    return {
        "group": torch.from_numpy(group),
        "kind": torch.from_numpy(kind),
        "colour": torch.from_numpy(colour),
        "centre": torch.from_numpy(centre),
    }


def losses_of(model: nn.Module, helpers: Helpers, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All losses of a batch."""
    states = model.vision_model(pixel_values=batch["pixels"]).last_hidden_state
    ids = batch["ids"]
    scores = model.text_decoder(
        input_ids=ids[:, :-1], attention_mask=(ids[:, :-1] != PAD).long(), encoder_hidden_states=states
    ).logits
    target = ids[:, 1:]
    caption = nn.functional.cross_entropy(
        scores.float().flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=0.01
    )
    return {"caption": caption} | helpers(states, batch)


@torch.no_grad()
def captions_of(model: nn.Module, images: np.ndarray) -> list[str]:
    """Greedy captions, a plain loop without a cache."""
    captions = []
    for start in range(0, len(images), 128):
        states = model.vision_model(pixel_values=normalise(images[start : start + 128])).last_hidden_state
        ids = torch.full((len(states), 1), DEC)
        for _ in range(CAPTION_LENGTH - 1):
            logits = model.text_decoder(input_ids=ids, encoder_hidden_states=states).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        captions += [decode(row) for row in ids.tolist()]
    return captions


def learning_rate(step: int, done: float) -> float:
    """Of the peak rate: a short warm-up, then a cosine down to a hundredth."""
    return min(1.0, (step + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def share_gradients(parameters: list[nn.Parameter], done: float, workers: int) -> float:
    """Average the gradients over the workers; all go by the first worker's progress."""
    first = done if distributed.get_rank() == 0 else 0.0
    flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([first])])
    distributed.all_reduce(flat)
    start = 0
    for p in parameters:
        p.grad.copy_(flat[start : start + p.numel()].view_as(p)).div_(workers)
        start += p.numel()
    return float(flat[-1])


def validate(
    model: nn.Module, data: dict[str, np.ndarray], progress: dict[str, float], out: Path, best: float
) -> float:
    """Log how well reserved scenes are captioned; keep the weights when they are the best so far."""
    truth = [decode(row.tolist()) for row in data["ids"]]
    shares = score(captions_of(model, data["images"]), truth)
    line = json.dumps(progress | shares)
    print(line, flush=True)
    with (out / "log.jsonl").open("a") as log:
        log.write(line + "\n")
    if shares["exact"] >= best:
        torch.save(model.state_dict(), out / "model.part")
        (out / "model.part").rename(out / "model.pt")
    return max(best, shares["exact"])


def work(rank: int, options: argparse.Namespace) -> None:
    """One worker's share of the training; the first one also validates and writes."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    meeting = f"tcp://127.0.0.1:{options.port}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.workers)
    data = load_or_render(options.cache, options.examples, False, options.workers)
    validation = load_or_render(options.cache, VALIDATION, True, options.workers)
    model = build(options.seed)
    helpers = Helpers()
    averaged = copy.deepcopy(model).eval()
    parameters = [*model.parameters(), *helpers.parameters()]
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98))
    rng = np.random.default_rng([options.seed, rank])
    batch_size = options.batch // options.workers
    order, running, best, step, done = np.empty(0, dtype=np.int64), {}, -1.0, 0, 0.0
    started = time.monotonic()
    while done < 1.0:
        seconds = time.monotonic() - started
        done = max(step / options.steps, seconds / (60 * options.minutes))
        if len(order) < batch_size:
            order = rng.permutation(options.examples)
        rows, order = np.sort(order[:batch_size]), order[batch_size:]
        batch = make_batch(data, rows, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            losses = losses_of(model, helpers, batch)
        total = sum(WEIGHTS[name] * loss for name, loss in losses.items())
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        done = share_gradients(parameters, done, options.workers)
        for group in optimiser.param_groups:
            group["lr"] = options.rate * learning_rate(step, done)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        if rank > 0:
            continue
        with torch.no_grad():
            keep = min(0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - keep)
        for name, loss in losses.items():
            running[name] = 0.98 * running.get(name, loss.item()) + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{step} {seconds:.0f}s " + " ".join(f"{n} {v:.3f}" for n, v in running.items()), flush=True)
        if step % options.every == 0 or done >= 1.0:
            progress = {"step": step, "seconds": round(seconds), "done": round(done, 3)}
            best = validate(averaged, validation, progress, options.out, best)
    distributed.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the log")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the rendered sets")
    parser.add_argument("--examples", type=int, default=56_000)
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--minutes", type=float, default=80, help="end by then, learning rate included")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=500, help="steps between validations")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--port", type=int, default=29561, help="where the workers meet")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision, where the processor has it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    reserved, triples = check_reserved()
    print(f"{reserved} of {triples} (kind, colour, place) triples are reserved", flush=True)
    load_or_render(options.cache, options.examples, False, options.workers)
    load_or_render(options.cache, VALIDATION, True, options.workers)
    multiprocessing.spawn(work, (options,), nprocs=options.workers)


if __name__ == "__main__":
    main()
