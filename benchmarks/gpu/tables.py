"""From the record to what people read: which goals are met, and one table for each part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu.blocks import VARIANTS
from gpu.programs import TOOLS
from gpu.steps import Result
from gpu.updates import CASES

# Goals that are not of one shape; those of shapes stand in updates.CASES.
TRITON_BEHIND, FROM_TOKENS = 0.05, 8192
TIMES_COMPILED, TIMES_EAGER = 1.15, 20.0
BLOCKS_SECONDS = 4.5e-3
PASS_SHARES = {"blocks off": 0.010, "blocks on": 0.020}


@dataclass(frozen=True)
class Goal:
    """What was wanted of what, and what was reached at worst; None where nothing was measured."""

    name: str
    wanted: float
    reached: float | None
    at_most: bool = False

    @property
    def met(self) -> str:
        """For the table."""
        if self.reached is None:
            return "not measured"
        met = self.reached <= self.wanted if self.at_most else self.reached >= self.wanted
        return "yes" if met else "NO"


def goals(results: list[Result]) -> list[Goal]:
    """All goals, measured or not."""
    return [*_update_goals(results), *_peer_goals(results), *_other_goals(results)]


def _part(results: list[Result], part: str) -> list[Result]:
    return [result for result in results if result["part"] == part]


def _update_goals(results: list[Result]) -> Iterator[Goal]:
    measured = {result["case"]: result for result in _part(results, "update")}
    shares = {
        (case, backend): found["share"]
        for case, result in measured.items()
        for backend, found in result.get("ours", {}).get("row_sums", {}).items()
        if "share" in found
    }
    for case in CASES:
        if case.wanted is not None:
            reached = shares.get((str(case), "cuda"))
            yield Goal(f"row_sums, cuda, {case}: share of the read", case.wanted, reached)
    long = [str(case) for case in CASES if case.tokens >= FROM_TOKENS]
    both = [case for case in long if {(case, "cuda"), (case, "triton")} <= set(shares)]
    behind = [shares[case, "cuda"] - shares[case, "triton"] for case in both]
    name = f"row_sums, triton behind cuda from {FROM_TOKENS} tokens, {len(both)} of {len(long)}"
    yield Goal(f"{name} shapes", TRITON_BEHIND, max(behind, default=None), at_most=True)


def _peer_goals(results: list[Result]) -> Iterator[Goal]:
    def ratios(other: str, chosen: list[Result]) -> list[float]:
        found = []
        for result in chosen:
            seconds = {k: v["seconds"] for k, v in result["subjects"].items() if "seconds" in v}
            if {other, "update, cuda"} <= set(seconds):
                found.append(seconds[other] / seconds["update, cuda"])
        return found

    peers = [result for result in _part(results, "peers") if "subjects" in result]
    long = [r for r in peers if (r["dtype"], r["hidden_size"]) == ("bf16", 4096)]
    for name, other, wanted, chosen in (
        ("torch.compile in one pass", "torch.compile, one pass", TIMES_COMPILED, peers),
        ("eager, bf16, hidden size 4096", "eager", TIMES_EAGER, long),
    ):
        found = ratios(other, chosen)
        name = f"update, cuda: times {name}, {len(found)} shapes"
        yield Goal(name, wanted, min(found, default=None))


def _other_goals(results: list[Result]) -> Iterator[Goal]:
    blocks = {result["case"]: result.get("seconds") for result in _part(results, "blocks")}
    for name in VARIANTS:
        yield Goal(f"all blocks, {name}: seconds", BLOCKS_SECONDS, blocks.get(name), at_most=True)
    shares: Result = next((r["share"] for r in _part(results, "pass") if "share" in r), {})
    for name, wanted in PASS_SHARES.items():
        yield Goal(f"pass, {name}: above the bare forward", wanted, shares.get(name), at_most=True)
    tools = _part(results, "compute-sanitizer")
    faults = sum(result.get("errors", 0) + result.get("warnings", 0) for result in tools)
    all_ran = sum("errors" in result for result in tools) == len(TOOLS)
    reached = faults if faults or all_ran else None
    yield Goal("compute-sanitizer: errors and warnings", 0, reached, at_most=True)
    tests = _part(results, "tests")
    failed = sum(len(result.get("failed_tests", ())) for result in tests)
    all_ran = bool(tests) and all(result.get("ended") and result["passed"] for result in tests)
    yield Goal("tests: failed", 0, failed if failed or all_ran else None, at_most=True)


def anything_wrong(results: list[Result]) -> bool:
    """Whether a step failed, a result was wrong, or a test or the sanitizer found something."""
    subjects = [found for result in results for found in _found(result)]
    return any("wrong" in found for found in subjects) or any(
        any(result.get(key) for key in ("failed", "failed_tests", "errors", "warnings"))
        for result in results
    )


def _found(result: Result) -> list[Result]:
    """The result itself and what it holds of single subjects."""
    ours = [
        found for by_backend in result.get("ours", {}).values() for found in by_backend.values()
    ]
    return [result, *ours, *result.get("subjects", {}).values()]


def markdown(content: Result) -> str:
    """The page that people read, of whatever is there."""
    results, on_gpu = content["results"], content["device"] == "cuda"
    lines = [f"# Scoring on {content['name']}", ""]
    if not on_gpu:
        lines += ["**No GPU: this shows that the program runs, and no figure of a GPU.**", ""]
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    lines += [
        f"{content['machine']}; {versions}; commit {content['commit']}.",
        f"The limit is {content['limit']}.",
    ]
    if not content.get("complete"):
        lines += ["", "**It has not ended: here is what there is so far.**"]
    if on_gpu and not content["quick"]:
        lines += ["", "| goal | wanted | reached | met |", "|---|---|---|---|"]
        for goal in goals(results):
            bound = f"{'≤' if goal.at_most else '≥'} {goal.wanted:g}"
            reached = "" if goal.reached is None else f"{goal.reached:.3g}"
            lines.append(f"| {goal.name} | {bound} | {reached} | {goal.met} |")
    for part, (header, rows) in _TABLES.items():
        found = [
            row
            for result in results
            if result["part"] == part and "failed" not in result
            for row in rows(result)
        ]
        if found:
            names = header.split(", ")
            table = [names, ["---"] * len(names), *found]
            lines += ["", *(f"| {' | '.join(map(str, cells))} |" for cells in table)]
    failed = [result for result in results if "failed" in result]
    lines += ["", *(f"- {r['part']}, {r['case']} FAILED: {r['failed']}" for r in failed)]
    lines += [f"- {e['part']}, {e['case']}: left out: {e['why']}" for e in content["left_out"]]
    return "\n".join(lines).rstrip() + "\n"


Rows = Iterator[list[str]]


def _update_rows(result: Result) -> Rows:
    read = result["read_seconds"]
    start = [
        result["case"],
        f"{1e6 * read:.1f}",
        f"{result['bytes'] / read / 1e9:.0f}",
        f"{read / result['copy_seconds']:.2f}",
    ]
    for operator, by_backend in result["ours"].items():
        for backend, found in by_backend.items():
            if "wrong" in found:
                cells = [f"WRONG, not timed: {found['wrong']}", "", ""]
            else:
                seconds, host = 1e6 * found["seconds"], 1e6 * found["host_seconds"]
                cells = [f"{seconds:.1f}", f"{found['share']:.2f}", f"{host:.1f}"]
            yield [*start, operator, backend, *cells]


def _peer_rows(result: Result) -> Rows:
    subjects = result["subjects"]
    times = {name: found["seconds"] for name, found in subjects.items() if "seconds" in found}
    ours = min((t for name, t in times.items() if name.startswith("update")), default=None)
    for name, found in subjects.items():
        if "wrong" in found:
            yield [result["case"], name, f"WRONG, not timed: {found['wrong']}", "", ""]
            continue
        rate = f"{result['bytes'] / times[name] / 1e9:.0f}"
        ratio = "" if ours is None else f"{times[name] / ours:.2f}"
        yield [result["case"], name, f"{1e6 * times[name]:.1f}", rate, ratio]


def _block_rows(result: Result) -> Rows:
    tokens = " x ".join(map(str, result["tokens"]))
    shape = f"{result['num_states']} of {tokens} x {result['hidden_size']}"
    if "wrong" in result:
        cells = [f"WRONG, not timed: {result['wrong']}", ""]
    else:
        cells = [f"{1e3 * result['seconds']:.2f}", f"{result['share']:.2f}"]
    yield [result["case"], shape, result["backend"], *cells]


def _pass_rows(result: Result) -> Rows:
    layers, tokens = result["shape"]["num_hidden_layers"], " x ".join(map(str, result["tokens"]))
    what = f"{layers} layers of {result['shape']['hidden_size']}, {tokens} tokens"
    if "wrong" in result:
        yield [what, f"WRONG, not timed: {result['wrong']}", "", "", ""]
        return
    for name, seconds in result["seconds"].items():
        share, end = result["share"].get(name), result["finish_seconds"].get(name)
        peak = result["peak_bytes"][name]
        yield [
            f"{what}, {name}",
            f"{seconds:.4f}",
            "" if share is None else f"{share:.2%}",
            "" if peak is None else f"{peak / 1e9:.2f}",
            "" if end is None else f"{end:.2f}",
        ]


def _inference_rows(result: Result) -> Rows:
    out = f"{result['removed']} of {result['shape']['num_hidden_layers']} layers out"
    sizes = f"batch {result['batch_size']}, prompt {result['prompt_length']}"
    what = f"{out}, {sizes}, {result['new_tokens']} new tokens, {result['decoding']}"
    for phase, found in result["phases"].items():
        speeds = [f"{result['tokens_per_second'][name][phase]:.0f}" for name in ("dense", "pruned")]
        ideal = f"{found['ideal']:.3f}" if "ideal" in found else ""
        yield [what, phase, *speeds, f"{found['ratio']['median']:.3f}", ideal]


def _program_rows(result: Result) -> Rows:
    known = ("part", "case", "took_seconds")
    told = ", ".join(f"{key}: {value}" for key, value in result.items() if key not in known)
    yield [result["case"], told]


# By part: the header, and the rows of a result.
_TABLES: dict[str, tuple[str, Callable[[Result], Rows]]] = {
    "update": (
        "shape, read µs, read GB/s, copy of the read, operator, backend, µs, of the read, host µs",
        _update_rows,
    ),
    "peers": ("shape, who, µs, GB/s, times our update", _peer_rows),
    "blocks": ("all blocks, states, backend, ms, of the read", _block_rows),
    "pass": ("pass, seconds a batch, above the bare forward, peak GB, at its end s", _pass_rows),
    "inference": ("pruned inference, phase, dense tokens/s, pruned, times, ideal", _inference_rows),
    "compute-sanitizer": ("compute-sanitizer, found", _program_rows),
    "tests": ("tests, result", _program_rows),
    "demo": ("main job, result", _program_rows),
}
