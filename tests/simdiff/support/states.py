"""Hidden states by transformers' own means, for computations that share nothing with ours."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from simdiff.scoring.block_scores import BlockScores
from simdiff.scoring.running_groups import RunningGroups


@torch.no_grad()
def hidden_states(model: PreTrainedModel, batches: list[torch.Tensor]) -> torch.Tensor:
    """h_0 ... h_L of all sequences, float64 `(L + 1, sequences, tokens, hidden_size)`.

    The last entry of transformers' own list comes after the final norm: it is put out of work.
    """
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    forward, norm.forward = norm.forward, lambda states: states
    try:
        outputs = [model(input_ids=ids, output_hidden_states=True) for ids in batches]
    finally:
        norm.forward = forward
    return torch.cat([torch.stack(o.hidden_states).double() for o in outputs], dim=1)


def blocks_of(states: list[torch.Tensor]) -> BlockScores:
    """The scores of blocks of one sequence's hidden states, `(tokens, hidden_size)` each."""
    groups = RunningGroups(len(states) - 1, 1)
    groups.begin(torch.ones(1, len(states[0])))
    assert groups.blocks is not None
    groups.blocks.update([state[None] for state in states])
    blocks, _ = groups.finish_blocks()
    assert blocks is not None
    return blocks


def unlike_sequences() -> torch.Tensor:
    """Six sequences of unlike text: each repeats a few tokens of its own."""
    generator = torch.Generator().manual_seed(5)
    own = torch.randint(0, 97, (6, 3), generator=generator)
    return own.gather(1, torch.randint(0, 3, (6, 12), generator=generator))
