"""What an update must cost on GPUs that nobody ran: the section `predicted` of docs/gpu.md.

    python benchmarks/predict.py            # prints the section
    python benchmarks/predict.py --write    # and puts it into docs/gpu.md

Nothing below was measured on the cards that it names. Memory: bandwidth of the data sheet, times
the share of it that a pure read reached on the H200, times the share of that read that a kernel
which only reads and sums reached there. Arithmetic: instructions by their rates. A floor is the
time that one of them needs at its full rate; the largest binds.

Sources: NVIDIA data sheets (bandwidth, dense bfloat16 rate, multiprocessors, boost clock; the
clock of the B300 is taken to be that of the B200); CUDA C++ Programming Guide, throughput of native
arithmetic instructions (results per clock and multiprocessor: float64 half of float32, or 2;
conversions from and to 64-bit types 16, or 2; integer operations, which widen bfloat16, 64; four
warps of 32 issue an instruction each).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import gpu_page


@dataclass(frozen=True)
class Instructions:
    """Of one lane, for so many 16-byte vectors of each of the two states."""

    vectors: int
    float64: int
    conversions: int
    """To float64."""
    float32_per_entry: float
    widenings: int
    """To float32, for each 16-bit entry of each state."""


# Row sums: short float32 sums, widened and added once in four vectors, for four sums of a token.
ROW_SUMS = Instructions(vectors=4, float64=4, conversions=4, float32_per_entry=5, widenings=1)
# What the kernels of commit 069c14e do: both entries of a pair widened, five operations in float64,
# for the 8 entries of a vector.
FLOAT64 = Instructions(vectors=1, float64=40, conversions=16, float32_per_entry=0, widenings=0)


@dataclass(frozen=True)
class BlockInstructions:
    """Of all blocks, warp instructions for one token of so many states of so many entries."""

    states: int
    hidden_size: int
    issued: int
    float32: int
    float64: int
    """After the last entry of a token: its pairs' distances, and their fold. An estimate from the
    listing; all others are counted in the machine code (tests/kernels/test_cuda_compile.py)."""


BLOCKS = BlockInstructions(
    states=33, hidden_size=4096, issued=241_000, float32=151_000, float64=13_000
)
GROUPS = 128  # of sequences, whose states are kept apart

SEQUENCES, LENGTH = 8, 2048
ELEMENT_BYTES = 2
ISSUED_PER_CLOCK, INTEGER_PER_CLOCK = 128, 64


@dataclass(frozen=True)
class Gpu:
    name: str
    bytes_per_second: float
    bfloat16_flops: float
    multiprocessors: int
    hertz: float
    float32_per_clock: int  # adds or multiply-adds, per multiprocessor
    float64_per_clock: int
    conversions_per_clock: int

    @property
    def clocks(self) -> float:
        """Of all multiprocessors in a second."""
        return self.multiprocessors * self.hertz


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int

    def layer_flops(self, length: int) -> float:
        """Of one token in one decoder layer: projections, causal attention over half, gated MLP."""
        head_size = self.hidden_size // self.heads
        projections = self.hidden_size * (2 * self.hidden_size + 2 * self.kv_heads * head_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        attention = 2 * self.hidden_size * length / 2
        return 2 * (projections + mlp + attention)


H200 = Gpu("H200", 4.8e12, 989e12, 132, 1.98e9, 128, 64, 16)
GPUS = (
    Gpu("A100 40 GB SXM", 1.555e12, 312e12, 108, 1.41e9, 64, 32, 16),
    Gpu("A100 80 GB SXM", 2.039e12, 312e12, 108, 1.41e9, 64, 32, 16),
    Gpu("H100 80 GB SXM", 3.35e12, 989e12, 132, 1.98e9, 128, 64, 16),
    Gpu("B200", 8e12, 2250e12, 148, 1.965e9, 128, 64, 16),
    Gpu("B300", 8e12, 2250e12, 148, 1.965e9, 128, 2, 2),
    Gpu("RTX 4090", 1.008e12, 165e12, 128, 2.52e9, 128, 2, 2),
    Gpu("A40", 0.696e12, 149.7e12, 84, 1.74e9, 128, 2, 2),
    Gpu("L4", 0.3e12, 121e12, 58, 2.04e9, 128, 2, 2),
)
MODEL = Model("LLaMA-3.1-8B", 32, 4096, 14336, 32, 8)
LARGER = Model("LLaMA-3.1-70B", 80, 8192, 28672, 64, 8)


@dataclass(frozen=True)
class Reached:
    """Shares that the H200 reached, from the committed result."""

    read: float
    """A pure read, of the data sheet's bandwidth."""
    kernel: float
    """The kernel that only reads and sums, of that read."""
    peak: float
    """The forward, of the dense bfloat16 peak."""

    @classmethod
    def of(cls, content: dict[str, Any]) -> Reached:
        """From the result, at the shape nearest to the one predicted."""
        cases = {case["case"]: case for case in gpu_page.of_part(content, "update")}
        long, near = cases["bf16 131072 x 4096"], cases["bf16 8192 x 4096"]
        (forward,) = gpu_page.of_part(content, "pass")
        sequences, length = forward["tokens"]
        flops = sequences * length * MODEL.layers * MODEL.layer_flops(length)
        return cls(
            read=long["bytes"] / long["read_seconds"] / H200.bytes_per_second,
            kernel=near["ours"]["row_sums"]["cuda"]["share"],
            peak=flops / forward["seconds"]["bare"] / H200.bfloat16_flops,
        )


