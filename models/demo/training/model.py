"""The demo model: a small BLIP, and the heads that help its training."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BlipConfig, BlipForConditionalGeneration

from dataset import SIDE
from grammar import COLOURS, KINDS, PLACES, TIMES, WEATHERS
from vocabulary import DEC, PAD, SEP, VOCABULARY_SIZE

PATCH = 14
VISION_WIDTH = 160
TEXT_WIDTH = 128


def config() -> BlipConfig:
    """BLIP's own defaults but for the sizes."""
    return BlipConfig(
        vision_config={
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 4 * VISION_WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": TEXT_WIDTH,
            "initializer_range": 0.02,
        },
        text_config={
            "hidden_size": TEXT_WIDTH,
            "encoder_hidden_size": VISION_WIDTH,
            "intermediate_size": 4 * TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": TEXT_WIDTH,
            "vocab_size": VOCABULARY_SIZE,
            "max_position_embeddings": 64,
            "bos_token_id": DEC,
            "eos_token_id": SEP,
            "sep_token_id": SEP,
            "pad_token_id": PAD,
        },
        projection_dim=TEXT_WIDTH,
        image_text_hidden_size=TEXT_WIDTH,
    )


def build(seed: int) -> BlipForConditionalGeneration:
    """The untrained model."""
    torch.manual_seed(seed)
    model = BlipForConditionalGeneration(config())
    vision = model.vision_model.embeddings
    for table in (vision.position_embedding, vision.class_embedding):
        nn.init.normal_(table, std=0.02)
    nn.init.normal_(vision.patch_embedding.weight, std=0.03)
    return model


class Helpers(nn.Module):
    """Linear heads that tell the vision encoder what is where; dropped after training."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Linear(VISION_WIDTH, 1 + len(KINDS))
        self.colour = nn.Linear(VISION_WIDTH, 1 + len(COLOURS))
        self.group = nn.Linear(VISION_WIDTH, 3)
        self.centre = nn.Linear(VISION_WIDTH, 1)
        facts = (len(PLACES), len(WEATHERS), len(TIMES), 4, 4)
        self.facts = nn.ModuleList(nn.Linear(VISION_WIDTH, size) for size in facts)

    def forward(self, states: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The losses of all heads; -100 marks patches half thing, half background."""
        patches, whole = states[:, 1:], states[:, 0]
        losses = {}
        for name in ("kind", "colour", "group"):
            scores = getattr(self, name)(patches).float().flatten(0, 1)
            losses[name] = nn.functional.cross_entropy(scores, batch[name].flatten(), ignore_index=-100)
        centre = self.centre(patches).float().squeeze(-1)
        weight = torch.tensor(4.0)
        losses["centre"] = nn.functional.binary_cross_entropy_with_logits(centre, batch["centre"], pos_weight=weight)
        facts = [
            nn.functional.cross_entropy(head(whole).float(), batch["facts"][:, i]) for i, head in enumerate(self.facts)
        ]
        losses["facts"] = torch.stack(facts).mean()
        return losses
