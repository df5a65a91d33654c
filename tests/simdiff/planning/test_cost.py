"""The cost of reads, against the layers that evaluators run."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from simdiff.planning.bypass import BypassEvaluator
from simdiff.planning.cost import Cost, Prices, head_stride, prices_of


def test_plans_share_what_they_have_in_common() -> None:
    prices = Prices(6, head=2.5)
    assert prices.plans([()]) == Cost(0, 1)  # the dense states are kept
    assert prices.plans([(2,)]) == Cost(3, 1)
    assert prices.plans([(2,), (2,)]) == Cost(3, 1)
    assert prices.plans([(5,)]) == Cost(0, 1)
    # 3, 4, 5 without 2; 4 and 5 without 2 and 3; 3 is shared with (2, 4), which runs 5 anew
    assert prices.plans([(2,), (2, 3), (2, 4)]) == Cost(3 + 2 + 1, 3)
    assert prices.total(prices.plans([(2,)])) == 3 + 2.5
    assert prices.dense * 2 + Cost(1) == Cost(13, 2)


def test_greedy_costs_what_it_runs(llama: PreTrainedModel) -> None:
    windows = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(5))
    evaluator = BypassEvaluator(llama, windows)
    evaluator.losses(())
    before = evaluator.layers_run
    gone: frozenset[int] = frozenset()
    for layer in (3, 1, 4):
        evaluator.rebase(gone)
        for other in {*range(6)} - gone:
            evaluator.losses(gone | {other})
        gone |= {layer}
    priced = prices_of(llama).greedy(3, 1)
    assert priced.heads == 6 + 5 + 4 + 1
    assert abs(evaluator.layers_run - before + 6 - priced.layers) <= 6
    assert prices_of(llama).greedy(3, 4) == priced * 4


def test_a_large_head_reads_fewer_tokens(llama: PreTrainedModel) -> None:
    prices = prices_of(llama)
    each = sum(p.numel() for p in llama.model.layers[0].parameters())
    assert prices == Prices(6, llama.lm_head.weight.numel() / each)
    strides = [head_stride(Prices(depth, head)) for depth, head in ((32, 2.4), (30, 8), (18, 30))]
    assert strides == [1, 2, 4]