def floors(gpu: Gpu, work: Instructions, entries: float) -> dict[str, float]:
    """Seconds for so many pairs of bfloat16 entries, by what binds; memory is apart."""
    groups = entries / (work.vectors * 16 / ELEMENT_BYTES)
    float32, widenings = entries * work.float32_per_entry, 2 * entries * work.widenings
    additions = groups * work.float64 / gpu.float64_per_clock
    conversions = groups * work.conversions / gpu.conversions_per_clock
    one_unit = gpu.float64_per_clock == gpu.conversions_per_clock  # where float64 is slow
    clocks = {
        "float64": additions + conversions if one_unit else max(additions, conversions),
        "float32": float32 / gpu.float32_per_clock,
        "widening": widenings / INTEGER_PER_CLOCK,
        "issue": (float32 + widenings + groups * (work.float64 + work.conversions))
        / ISSUED_PER_CLOCK,
    }
    return {name: count / gpu.clocks for name, count in clocks.items()}


@dataclass(frozen=True)
class Update:
    """What an update of one layer is predicted to take on a card."""

    read: float
    """Seconds of a pure read of both states."""
    floors: dict[str, float]
    seconds: float
    binds: str
    share_of_forward: float
    float64_cap: float
    """The most that a kernel with float64 for every entry can reach of that read."""


def predict(gpu: Gpu, reached: Reached) -> Update:
    """One update of a layer by a batch of SEQUENCES x LENGTH tokens."""
    tokens = SEQUENCES * LENGTH
    entries = tokens * MODEL.hidden_size
    read = 2 * entries * ELEMENT_BYTES / (gpu.bytes_per_second * reached.read)
    limits = {"memory": read / reached.kernel, **floors(gpu, ROW_SUMS, entries)}
    binds = max(limits, key=lambda name: limits[name])
    forward = tokens * MODEL.layer_flops(LENGTH) / (gpu.bfloat16_flops * reached.peak)
    return Update(
        read=read,
        floors=limits,
        seconds=limits[binds],
        binds=binds,
        share_of_forward=limits[binds] / forward,
        float64_cap=min(1.0, read / max(floors(gpu, FLOAT64, entries).values())),
    )


