"""The WordPiece vocabulary and the tokenizer files, in the layout of bert-base-uncased."""

from __future__ import annotations

import json
from pathlib import Path

from grammar import words

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + words()
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))
# As in the published BLIP models, [DEC] and [ENC] have ids beyond the tokenizer's vocabulary.
DEC = len(VOCABULARY)
VOCABULARY_SIZE = len(VOCABULARY) + 2
# [DEC] three red cat ##s and ... and the closing [SEP].
CAPTION_LENGTH = 18


def pieces(text: str) -> list[int]:
    """The ids of a text's word pieces."""
    ids = []
    for word in text.split():
        if word in VOCABULARY:
            ids.append(VOCABULARY.index(word))
        elif word.endswith("s") and word[:-1] in VOCABULARY:
            ids += [VOCABULARY.index(word[:-1]), VOCABULARY.index("##s")]
        else:
            ids.append(UNK)
    return ids


def encode(caption: str) -> list[int]:
    """The ids of a caption as the decoder is trained on it: [DEC] ... [SEP] and padding."""
    ids = [DEC, *pieces(caption)]
    assert UNK not in ids, caption
    ids.append(SEP)
    return ids + [PAD] * (CAPTION_LENGTH - len(ids))


def decode(ids: list[int]) -> str:
    """The caption up to the closing [SEP]."""
    pieces = []
    for number in ids:
        if number == SEP:
            break
        if number < len(VOCABULARY) and number >= len(SPECIAL):
            pieces.append(VOCABULARY[number])
        elif number != DEC:
            pieces.append(f"<{number}>")
    return " ".join(pieces).replace(" ##", "")


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and vocab.txt."""
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", SEP], "cls": ["[CLS]", CLS]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: i for i, word in enumerate(VOCABULARY)},
        },
    }
    config = {
        "cls_token": "[CLS]",
        "do_basic_tokenize": True,
        "do_lower_case": True,
        "mask_token": "[MASK]",
        "model_max_length": 64,
        "never_split": None,
        "pad_token": "[PAD]",
        "processor_class": "BlipProcessor",
        "sep_token": "[SEP]",
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
        "unk_token": "[UNK]",
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
