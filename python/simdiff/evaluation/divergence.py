"""How far the next-token distribution of a model is from that of the dense one, token by token.

    D = sum_v p_v log(p_v / q_v),  p of the dense model, q of the other

over the tokens v that are likeliest in p and, as one further outcome, all others together, which
gives a lower bound of the divergence over the whole vocabulary. It needs no labels: it is what the
loss rises by on text that the dense model writes, without the chance of which token came next.
The loss itself, the negative log-likelihood of that token, is computed along with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Number of likeliest tokens of the dense model that are kept apart.
LIKELIEST = 64
# Number of tokens whose logits are converted to float32 at a time, see `simdiff.evaluation.losses`.
_ROWS = 16
# The least probability of all other tokens together: float32 cannot tell 1 - p from 0 below it.
_LEAST = 1e-6


@dataclass(frozen=True)
class Teacher:
    """The distribution of the dense model after every token of a window."""

    log_likeliest: Tensor
    """Log probabilities of its likeliest tokens, `(num_tokens, LIKELIEST)`, float32."""
    likeliest: Tensor
    """Their token ids."""
    targets: Tensor
    """The ids of the tokens that came next, `(num_tokens,)`."""

    @classmethod
    def of_logits(cls, logits: Tensor, targets: Tensor) -> Teacher:
        """From the logits of the dense model `(num_tokens, vocabulary)` and what came next."""
        count = min(LIKELIEST, logits.shape[1])
        parts = [rows.float().log_softmax(-1).topk(count) for rows in logits.split(_ROWS)]
        values, indices = (torch.cat([part[k] for part in parts]) for k in (0, 1))
        return cls(values, indices, targets.to(logits.device))

    def measures(self, logits: Tensor) -> Tensor:
        """Divergence and loss of each token, `(2, num_tokens)`, float32, in nats.

        Args:
            logits: of any model with the same vocabulary, `(num_tokens, vocabulary)`.
        """
        parts = zip(
            logits.split(_ROWS),
            self.log_likeliest.split(_ROWS),
            self.likeliest.split(_ROWS),
            self.targets.split(_ROWS),
            strict=True,
        )
        return torch.cat([_measures(*part) for part in parts], 1)

    def packed(self) -> Tensor:
        """As one tensor `(num_tokens, 2 LIKELIEST + 1)`, float32: ids below 2^24 are exact."""
        ids = torch.cat([self.likeliest, self.targets[:, None]], 1)
        return torch.cat([self.log_likeliest, ids.float()], 1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Teacher:
        """The inverse of `packed`."""
        count = packed.shape[1] // 2
        ids = packed[:, count:].long()
        return cls(packed[:, :count].contiguous(), ids[:, :-1].contiguous(), ids[:, -1])


def _measures(logits: Tensor, log_p: Tensor, likeliest: Tensor, targets: Tensor) -> Tensor:
    normaliser = logits.float().logsumexp(-1, keepdim=True)
    loss = (normaliser - logits.gather(1, targets[:, None]).float())[:, 0]
    log_q = logits.gather(1, likeliest).float() - normaliser
    p, q = log_p.exp(), log_q.exp()
    others_p = (1 - p.sum(-1)).clamp_min(_LEAST)
    others_q = (1 - q.sum(-1)).clamp_min(_LEAST)
    divergence = (p * (log_p - log_q)).sum(-1) + others_p * (others_p / others_q).log()
    return torch.stack([divergence, loss])