def block_milliseconds(gpu: Gpu, reached: Reached) -> dict[str, float]:
    """Floors of one update of all blocks by SEQUENCES x LENGTH tokens, by what binds."""
    tokens, clocks = SEQUENCES * LENGTH, gpu.clocks
    nbytes = tokens * BLOCKS.states * BLOCKS.hidden_size * ELEMENT_BYTES
    warp = 32
    seconds = {
        "memory": nbytes / (gpu.bytes_per_second * reached.read),
        "issue": tokens * BLOCKS.issued * warp / ISSUED_PER_CLOCK / clocks,
        "float32": tokens * BLOCKS.float32 * warp / gpu.float32_per_clock / clocks,
        "float64": tokens * BLOCKS.float64 * warp / gpu.float64_per_clock / clocks,
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def block_lines(reached: Reached) -> list[str]:
    """All blocks: what binds, and how long it must take at least."""
    rows = []
    for gpu in (H200, *GPUS):
        floors = block_milliseconds(gpu, reached)
        binds = max(floors, key=lambda name: floors[name])
        rows.append(
            (
                gpu.name,
                *(f"{value:.1f}" for value in floors.values()),
                binds,
                f"{floors[binds]:.1f}",
            )
        )
    text = (
        f"All blocks of {BLOCKS.states} bfloat16 states of {SEQUENCES} × {LENGTH} tokens of "
        f"{BLOCKS.hidden_size} entries: {BLOCKS.issued:,} warp instructions a token, of which "
        f"{BLOCKS.float32:,} are the float32 operations of the differences; {BLOCKS.float64:,} in "
        "float64 once the token is read (an estimate). Floors in ms; no kernel issues in every "
        "cycle, so that the times will be longer where issue binds."
    )
    return [
        *textwrap.wrap(text, 100),
        "",
        *gpu_page.table(("GPU", *floors, "binds", "at least, ms"), rows),
    ]


def memory_lines() -> list[str]:
    """What a pass with blocks holds at its peak beside the model, in bytes of its own tensors."""
    rows, tokens = [], SEQUENCES * LENGTH
    for model in (MODEL, LARGER):
        states = model.layers + 1
        parts = (
            states * tokens * model.hidden_size * ELEMENT_BYTES,
            model.layers * tokens * 32,
            min(256 << 20, tokens * (16 * states * (states - 1) // 2 + 32 * model.layers)),
            2 * GROUPS * 11 * states * states * 8,
        )
        name = f"{model.name}, {states} states"
        rows.append((name, *(f"{part / 1e9:.2f}" for part in parts), f"{sum(parts) / 1e9:.2f}"))
    columns = ("model", "hidden states", "row sums", "pairs", "states of the groups", "together")
    text = (
        f"Memory of a pass with blocks over batches of {SEQUENCES} × {LENGTH} tokens, in GB beside "
        f"the model and its own activations, {GROUPS} groups of sequences. The hidden states are "
        "those of the forward, kept until its last layer has run, not copies; `--max-state-bytes` "
        "bounds them by running fewer sequences at a time."
    )
    return [*textwrap.wrap(text, 100), "", *gpu_page.table(columns, rows)]


def document() -> str:
    """The section `predicted`."""
    reached = Reached.of(gpu_page.measured())
    columns = (
        "GPU",
        "TB/s, data sheet",
        "memory, µs",
        "float64, µs",
        "float32, µs",
        "widening, µs",
        "issue, µs",
        "binds",
        "update, µs",
        "share of the forward",
        "float64 per entry: at most",
    )
    rows = []
    for gpu in GPUS:
        found = predict(gpu, reached)
        rows.append(
            (
                gpu.name,
                f"{gpu.bytes_per_second / 1e12:.4g}",
                *(f"{1e6 * seconds:.0f}" for seconds in found.floors.values()),
                found.binds,
                f"{1e6 * found.seconds:.0f}",
                f"{found.share_of_forward:.2%}",
                f"{found.float64_cap:.0%} of a read",
            )
        )
    text = (
        f"One update by {SEQUENCES} × {LENGTH} tokens of {MODEL.hidden_size} bfloat16 entries, row "
        "sums in short float32 sums. Memory: the data sheet's bandwidth, times the "
        f"{reached.read:.2f} of it that a pure read reached on the H200, times the "
        f"{reached.kernel:.2f} of that read that row sums reached there (8192 tokens). "
        f"Arithmetic at its full rate: for {ROW_SUMS.vectors} vectors of 16 bytes of each state "
        f"{ROW_SUMS.conversions} conversions to float64 and {ROW_SUMS.float64} additions, for a "
        f"pair of entries {ROW_SUMS.float32_per_entry:g} float32 operations, for an entry one "
        f"conversion to float32. The forward is that of {MODEL.name} at the {reached.peak:.0%} of "
        "the dense bfloat16 peak that it reached on the H200. The last column is what float64 for "
        "every entry would allow."
    )
    rates = "; ".join(
        f"{gpu.name} {gpu.bfloat16_flops / 1e12:.4g} dense bfloat16 TFLOP/s, "
        f"{gpu.multiprocessors} multiprocessors at {gpu.hertz / 1e9:.4g} GHz with "
        f"{gpu.float32_per_clock} float32, {gpu.float64_per_clock} float64 and "
        f"{gpu.conversions_per_clock} float64 conversion results per clock"
        for gpu in GPUS
    )
    lines = [
        *textwrap.wrap(text, 100),
        "",
        *gpu_page.table(columns, rows),
        "",
        *block_lines(reached),
        "",
        *memory_lines(),
        "",
        *textwrap.wrap(f"Rates by data sheet: {rates}.", 100),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    gpu_page.command(__doc__ or "", "predicted", document)
