"""Writes tests/fixtures/answering: tiny models of random weights that answer questions about images, and the reference's answers.

The reference is `BlipForQuestionAnswering` of Hugging Face transformers with `BlipProcessor`, in f32 on a CPU, one question
at a time. The weights are stored in f16 to keep the files small, and are rounded to it before anything is computed.

In the reference the decoder's cross-attention is as wide as the image encoder, although it looks at a question, whose hidden
states are as wide as the language model: the class works only where both are equal, as in the published models. In `widths`
they are not, and the decoder is made for the width of what it looks at, so that a mix-up of the two shows.

Only answers are kept that are not close: the same tokens come out with scores that are off by up to NOISE. The script asserts
that answers depend on both image and question, and end at several lengths.

    .venv/bin/python tests/reference/make_answering.py
"""

import copy
import itertools
import json
import math
import shutil

import numpy as np
import torch
from make_fixtures import ROOT as CAPTIONERS
from make_fixtures import Spec, draw_images, processor_of, text_config
from make_generation import Noise
from safetensors.torch import save_file
from transformers import BlipConfig, BlipForQuestionAnswering, LogitsProcessorList
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

ROOT = CAPTIONERS.with_name("answering")
IMAGES = 4
MAX_NEW_TOKENS = 12
END = 3

SPECS = [
    # The proportions of base.
    Spec(
        name="proportions",
        prompt="",
        vision=dict(hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    image_size=32, patch_size=8),
        text=dict(hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
        found=(1, 7.0),
        spare_words=2,
        gain=1.5,
        position_spread=2.0,
        even_words=True,
    ),
    # Images and questions of different widths, an untied head, nothing a power of two.
    Spec(
        name="widths",
        prompt="",
        vision=dict(hidden_size=36, intermediate_size=51, num_hidden_layers=2, num_attention_heads=3,
                    image_size=47, patch_size=9, layer_norm_eps=1e-6),
        text=dict(hidden_size=28, intermediate_size=61, num_hidden_layers=2, num_attention_heads=7,
                  layer_norm_eps=1e-5),
        found=(1, 7.0),
        spare_words=1,
        tied=False,
        gain=1.5,
        position_spread=2.0,
    ),
    # Many narrow heads, other depths, few positions, and a vocabulary well beyond the tokenizer's.
    Spec(
        name="depths",
        prompt="",
        vision=dict(hidden_size=24, intermediate_size=30, num_hidden_layers=4, num_attention_heads=6,
                    image_size=40, patch_size=10),
        text=dict(hidden_size=24, intermediate_size=66, num_hidden_layers=3, num_attention_heads=6,
                  max_position_embeddings=40),
        found=(3, 5.0),
        spare_words=13,
        gain=1.5,
        position_spread=2.0,
        even_words=True,
    ),
]
QUESTIONS = [
    "dog?",
    "is it on the table?",
    "is the cat running?",
    "are the two red birds sitting under the old tree near the house, or over the river behind it?",
    "is the small round dog standing, sitting or running?",
    "boat",
    "the man, the woman and the child: are they in the forest?",
    "is that a green hat on the plate?",
]
# num_beams, length_penalty, repetition_penalty, min_new_tokens, num_return_sequences
SEARCHES = [
    (1, 1.0, 1.0, 0, 1),
    (1, 1.0, 1.4, 5, 1),
    (3, 1.0, 1.0, 0, 3),
    (3, -1.5, 1.0, 0, 2),
    (3, 2.5, 1.0, 0, 1),
]


def build_model(spec, seed, ending):
    """Random weights whose every part matters; `ending` is added to the score of the end token."""
    text = text_config(spec) | dict(tie_word_embeddings=spec.tied)
    config = BlipConfig(text_config=text, vision_config=spec.vision, tie_word_embeddings=spec.tied)
    config._attn_implementation = "eager"
    model = BlipForQuestionAnswering(config).eval()
    width = spec.text["hidden_size"]
    if width != spec.vision["hidden_size"]:
        of_decoder = copy.deepcopy(config.text_config)
        of_decoder.encoder_hidden_size = width
        of_decoder._attn_implementation = "eager"
        model.text_decoder = BlipTextLMHeadModel(of_decoder).eval()
    generator = torch.Generator().manual_seed(seed)
    normal = lambda tensor, std: torch.empty_like(tensor).normal_(0.0, std, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1.0 + normal(parameter, 0.2))
            elif name.endswith("bias"):
                parameter.copy_(normal(parameter, 0.2))
            elif "text_decoder.bert.embeddings.position" in name:
                parameter.copy_(normal(parameter, spec.position_spread))
            elif "word_embeddings" in name and spec.even_words:
                # All of one length, or the longest would win at every step.
                words = normal(parameter, 1.0)
                parameter.copy_(words / words.norm(dim=1, keepdim=True) * math.sqrt(words.shape[1]))
            elif "embedding" in name or "cls.predictions.decoder" in name:
                parameter.copy_(normal(parameter, 1.0))
            elif "text_decoder.bert" in name:
                # Small, so that the latest token and its position count beside the question.
                gain = 0.9 if "crossattention" in name else 0.5
                parameter.copy_(normal(parameter, gain / math.sqrt(parameter[0].numel())))
            else:
                parameter.copy_(normal(parameter, spec.gain / math.sqrt(parameter[0].numel())))
        predictions = model.text_decoder.cls.predictions
        predictions.bias[END] += ending
        predictions.decoder.bias[END] = predictions.bias[END]
    return model.half().float()


def cut(sequence):
    """What was generated, up to the end token."""
    generated = sequence[1:]
    return generated[: generated.index(END) + 1] if END in generated else generated


def answer(model, asked, search, noise=None):
    beams, length_penalty, repetition_penalty, least, answers = search
    output = model.generate(
        **asked,
        max_new_tokens=MAX_NEW_TOKENS,
        min_new_tokens=least,
        do_sample=False,
        num_beams=beams,
        num_return_sequences=answers,
        repetition_penalty=repetition_penalty,
        logits_processor=LogitsProcessorList([] if noise is None else [Noise(noise)]),
        **(dict(length_penalty=length_penalty) if beams > 1 else {}),
    )
    return [cut(sequence) for sequence in output.tolist()]


def logprob(model, asked, token_ids):
    """Of an answer, by the model's own scores."""
    before = torch.tensor([[model.decoder_start_token_id] + token_ids[:-1]])
    image = model.vision_model(asked["pixel_values"])[0]
    question = model.text_encoder(
        input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], encoder_hidden_states=image
    )[0]
    logits = model.text_decoder(input_ids=before, encoder_hidden_states=question, is_decoder=True).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)
    return float(sum(logprobs[step, token] for step, token in enumerate(token_ids)))


