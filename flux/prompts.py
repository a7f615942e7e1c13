"""Encode prompts, once for each request, with a cache."""

import logging
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline

from weights.serving.lru import LruCache

logger = logging.getLogger(__name__)

CAPACITY = 16  # encoded prompts that are kept: 4 MB each with FLUX.1's T5 in bf16
MAX_CHARACTERS = 20_000  # far more than any tokenizer takes; tokenizing megabytes takes seconds


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the transformer reads of a prompt, on the device and in the compute dtype.

    Attributes:
        prompt_embeds: T5's hidden states, [1, max_sequence_length, T5 width].
        pooled_prompt_embeds: CLIP's pooled output, [1, CLIP width].
        remarks: what the encoders did not read, for the log.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    remarks: tuple[str, ...]


class PromptEncoder:
    """Encodes prompts with the text encoders of a pipeline, through a small LRU."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        self._pipeline = pipeline
        self._cache: LruCache[Hashable, PromptEmbeddings] = LruCache(CAPACITY)

    def encode(
        self, prompt: str, max_sequence_length: int, encoder_state: Hashable
    ) -> PromptEmbeddings:
        """Encode a prompt, cut to what the tokenizers take, with a log line if it was.

        Args:
            prompt: any text, the empty one too.
            max_sequence_length: T5 tokens, to which the prompt is padded or cut.
            encoder_state: what the text encoders' weights now hold; part of the cache's key.
        """
        prompt = prompt[:MAX_CHARACTERS]
        key = (prompt, max_sequence_length, encoder_state)
        encoded = self._cache.get(key)
        if encoded is None:
            encoded = self._cache.put(key, self._encode(prompt, max_sequence_length))
        for remark in encoded.remarks:
            logger.info(remark)
        return encoded

    def _encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeddings:
        embeds, pooled, _ = self._pipeline.encode_prompt(
            prompt,
            device=self._pipeline.vae.device,  # the transformer, and T5 perhaps, are on the host
            max_sequence_length=max_sequence_length,
        )
        return PromptEmbeddings(embeds, pooled, self._remarks(prompt, max_sequence_length))

    def _remarks(self, prompt: str, t5_limit: int) -> tuple[str, ...]:
        """For each encoder that cuts the prompt: how much of it is read."""
        t5_length, clip_length = (
            len(tokenizer(prompt, verbose=False).input_ids)
            for tokenizer in (self._pipeline.tokenizer_2, self._pipeline.tokenizer)
        )
        clip_limit = self._pipeline.tokenizer_max_length
        remarks = []
        if t5_length > t5_limit:
            remarks.append(f"The prompt is cut: T5 reads the first {t5_limit} tokens of it")
        if clip_length > clip_limit:
            rest = "" if t5_length > t5_limit else "; T5 reads all of it"
            remarks.append(f"CLIP reads the first {clip_limit} tokens of the prompt{rest}")
        return tuple(remarks)
