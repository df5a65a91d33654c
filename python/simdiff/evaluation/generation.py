"""Continue a prompt greedily with the KV cache, and check the cache by forwards without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.models.running import in_evaluation


@dataclass(frozen=True)
class Generation:
    """A greedy continuation with the KV cache, and the result of checking it without."""

    prompt: str
    text: str
    equals_uncached: bool
    """Whether every token also has the highest logit in a forward over the text without cache."""


@in_evaluation
@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 32
) -> Generation:
    """Continue a prompt greedily with the KV cache and check each step without it."""
    device = model.get_input_embeddings().weight.device
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    start = inputs["input_ids"].shape[1]
    logits = model(input_ids=output, use_cache=False).logits[0, start - 1 : -1].float()
    chosen = logits.gather(1, output[0, start:, None].to(logits.device)).squeeze(1)
    # The two computations round differently, so the chosen token may lose to an equal one.
    slack = 1e-3 if model.dtype == torch.float32 else 0.25
    return Generation(
        prompt,
        tokenizer.decode(output[0, start:], skip_special_tokens=True),
        bool((logits.max(dim=1).values - chosen <= slack).all()),
    )