def ask(processor, pixels, image, question):
    encoded = processor(text=question, return_tensors="pt")
    return dict(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        pixel_values=pixels[image : image + 1],
    )


def answer_all(model, processor, pixels):
    kept, close = [], 0
    for image, (number, question), search in itertools.product(range(IMAGES), enumerate(QUESTIONS), SEARCHES):
        # Greedy answers to all, the other searches to some.
        if search != SEARCHES[0] and (image + number + SEARCHES.index(search)) % 3:
            continue
        asked = ask(processor, pixels, image, question)
        found = answer(model, asked, search)
        if any(answer(model, asked, search, noise) != found for noise in range(3)):
            close += 1
            continue
        beams, length_penalty, repetition_penalty, least, _ = search
        answers = [
            dict(
                token_ids=ids,
                text=processor.decode(ids, skip_special_tokens=True),
                logprob=logprob(model, asked, ids),
            )
            for ids in found
        ]
        kept.append(
            dict(
                image=image,
                question=question,
                max_new_tokens=MAX_NEW_TOKENS,
                min_new_tokens=least,
                num_beams=beams,
                length_penalty=length_penalty,
                repetition_penalty=repetition_penalty,
                answers=answers,
            )
        )
    return kept, close


def greedy(model, processor, pixels):
    """The plain answers by image and question."""
    pairs = itertools.product(range(IMAGES), QUESTIONS)
    return {pair: tuple(answer(model, ask(processor, pixels, *pair), SEARCHES[0])[0]) for pair in pairs}


