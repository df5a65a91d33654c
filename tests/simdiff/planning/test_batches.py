"""Many plans read at once: the divergences of cut models, each shared state made once."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from simdiff.evaluation.divergence import Teacher
from simdiff.planning.batches import BatchReader, runs_of, some_logits
from simdiff.planning.cost import Prices
from simdiff.surgery.layers import layers_removed

PLANS = [(1, 2), (1,), (3, 4), (0,), (1, 4), (3, 5), (3, 4, 5), (5,), (1, 2, 5)]


def test_divergences_of_cut_models(llama: PreTrainedModel) -> None:
    windows = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(5))
    for stride in (1, 3):
        reader = BatchReader(llama, windows, stride)
        reader([()], [0, 1])
        before = reader.layers_run
        found = reader(PLANS, [1, 0])
        assert reader.layers_run - before == 2 * Prices(6).plans(PLANS).layers
        with torch.no_grad():
            for window, ids in enumerate(windows):
                read = slice(stride - 1, -1, stride)
                teacher = Teacher.of_logits(llama(ids[None]).logits[0, read], ids[stride::stride])
                for plan in PLANS:
                    with layers_removed(llama, plan):
                        logits = llama(ids[None], use_cache=False).logits[0, read]
                    wanted = teacher.measures(logits)
                    torch.testing.assert_close(
                        found[plan, window], runs_of(wanted), rtol=1e-4, atol=1e-6
                    )
                dense = reader([()], [window])[(), window]
                assert dense is not None
                assert float(dense[0].abs().max()) < 1e-6


def test_runs_of_tokens_and_tokens_read(llama: PreTrainedModel) -> None:
    tokens = torch.arange(511.0)
    assert len(runs_of(tokens)) == 511 // 32
    assert abs(float(runs_of(tokens).mean()) - 255) < 1
    assert runs_of(torch.arange(3.0)).tolist() == [0, 1, 2]
    assert torch.equal(runs_of(torch.stack([tokens, -tokens]))[1], -runs_of(tokens))
    ids = torch.randint(0, 97, (1, 9))
    with torch.no_grad():
        every = llama(ids).logits[0]
        for stride, read in ((1, [*range(8)]), (3, [2, 5]), (4, [3, 7]), (50, [7])):
            logits, following = some_logits(llama, ids, stride)
            torch.testing.assert_close(logits, every[read])
            assert following.tolist() == [int(ids[0, k + 1]) for k in read]
