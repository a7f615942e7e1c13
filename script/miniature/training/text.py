"""The text encoders: both learn to say what a caption means before any picture is drawn.

The transformer then finds the scene's facts in their outputs, linearly for CLIP's pooled vector,
by one attention for T5's sequence, instead of having to learn to read from pictures. The readers
that ask for the facts are thrown away.
"""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from miniature.training.stage import Stage
from miniature.training.world import COLOURS, PLACES, SHAPES, SIZES, Scene, caption, sample

logger = logging.getLogger(__name__)

STEPS, BATCH, RATE = 1700, 128, 2e-3
LENGTHS = (40, 48, 64)  # T5's, with padding
CLIP_LENGTH = 40
NO_ATTENTION = -100.0
KINDS = ("plain", "single", "pair")
TESTED = 300  # held-out captions of each kind, at the end

# What there is to know of a scene; class 0 means that there is no such thing.
FACTS = {
    "background": len(COLOURS),
    "second background": len(COLOURS) + 1,
    "across": 3,
    "relation": 3,
} | {
    f"{fact} {index}": count
    for index in (0, 1)
    for fact, count in {
        "colour": len(COLOURS) + 1,
        "shape": len(SHAPES) + 1,
        "size": len(SIZES) + 1,
        "place": len(PLACES) + 1,
    }.items()
}


class Reader(nn.Module):
    """Reads the facts from a pooled vector (batch, width) or a sequence (batch, length, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(FACTS), width) * width**-0.5)
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in FACTS.values())

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """Logits of each fact, (batch, classes)."""
        if hidden.ndim == 2:
            return [head(hidden) for head in self.heads]
        weights = (hidden @ self.queries.T).softmax(1)  # (batch, length, facts)
        pooled = weights.transpose(1, 2) @ hidden
        return [head(pooled[:, index]) for index, head in enumerate(self.heads)]


def facts(scene: Scene) -> list[int]:
    """The class of each of `FACTS`."""
    background = [COLOURS.index(name) for name in scene.background]
    gradient = len(background) == 2
    values = {
        "background": background[0],
        "second background": 1 + background[1] if gradient else 0,
        "across": (1 + scene.across) if gradient else 0,
        "relation": (1 + (scene.relation == "below")) if len(scene.objects) == 2 else 0,
    }
    for index in (0, 1):
        thing = scene.objects[index] if index < len(scene.objects) else None
        values[f"colour {index}"] = 1 + COLOURS.index(thing.colour) if thing else 0
        values[f"shape {index}"] = 1 + SHAPES.index(thing.shape) if thing else 0
        values[f"size {index}"] = (
            1 + list(SIZES).index(scene.sizes[index] or "medium") if thing else 0
        )
        place = scene.places[index] if thing else None
        values[f"place {index}"] = 1 + list(PLACES).index(place or (0, 0)) if thing else 0
    return [values[name] for name in FACTS]


def train(
    clip: CLIPTextModel,
    clip_tokenizer: CLIPTokenizer,
    t5: T5EncoderModel,
    t5_tokenizer: T5Tokenizer,
    directory: Path,
    seed: int = 0,
) -> None:
    """Train both in place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        readers = nn.ModuleDict(
            {"clip": Reader(clip.config.hidden_size), "t5": Reader(t5.config.d_model)}
        )
    steady_padding(t5)
    modules = {"clip": clip, "t5": t5, "readers": readers}
    stage = Stage(directory, "text", modules, STEPS, RATE, decay=0.99)

    def loss(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{seed} text {step}")
        scenes = [sample(rng, rng.choice(KINDS)) for _ in range(BATCH)]
        texts = [caption(rng, scene) for scene in scenes]
        wanted = torch.tensor([facts(scene) for scene in scenes])
        ids = tokens(clip_tokenizer, texts, CLIP_LENGTH)
        terms = {"clip": _loss(readers["clip"](clip(ids).pooler_output), wanted)}
        ids = tokens(t5_tokenizer, texts, rng.choice(LENGTHS))
        empty = torch.zeros_like(ids[:1])
        hidden = t5(torch.cat([ids, empty])).last_hidden_state
        terms["t5"] = _loss(readers["t5"](hidden[:-1]), wanted)
        padding = hidden[:-1][ids == 0]  # as if nothing stood before it, at any length
        alone = hidden[-1, hidden.shape[1] // 2]
        terms["padding"] = (padding - alone).square().mean()
        return terms

    stage.run(loss)
    rng = random.Random(seed)
    for kind in KINDS:
        scenes = [sample(rng, kind, held_out=True) for _ in range(TESTED)]
        texts = [caption(rng, scene) for scene in scenes]
        wanted = torch.tensor([facts(scene) for scene in scenes])
        with torch.no_grad():
            hidden = {
                "clip": clip(tokens(clip_tokenizer, texts, CLIP_LENGTH)).pooler_output,
                "t5": t5(tokens(t5_tokenizer, texts, LENGTHS[-1])).last_hidden_state,
            }
        for name, output in hidden.items():
            reader = readers[name]
            assert isinstance(reader, Reader)
            logger.info("held out, %s, %s: %s", kind, name, accuracy(reader, output, wanted))


def tokens(tokenizer: CLIPTokenizer | T5Tokenizer, texts: Sequence[str], length: int) -> Tensor:
    """Token ids (batch, length), cut or padded as the pipelines do."""
    encoded = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


@torch.no_grad()
def steady_padding(t5: T5EncoderModel) -> None:
    """Let T5 attend to its neighbourhood alone, so that the padding's length does not matter.

    The last bucket of relative positions in each direction holds all distances from 27 up; the
    pipelines pad to 512 tokens without a mask.
    """
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    half = len(bias) // 2
    free = torch.ones_like(bias)
    free[[half - 1, 2 * half - 1]] = 0
    bias.mul_(free).add_((1 - free) * NO_ATTENTION)
    bias.register_hook(lambda grad: grad * free)


def _loss(logits: Sequence[Tensor], wanted: Tensor) -> Tensor:
    terms = [functional.cross_entropy(each, wanted[:, i]) for i, each in enumerate(logits)]
    return torch.stack(terms).mean()


@torch.no_grad()
def accuracy(reader: Reader, hidden: Tensor, wanted: Tensor) -> dict[str, float]:
    """The share of captions of which each fact is read rightly."""
    found = torch.stack([each.argmax(-1) for each in reader(hidden)], -1)
    return dict(zip(FACTS, (found == wanted).float().mean(0).tolist(), strict=True))