def faults(plain):
    """What makes the plain answers a weak test, if anything."""
    found = []

    def differ(which):
        groups = itertools.groupby(sorted(plain, key=lambda pair: str(pair[which])), key=lambda pair: pair[which])
        pairs = [pair for _, group in groups for pair in itertools.combinations(list(group), 2)]
        return sum(plain[a] != plain[b] for a, b in pairs) / len(pairs)

    of_questions, of_images = differ(0), differ(1)
    if of_questions < 0.8:
        found.append(f"answers hardly depend on the question: {of_questions:.2f}")
    if of_images < 0.5:
        found.append(f"answers hardly depend on the image: {of_images:.2f}")
    lengths = {len(ids) for ids in plain.values()}
    if len(lengths) < 4:
        found.append(f"answers end at too few lengths: {lengths}")
    ended = sum(ids[-1] == END for ids in plain.values())
    if not 0.3 * len(plain) < ended < 0.95 * len(plain):
        found.append(f"answers end in one way only: {ended} of {len(plain)}")
    tokens, different = sum(map(len, plain.values())), sum(len(set(ids)) for ids in plain.values())
    if tokens < 4 * len(plain):
        found.append("answers are very short")
    if different < 0.45 * tokens:
        found.append(f"answers repeat themselves: {different / tokens:.2f}")
    return found


def faults_of_all(plain, kept, close):
    """The same of all answers."""
    beamed = {tuple(case["answers"][0]["token_ids"]) for case in kept if case["num_beams"] > 1}
    found = []
    if len(beamed - set(plain.values())) < len(beamed) / 3:
        found.append("beams find what the likeliest tokens do")
    if close > len(kept) / 2:
        found.append(f"{close} answers are too close, {len(kept)} are not")
    return found


def make(spec):
    directory = ROOT / spec.name
    directory.mkdir(parents=True)
    processor = processor_of(spec, directory)
    for seed, ending in itertools.chain([spec.found], itertools.product(range(60), (4.0, 5.0, 6.0, 7.0, 8.0))):
        model = build_model(spec, seed, ending)
        images = draw_images(spec.vision["image_size"], seed)[:IMAGES]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        plain = greedy(model, processor, pixels)
        found = faults(plain)
        if not found:
            kept, close = answer_all(model, processor, pixels)
            found = faults_of_all(plain, kept, close)
        if not found:
            break
        print(f"{spec.name}: seed {seed}, ending {ending}: {'; '.join(found)}", flush=True)
    assert not found, f"{spec.name}: no seed gives a strong test"
    print(f"{spec.name}: seed {seed}, ending {ending}: {len(kept)} kept, {close} too close")
    for case in kept[:12]:
        print(f"  {case['image']} {case['question'][:30]:30} {case['answers'][0]['text']}")
    # An untied head has a second bias, which the model does not use.
    unused = "" if spec.tied else "text_decoder.cls.predictions.bias"
    parameters = sum(p.numel() for name, p in model.named_parameters() if name != unused)
    model.half().save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    processor.tokenizer.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)
    save_file(dict(images=torch.from_numpy(np.stack(images))), directory / "expected.safetensors")
    (directory / "expected.json").write_text(json.dumps(dict(parameters=parameters, answers=kept)) + "\n")


@torch.no_grad()
def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shutil.rmtree(ROOT, ignore_errors=True)
    for spec in SPECS:
        make(spec)
    size = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB")
    assert size < 7e5


if __name__ == "__main__":
    main()
