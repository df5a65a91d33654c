"""What scoring must cost on GPUs that are not here: bytes, arithmetic, the floors they set.

    python benchmarks/predict.py            # prints docs/predicted.md
    python benchmarks/predict.py --write    # and writes it

Nothing below was measured on a GPU. Each layer is read once, before and after, so a token moves
2 * hidden_size * element size bytes; each pair of entries takes two conversions to float64 and
five float64 additions or multiply-adds (csrc/cuda/row_sums.cuh). A floor is the time that memory,
float64 units or conversion units need at their full rate; the largest binds.

All blocks in one pass (csrc/cuda/block_metrics.cu) read every state once and form all pairs of them
from shared memory: three float32 operations per pair and entry, and what it takes to issue these,
counted in the machine code of CUDA 13.0 for sm_90.

Sources: NVIDIA A100 and H100 data sheets (memory bandwidth, dense bfloat16 rate, multiprocessors,
boost clock); CUDA C++ Programming Guide, throughput of native arithmetic instructions (results per
clock and multiprocessor: float32 64 on compute capability 8.0, 128 on 9.0; float64 32 and 64;
conversions from and to 64-bit types 16 on both; four warps issue an instruction each).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "docs" / "predicted.md"
SEQUENCES, LENGTH = 8, 2048
UTILISATION = 0.5  # of the dense bfloat16 peak: what well-run forwards of this size reach
CONVERSIONS, FLOAT64 = 2, 5  # instructions per pair of entries
# Of accumulate_blocks on bfloat16 states: instructions of a warp, and the float32 ones among them,
# for 128 entries of 4 x 4 pairs and of a tile on the diagonal; instructions for the sums of a tile
# and slice of 2 KB, for folding a tile's metrics, to load 256 entries of a state.
TILE_STEP, DIAGONAL_STEP = (251, 192), (135, 72)
TILE_SLICE, TILE_FOLD, STATE_LOAD = 200, 550, 60
WARPS, SLICE_ENTRIES, ISSUED_PER_CLOCK = 8, 1024, 4


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


GPUS = (
    Gpu("A100 40 GB SXM", 1.555e12, 312e12, 108, 1.41e9, 64, 32, 16),
    Gpu("A100 80 GB SXM", 2.039e12, 312e12, 108, 1.41e9, 64, 32, 16),
    Gpu("H100 80 GB SXM", 3.35e12, 989e12, 132, 1.98e9, 128, 64, 16),
)
MODELS = (
    Model("LLaMA2-7B", 32, 4096, 11008, 32, 32),
    Model("LLaMA2-13B", 40, 5120, 13824, 40, 40),
    Model("LLaMA3.1-8B", 32, 4096, 14336, 32, 8),
    Model("LLaMA3.1-70B", 80, 8192, 28672, 64, 8),
)
ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}


def floors(gpu: Gpu, hidden_size: int, element_bytes: int, tokens: int) -> dict[str, float]:
    """Seconds for one layer, by what binds."""
    pairs = tokens * hidden_size
    clocks = gpu.multiprocessors * gpu.hertz
    return {
        "memory": 2 * pairs * element_bytes / gpu.bytes_per_second,
        "float64": FLOAT64 * pairs / (clocks * gpu.float64_per_clock),
        "conversions": CONVERSIONS * pairs / (clocks * gpu.conversions_per_clock),
    }


def forward_seconds(gpu: Gpu, model: Model, tokens: int, utilisation: float) -> float:
    """Of one decoder layer in bfloat16."""
    return tokens * model.layer_flops(LENGTH) / (gpu.bfloat16_flops * utilisation)


def block_floors(gpu: Gpu, states: int, hidden_size: int, tokens: int) -> dict[str, float]:
    """Seconds for all pairs of bfloat16 states of a batch, by what binds."""
    groups = -(-states // 4)
    tiles = groups * (groups + 1) // 2
    slices = -(-hidden_size // SLICE_ENTRIES)
    uneven = -(-tiles // WARPS) * WARPS / tiles  # tiles are dealt out to the warps
    issued, float32 = (
        ((tiles - groups) * whole + groups * diagonal) * hidden_size / 128 * uneven
        for whole, diagonal in zip(TILE_STEP, DIAGONAL_STEP, strict=True)
    )
    rest = tiles * (slices * TILE_SLICE + TILE_FOLD) + states * hidden_size / 256 * STATE_LOAD
    clocks, entries = gpu.multiprocessors * gpu.hertz, tokens * hidden_size
    return {
        "memory": states * entries * 2 / gpu.bytes_per_second,
        "float32": tokens * float32 * 32 / (clocks * gpu.float32_per_clock),
        "instructions": tokens * (issued + rest) / (clocks * ISSUED_PER_CLOCK),
        "conversions": states * entries / (clocks * gpu.conversions_per_clock),
    }


def block_table() -> list[str]:
    tokens = SEQUENCES * LENGTH
    lines = [
        "| GPU | model | pairs | memory, ms | float32, ms | instructions, ms | conversions, ms "
        "| share of the forward | without overlap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        for model in MODELS:
            states = model.layers + 1
            times = block_floors(gpu, states, model.hidden_size, tokens)
            largest = max(times.values())
            forward = model.layers * forward_seconds(gpu, model, tokens, UTILISATION)
            row = [gpu.name, model.name, f"{states * (states - 1) // 2}"]
            row += [f"{1e3 * seconds:.2f}" for seconds in times.values()]
            row.append(f"{largest / forward:.2%}")
            row.append(f"{(times['memory'] + largest) / forward:.2%}")
            lines.append(f"| {' | '.join(row)} |")
    return lines


def work_table() -> list[str]:
    lines = [
        "| model | hidden size | bytes, bfloat16 | bytes, float32 | float64 operations "
        "| conversions |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        pairs = model.hidden_size
        cells = [2 * pairs * size for size in ELEMENT_BYTES.values()]
        cells += [FLOAT64 * pairs, CONVERSIONS * pairs]
        numbers = " | ".join(f"{cell:,}" for cell in cells)
        lines.append(f"| {model.name} | {pairs} | {numbers} |")
    return lines


def floor_table() -> list[str]:
    tokens = SEQUENCES * LENGTH
    lines = [
        "| GPU | model | dtype | memory, µs | float64, µs | conversions, µs | binds "
        f"| share of the forward at {UTILISATION:.0%} of peak | at 100% |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        for model in MODELS:
            for dtype, size in ELEMENT_BYTES.items():
                times = floors(gpu, model.hidden_size, size, tokens)
                binding = max(times, key=lambda name: times[name])
                row = [gpu.name, model.name, dtype]
                row += [f"{1e6 * seconds:.0f}" for seconds in times.values()]
                row.append(binding)
                for utilisation in (UTILISATION, 1.0):
                    forward = forward_seconds(gpu, model, tokens, utilisation)
                    row.append(f"{times[binding] / forward:.2%}")
                lines.append(f"| {' | '.join(row)} |")
    return lines


def document() -> str:
    parts = [
        "# Predicted cost of scoring on A100 and H100",
        "",
        "**Every figure on this page is predicted, none was measured on a GPU.** It is written by",
        "`python benchmarks/predict.py --write`; `make gpu-check` measures the same on a GPU.",
        "",
        "Scoring reads what enters and what leaves a layer once. Per token and layer:",
        "",
        *work_table(),
        "",
        f"Floors for one layer and one batch of {SEQUENCES} × {LENGTH} tokens, and the share that",
        "scoring every layer then takes of a bfloat16 calibration forward through the decoder",
        "layers (projections, causal attention, gated MLP; no logits). A floor is the time that",
        "memory, float64 units or the units that convert to float64 need at their full rate; the",
        f"largest of the three binds. The share is given for a forward at {UTILISATION:.0%} of the",
        "dense bfloat16 peak, which is what well-run forwards of this size reach, and for one at",
        "all of it, the hardest case for scoring. The float32 rows score states kept in float32",
        "beside the same bfloat16 forward.",
        "",
        *floor_table(),
        "",
        "## All blocks in one pass",
        "",
        "`RunningBlockScores` reads each of the L + 1 bfloat16 states once and measures every",
        "pair. Floors for the same batch: memory; the float32 operations of the kernel at full",
        "rate, three for each pair and entry and some more for pairs that fill up its tiles; all",
        "instructions that it issues; the conversions to float64 for the norms. Shares are of a",
        f"forward at {UTILISATION:.0%} of peak: of the largest floor, as two blocks of threads on",
        "each multiprocessor overlap loads and arithmetic, and of the loads and then the largest",
        "floor without any overlap.",
        "",
        *block_table(),
        "",
        "Rates used: "
        + "; ".join(
            f"{gpu.name} {gpu.bytes_per_second / 1e12:.3g} TB/s, "
            f"{gpu.bfloat16_flops / 1e12:.0f} dense bfloat16 TFLOP/s, {gpu.multiprocessors} "
            f"multiprocessors at {gpu.hertz / 1e9:.2f} GHz with {gpu.float32_per_clock} float32, "
            f"{gpu.float64_per_clock} float64 and {gpu.conversions_per_clock} conversion results "
            "per clock"
            for gpu in GPUS
        )
        + ".",
        "Sources: the NVIDIA data sheets of both GPUs; CUDA C++ Programming Guide, throughput of",
        "native arithmetic instructions.",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.name}")
    text = document()
    if parser.parse_args().write:
        TARGET.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
