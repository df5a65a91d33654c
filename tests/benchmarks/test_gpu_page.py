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
    cases = gpu_page.of_part(content, "update")
    assert len(cases) == 16
    fastest = max(case["bytes"] / case["read_seconds"] for case in cases)
    for case in cases:
        shares = " | ".join(
            f"{case['ours'][what][by]['share']:.2f}"
            for what in ("row_sums", "update")
            for by in ("cuda", "triton")
        )
        rate = case["bytes"] / case["read_seconds"]
        row = f"| {case['dtype']} | {case['hidden_size']} | {case['tokens']} | "
        assert f"{row}{1e6 * case['read_seconds']:.1f} | {rate / 1e9:.0f} | {shares} |" in page
        assert rate <= fastest < 4.8e12  # what the data sheet promises
    assert content["commit"][:12] in page
    assert "2026-11-27" in page
    left_out = "compute-sanitizer, racecheck | left out: the time was over before it ended"
    assert left_out in page
    assert "failed: `test_running.py::test_state_dict_round_trip[cuda]`" in page
    assert "stopped at the end of the time" in page


def test_figures_of_a_gpu_beside_the_others_were_measured() -> None:
    page = " ".join((BENCHMARKS.parent / "docs" / "figures.md").read_text().split())
    content = gpu_page.measured()
    (scored,), (model,) = (gpu_page.of_part(content, part) for part in ("pass", "inference"))
    speeds = model["tokens_per_second"]
    for text in (
        f"commit {content['commit'][:7]}",
        f"takes {scored['share']['blocks off']:.2%} longer where its layers are scored, "
        f"{scored['share']['blocks on']:.2%} with all blocks",
        f"{speeds['pruned']['decode']:.0f} tokens/s instead of {speeds['dense']['decode']:.0f}",
        f"{model['phases']['decode']['ratio']['median']:.3f} times as many",
    ):
        assert text in page
