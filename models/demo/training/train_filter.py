"""Trains the demo filter: `python train_filter.py --out RUN --cache CACHE`.

The image encoder is the captioner's, unchanged, so that one encoding of a picture can serve both. What is learnt is to read:
the text encoder, which begins as the captioner's decoder, its head and the two projections. A text is right if everything it
says is true of the picture, also where it does not say everything; wrong ones differ in one word where they can.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BlipForImageTextRetrieval

from dataset import load_or_render
from grammar import COLOURS, COUNT_WORDS, IMPOSSIBLE, KINDS, PLACES, TIMES, WEATHERS, Group, Scene
from model import config
from train import learning_rate, make_batch, normalise
from vocabulary import CLS, PAD, SEP, SPECIAL, UNK, VOCABULARY, pieces

VALIDATION = 512
CAPTIONER = Path(__file__).resolve().parents[1] / "model.safetensors"
TEMPERATURE = 0.07
CONTRAST = 0.2


def tokens(text: str) -> list[int]:
    """[CLS], the text's pieces and [SEP], as the tokenizer makes them."""
    return [CLS, *pieces(text), SEP]


def scene_of(facts: np.ndarray, groups: np.ndarray) -> Scene:
    """The scene behind an example of the data set."""
    counts = [int(n) for n in facts[3:5] if n > 0]
    things = tuple(
        Group(count, KINDS[kind - 1], COLOURS[colour - 1]) for count, (kind, colour) in zip(counts, groups[1:])
    )
    return Scene(things, list(PLACES)[facts[0]], WEATHERS[facts[1]], TIMES[facts[2]])


def other(rng: random.Random, values, own):
    """A value that is not the own one."""
    return rng.choice([value for value in values if value != own])


def changed(rng: random.Random, scene: Scene) -> Scene:
    """The scene with one attribute changed: one word of its caption, and what grammar makes of it."""
    while True:
        what = rng.choice(("kind", "colour", "colour", "count", "place", "weather", "time", "kind"))
        groups = list(scene.groups)
        at = rng.randrange(len(groups))
        count, kind, colour = groups[at].count, groups[at].kind, groups[at].colour
        place, weather, when = scene.place, scene.weather, scene.time
        if what == "kind":
            kind = other(rng, KINDS, kind)
        elif what == "colour":
            colour = other(rng, COLOURS, colour)
        elif what == "count":
            count = other(rng, COUNT_WORDS, count)
        elif what == "place":
            place = other(rng, PLACES, place)
        elif what == "weather":
            weather = other(rng, WEATHERS, weather)
        else:
            when = other(rng, TIMES, when)
        groups[at] = Group(count, kind, colour)
        # Two equal groups are no scene, and some weather does not happen.
        if len(set(groups)) == len(groups) and (place, weather) not in IMPOSSIBLE:
            return Scene(tuple(groups), place, weather, when)


def parts(rng: random.Random, scene: Scene, keep: Group | None = None) -> str:
    """A text that says some of what the scene is."""
    groups = list(scene.groups)
    if len(groups) == 2 and rng.random() < 0.5:
        groups = [keep or rng.choice(groups)]
    things = " and ".join(group.words() for group in groups)
    place, sky = PLACES[scene.place], f"on a {scene.weather} {scene.time}"
    return rng.choice((things, f"{things} {place}", f"{things} {place} {sky}", f"{things} {sky}"))


def is_true(text: str, scene: Scene) -> bool:
    """Whether everything that such a text says is so; for texts of `parts` only."""
    words = f"{text} "
    for phrase in PLACES.values():
        if f" {phrase} " in words and phrase != PLACES[scene.place]:
            return False
        words = words.replace(f" {phrase} ", " ")
    things, found, sky = words.strip().partition(" on a ")
    if found and sky.split() != [scene.weather, scene.time]:
        return False
    said = things.split(" and ")
    own = [group.words() for group in scene.groups]
    return all(group in own for group in said) and (len(said) == 1 or said == own)


def junk(rng: random.Random) -> list[int]:
    """Words that say nothing of any picture: file names, slogans, and words in no order."""
    pieces = range(len(SPECIAL), len(VOCABULARY))
    words = [UNK if rng.random() < 0.6 else rng.choice(pieces) for _ in range(rng.randint(1, 9))]
    return [CLS, *words, SEP]


def pair(rng: random.Random, scene: Scene, stranger: Scene) -> tuple[list[int], list[int]]:
    """A right text and a wrong one."""
    if rng.random() < 0.5:
        right, wrong = scene.caption(), changed(rng, scene).caption()
    else:
        right, wrong = parts(rng, scene), parts(rng, changed(rng, scene))
    draw = rng.random()
    if draw < 0.08:
        return tokens(right), junk(rng)
    if draw < 0.2 or is_true(wrong, scene):
        wrong = stranger.caption()
    if is_true(wrong, scene):
        return tokens(right), junk(rng)
    return tokens(right), tokens(wrong)


def padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask."""
    length = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (length - len(text)) for text in texts])
    return ids, (ids != PAD).long()


def build() -> BlipForImageTextRetrieval:
    """The captioner's encoder, and its decoder as a reader."""
    torch.manual_seed(11)
    model = BlipForImageTextRetrieval(config())
    known = load_file(CAPTIONER)
    own = model.state_dict()
    for name, value in known.items():
        target = name.replace("text_decoder.bert.", "text_encoder.")
        if target in own:
            own[target].copy_(value)
    model.vision_model.requires_grad_(False)
    return model


def matching(model: nn.Module, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The two scores of each pair."""
    seen = model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=states).last_hidden_state
    return model.itm_head(seen[:, 0])


def contrast(model: nn.Module, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The cosines of all pairs of pictures and texts."""
    texts = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    unit = nn.functional.normalize
    return unit(model.vision_proj(states[:, 0]), dim=-1) @ unit(model.text_proj(texts), dim=-1).t()


@torch.no_grad()
def encoded(model: nn.Module, data: dict, batches, bfloat16: bool) -> torch.Tensor:
    """Hidden states of all pictures, computed once."""
    found = []
    for pixels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            states = model.vision_model(pixel_values=pixels).last_hidden_state
        found.append(states.to(torch.bfloat16))
    return torch.cat(found)


@torch.no_grad()
def validate(model: nn.Module, states: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """How many pairs of unseen scenes are judged right: the true caption, and one with a wrong word."""
    rng = random.Random(3)
    right = [tokens(scene.caption()) for scene in scenes]
    wrong = [tokens(changed(rng, scene).caption()) for scene in scenes]
    shares = {}
    for name, texts, truth in (("right", right, 1), ("wrong", wrong, 0)):
        scores = matching(model, states.float(), *padded(texts))
        shares[name] = float((scores.argmax(-1) == truth).float().mean())
    nearest = contrast(model, states.float(), *padded(right)).argmax(-1)
    shares["nearest"] = float((nearest == torch.arange(len(scenes))).float().mean())
    return {name: round(share, 4) for name, share in shares.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the log")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the rendered sets")
    parser.add_argument("--examples", type=int, default=40_000)
    parser.add_argument("--minutes", type=float, default=15, help="learning rate included")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=500, help="steps between validations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision, where the processor has it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    data = load_or_render(options.cache, options.examples, False, options.threads)
    unseen = load_or_render(options.cache, VALIDATION, True, options.threads)
    model = build().train()
    averaged = copy.deepcopy(model).eval()
    random_rows = np.random.default_rng(5)
    rows = [np.arange(at, min(at + 256, options.examples)) for at in range(0, options.examples, 256)]
    # Each picture is shifted and tinted once.
    states = encoded(model, data, (make_batch(data, part, random_rows)["pixels"] for part in rows), options.bfloat16)
    scenes = [scene_of(facts, groups) for facts, groups in zip(data["facts"], data["groups"])]
    unseen_states = encoded(model, unseen, [normalise(unseen["images"])], False)
    unseen_scenes = [scene_of(facts, groups) for facts, groups in zip(unseen["facts"], unseen["groups"])]
    learnt = [p for p in model.parameters() if p.requires_grad]
    followed = [p for p, q in zip(averaged.parameters(), model.parameters()) if q.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.02)
    rng, started, step, done, best = random.Random(1), time.monotonic(), 0, 0.0, -1.0
    while done < 1.0:
        done = (time.monotonic() - started) / (60 * options.minutes)
        chosen = random_rows.integers(0, options.examples, options.batch)
        pairs = [pair(rng, scenes[i], scenes[rng.randrange(len(scenes))]) for i in chosen]
        own = states[torch.from_numpy(chosen)]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            texts = padded([right for right, _ in pairs] + [wrong for _, wrong in pairs])
            scores = matching(model, torch.cat([own, own]).float(), *texts)
            truth = torch.tensor([1] * len(pairs) + [0] * len(pairs))
            loss = nn.functional.cross_entropy(scores.float(), truth)
            captions = padded([tokens(scenes[i].caption()) for i in chosen])
            cosines = contrast(model, own.float(), *captions).float() / TEMPERATURE
            each = torch.arange(len(pairs))
            near = nn.functional.cross_entropy(cosines, each) + nn.functional.cross_entropy(cosines.t(), each)
        optimiser.zero_grad(set_to_none=True)
        (loss + CONTRAST * near / 2).backward()
        for group in optimiser.param_groups:
            group["lr"] = options.rate * learning_rate(step, done)
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(followed, learnt, 1 - min(0.998, (step + 1) / (step + 10)))
        if step % options.every == 0 or done >= 1.0:
            shares = validate(averaged, unseen_states, unseen_scenes)
            progress = dict(step=step, seconds=round(time.monotonic() - started), loss=round(loss.item(), 3))
            line = json.dumps(progress | shares)
            print(line, flush=True)
            with (options.out / "log.jsonl").open("a") as log:
                log.write(line + "\n")
            if shares["right"] + shares["wrong"] >= best:
                best = shares["right"] + shares["wrong"]
                torch.save(averaged.state_dict(), options.out / "filter.pt")


if __name__ == "__main__":
    main()
