"""docs/gpu.md is what its scripts write, and figures.md says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gpu_page
import predict
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "document"),
    [("measured", gpu_page.document), ("predicted", predict.document)],
)
def test_the_page_of_gpus_is_what_its_scripts_write(name: str, document: Callable[[], str]) -> None:
    page = gpu_page.PAGE.read_text()
    assert gpu_page.section(page, name) == document()
    assert gpu_page.with_section(page, name, document()) == page
    assert gpu_page.section(gpu_page.with_section(page, name, "other\n"), name) == "other\n"
    with pytest.raises(ValueError, match="gpu.md: must hold .* once"):
        gpu_page.section(page.replace(f"<!-- {name}: end -->", ""), name)


def test_every_measured_case_is_on_the_page() -> None:
    page, content = gpu_page.document(), gpu_page.measured()
    for case in content["updates"]:
        shares = " | ".join(f"{case['share_of_read'][key]:.2f}" for key in ("cuda", "triton"))
        row = f"| {case['dtype']} | {case['hidden_size']} | {case['num_tokens']} | "
        assert f"{row}{case['read_microseconds']:g} | {shares} |" in page
        # A read moves both states: at the limit, or below it where there is little to read.
        size = {"float32": 4}.get(case["dtype"], 2) * case["hidden_size"] * case["num_tokens"]
        rate = 2 * size / (1e-6 * case["read_microseconds"])
        assert rate <= 1.02 * content["limits"]["read_bytes_per_second"]
    assert content["commit"] in page
    assert content["date"] in page


def test_figures_of_a_gpu_beside_the_others_were_measured() -> None:
    page = " ".join((BENCHMARKS.parent / "docs" / "figures.md").read_text().split())
    content = gpu_page.measured()
    rates = content["gigabytes_per_second"][0]
    speed, costs = content["inference"], content["calibration_pass"]["share_of_forward"]
    for text in (
        f"commit {content['commit']}",
        f"{rates['cuda']} GB/s (`cuda`) and {rates['triton']} GB/s (`triton`)",
        f"torch.compile reaches {rates['torch.compile']} GB/s, with max-autotune "
        f"{rates['torch.compile, max-autotune']}, eager PyTorch {rates['eager']}",
        f"{100 * costs[1]['cuda']:.3g}% longer where its layers are scored, "
        f"{100 * costs[2]['cuda']:.3g}% (`triton`: {100 * costs[2]['triton']:.3g}%) with all",
        f"{speed['graphs']['pruned']} tokens/s instead of {speed['graphs']['dense']}",
        f"{speed['graphs']['ratio']} times as many, and prefills {speed['prefill_ratio']} times",
        f"by bytes the ideal is {speed['graphs']['ideal_by_bytes']}",
    ):
        assert text in page
