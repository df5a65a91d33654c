"""The part of the vocabulary on which a step computes its loss: frequent tokens, and some others.

With a vocabulary of 49152 and 11 trained layers of 576, the logits of all tokens take 40% of the
time of a step. The tokens that are frequent in the training text, and those that are to be
predicted, are always taken. Of the n others m are drawn anew for each part of a batch, and each
stands for n / m of them: log(n / m) is added to its logits, the dense model's too, so that the sums
over the vocabulary are right on average: importance sampling (Bengio and Senécal 2008, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.head_loss import Head

# Share of the logits that goes to frequent tokens.
_FREQUENT = 0.75


@dataclass(frozen=True)
class Drawn:
    """Tokens of the vocabulary, and what is added to their logits."""

    tokens: Tensor
    """Token ids, `(num_tokens,)`."""
    added: Tensor
    """For each of them, 0 or log(n / m)."""
    labels: Tensor
    """Where among `tokens` each label stands."""

    def of(self, head: Head) -> Head:
        """A head of these tokens alone."""
        assert head.weight is not None
        tokens = self.tokens.to(head.weight.device)
        bias = self.added.to(head.weight)
        return Head(head.weight[tokens], bias if head.bias is None else head.bias[tokens] + bias)


class FewLogits:
    """Draws tokens of the vocabulary from torch's global generator.

    Args:
        examples: the training examples, in which some tokens are frequent.
        vocabulary: number of tokens of the vocabulary.
        count: about how many are taken; at least 4.
    """

    def __init__(self, examples: Examples, vocabulary: int, count: int) -> None:
        """Find the frequent tokens."""
        seen = torch.bincount(examples.tokens[examples.mask], minlength=vocabulary)
        order = seen.argsort(descending=True, stable=True)[: int(_FREQUENT * count)]
        self._always = torch.zeros(vocabulary, dtype=torch.bool)
        self._always[order[seen[order] > 0]] = True
        self._num_drawn = count - int(_FREQUENT * count)

    def draw(self, labels: Tensor) -> Drawn:
        """Tokens for some labels, which are among them."""
        always = self._always.clone()
        always[labels.cpu()] = True
        taken, others = always.nonzero()[:, 0], (~always).nonzero()[:, 0]
        drawn = others[torch.randperm(len(others))[: self._num_drawn]]
        added = torch.zeros(len(taken) + len(drawn))
        if len(drawn):
            added[len(taken) :] = math.log(len(others) / len(drawn))
        places = torch.searchsorted(taken, labels.cpu())
        return Drawn(torch.cat([taken, drawn]), added, places.to(labels.device))
