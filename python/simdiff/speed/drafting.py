"""A pruned model as the draft of its own parent: speculative decoding by transformers, timed.

In every step the draft proposes a fixed number of tokens, one forward of the parent checks all of
them, and those up to the first that the parent would not have chosen are accepted, with the
parent's own token after them. The text is that of the parent alone.

Source: Leviathan et al., arXiv 2211.17192, whose acceptance rate is per position; the one here is
of all proposed tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.foreign import foreign, quietly
from simdiff.models.running import evaluating
from simdiff.speed.decoding import endless, nearly_best
from simdiff.speed.paired_ratio import paired_ratio, spread

DRAFT_TOKENS = 5
"""Proposed in a step, unless another number is given."""

WAYS = ("alone", "drafted")


@dataclass(frozen=True)
class Drafting:
    """What is measured with a draft."""

    prompts: Tensor
    """Token ids `(num_prompts, prompt_length)`; every round continues another one."""
    draft_tokens: int = DRAFT_TOKENS
    text: Mapping[str, Any] = field(default_factory=dict)
    """Identity of the text of the prompts."""

    def __post_init__(self) -> None:
        """Refuse a draft of no tokens, and no prompts."""
        if self.draft_tokens < 1:
            raise SimdiffError(f"draft tokens must be at least 1, got {self.draft_tokens}")
        if self.prompts.dim() != 2 or not len(self.prompts):
            raise SimdiffError(
                f"prompts must be token ids (num_prompts, length), got {tuple(self.prompts.shape)}"
            )


@dataclass(frozen=True)
class Drafted:
    """One generation: its tokens, its seconds, and what the parent was asked to check."""

    tokens: Tensor
    seconds: float
    steps: int
    """Forwards of the parent."""
    proposed: int
    """Tokens that the draft proposed."""

    @property
    def accepted(self) -> int:
        """Proposed tokens that stayed: every step gives one token of the parent besides."""
        return self.tokens.shape[1] - self.steps


def measure_drafting(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    drafting: Drafting,
    new_tokens: int,
    warm_up: int,
) -> dict[str, Any]:
    """Time the parent alone and with the draft by turns, greedily, a prompt in each round.

    Args:
        dense: the parent, on one device.
        pruned: the draft, with the parent's vocabulary.
        drafting: prompts, and tokens proposed in a step.
        new_tokens: generated for each prompt; end-of-sequence tokens do not stop it.
        warm_up: rounds before those that count, on the first prompts.

    Returns:
        The entry "draft" of bench.json.

    Raises:
        SimdiffError: transformers cannot decode this model with a draft, or other tokens come out
            than without, beyond rounding.
    """
    prompts = drafting.prompts
    rounds: dict[str, list[Drafted]] = {way: [] for way in WAYS}
    orders, equal = [], 0
    with evaluating(dense, pruned), endless(dense), _as_draft(pruned, drafting.draft_tokens):
        for turn in range(-warm_up, len(prompts)):
            order = WAYS if turn % 2 == 0 else WAYS[::-1]
            prompt = prompts[turn % len(prompts)][None]
            found = {
                way: _generate(dense, None if way == "alone" else pruned, prompt, new_tokens)
                for way in order
            }
            same = _same(dense, prompt, *(found[way].tokens for way in WAYS))
            if turn < 0:
                continue
            equal += same
            orders.append(list(order))
            for way, result in found.items():
                rounds[way].append(result)
    drafted = rounds["drafted"]
    steps, proposed, accepted = (
        sum(getattr(one, name) for one in drafted) for name in ("steps", "proposed", "accepted")
    )
    seconds = {way: [one.seconds for one in found] for way, found in rounds.items()}
    return {
        "text": dict(drafting.text),
        "prompts": len(prompts),
        "prompt_length": prompts.shape[1],
        "new_tokens": new_tokens,
        "draft_tokens": drafting.draft_tokens,
        "steps": steps,
        "proposed": proposed,
        "accepted": accepted,
        "acceptance_rate": accepted / proposed if proposed else 0.0,
        "accepted_per_step": accepted / steps,
        "equal_prompts": equal,
        "orders": orders,
        "seconds": seconds,
        "tokens_per_second": {
            way: asdict(spread([new_tokens / one for one in seconds[way]])) for way in WAYS
        },
        "ratio": asdict(paired_ratio(seconds["alone"], seconds["drafted"])),
    }


def _generate(
    model: PreTrainedModel, draft: PreTrainedModel | None, prompt: Tensor, new_tokens: int
) -> Drafted:
    """Continue a prompt by transformers' `generate`, with a draft or without."""
    ids = prompt.to(model.get_input_embeddings().weight.device)
    lengths: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        read = kwargs.get("input_ids")
        lengths.append((args[0] if read is None else read).shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        _synchronise(ids)
        start = time.perf_counter()
        with torch.inference_mode(), quietly(), _drafted(model, draft):
            tokens = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=new_tokens,
                use_cache=True,
                pad_token_id=0,
                **({} if draft is None else {"assistant_model": draft}),
            )[:, ids.shape[1] :]
        _synchronise(ids)
        seconds = time.perf_counter() - start
    finally:
        hook.remove()
    # Beside the token that is not in the cache yet, a forward reads what was proposed; the first
    # one reads the prompt.
    proposed = sum(lengths) - len(lengths) - (ids.shape[1] - 1)
    return Drafted(tokens.cpu(), seconds, len(lengths), proposed)


def _drafted(
    model: PreTrainedModel, draft: PreTrainedModel | None
) -> contextlib.AbstractContextManager[None]:
    """Says of what raises that it is the draft with which transformers cannot decode."""
    if draft is None:
        return contextlib.nullcontext()
    return foreign(f"transformers cannot decode {type(model).__name__} with a draft")


def _same(model: PreTrainedModel, prompt: Tensor, alone: Tensor, drafted: Tensor) -> bool:
    """Whether both ways gave the same tokens, or else such as nearly tie.

    Raises:
        SimdiffError: the model would not have chosen a token.
    """
    if torch.equal(alone, drafted):
        return True
    with torch.inference_mode():
        if nearly_best(model, prompt, drafted):
            return False
    where = int((alone != drafted).nonzero()[0, 1])
    raise SimdiffError(
        f"not recorded: with a draft the model must write the tokens that it writes alone, got "
        f"{int(drafted[0, where])} instead of {int(alone[0, where])} as token {where}"
    )


@contextlib.contextmanager
def _as_draft(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Make a model propose so many tokens in each step, however sure it is of them."""
    old = model.generation_config
    model.generation_config = GenerationConfig(
        num_assistant_tokens=tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    try:
        yield
    finally:
        model.generation_config = old


def _synchronise(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
