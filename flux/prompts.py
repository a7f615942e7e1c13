"""Prompts to embeddings: once a request, and not again while they are remembered."""

import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the transformer reads of a prompt, on the device and in the compute dtype.

    Attributes:
        tokens: T5's hidden states, [1, max_sequence_length, T5 width].
        pooled: CLIP's pooled output, [1, CLIP width].
    """

    tokens: torch.Tensor
    pooled: torch.Tensor


class PromptEncoder:
    """Encodes prompts with the text encoders of a pipeline, through a small LRU."""

    def __init__(self, pipeline: FluxPipeline, capacity: int) -> None:
        self._pipeline = pipeline
        self._capacity = capacity
        self._cache: OrderedDict[Hashable, PromptEmbeddings] = OrderedDict()

    def encode(
        self, prompt: str, max_sequence_length: int, encoder_state: Hashable = ()
    ) -> PromptEmbeddings:
        """Encode a prompt, cut to what the tokenizers take, with a log line if it was.

        Args:
            prompt: any text, the empty one too.
            max_sequence_length: T5 tokens, to which the prompt is padded or cut.
            encoder_state: what the text encoders' weights now hold; part of the cache's key.
        """
        self._log_cut(prompt, max_sequence_length)
        key = (prompt, max_sequence_length, encoder_state)
        if key not in self._cache:
            tokens, pooled, _ = self._pipeline.encode_prompt(
                prompt, max_sequence_length=max_sequence_length
            )
            self._cache[key] = PromptEmbeddings(tokens, pooled)
            if len(self._cache) > self._capacity:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _log_cut(self, prompt: str, max_sequence_length: int) -> None:
        """Say how much of the prompt each encoder reads, where that is not all of it."""
        for encoder, tokenizer, limit in (
            ("T5", self._pipeline.tokenizer_2, max_sequence_length),
            ("CLIP", self._pipeline.tokenizer, self._pipeline.tokenizer_max_length),
        ):
            length = len(tokenizer(prompt, verbose=False).input_ids)
            if length > limit:
                logger.warning(
                    "The prompt is cut: %s reads the first %d of its %d tokens",
                    encoder,
                    limit,
                    length,
                )
