"""What scoring must cost on GPUs that are not here: bytes, arithmetic, the floors they set.

    python benchmarks/predict.py            # prints docs/predicted.md
    python benchmarks/predict.py --write    # and writes it

Nothing below was measured on a GPU. Each layer is read once, before and after, so a token moves
2 * hidden_size * element size bytes; each pair of entries takes two conversions to float64 and
five float64 additions or multiply-adds (csrc/cuda/row_sums.cuh). A floor is the time that memory,
float64 units or conversion units need at their full rate; the largest binds.

Sources: NVIDIA A100 and H100 data sheets (memory bandwidth, dense bfloat16 rate, multiprocessors,
boost clock); CUDA C++ Programming Guide, throughput of native arithmetic instructions (results per
clock and multiprocessor: float64 32 on compute capability 8.0, 64 on 9.0; conversions from and to
64-bit types 16 on both).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "docs" / "predicted.md"
SEQUENCES, LENGTH = 8, 2048
UTILISATION = 0.5  # of the dense bfloat16 peak: what well-run forwards of this size reach
CONVERSIONS, FLOAT64 = 2, 5  # instructions per pair of entries


@dataclass(frozen=True)
class Gpu:
    name: str
    bytes_per_second: float
    bfloat16_flops: float
    multiprocessors: int
    hertz: float
    float64_per_clock: int  # adds or multiply-adds, per multiprocessor
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
    Gpu("A100 40 GB SXM", 1.555e12, 312e12, 108, 1.41e9, 32, 16),
    Gpu("A100 80 GB SXM", 2.039e12, 312e12, 108, 1.41e9, 32, 16),
    Gpu("H100 80 GB SXM", 3.35e12, 989e12, 132, 1.98e9, 64, 16),
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
        "Rates used: "
        + "; ".join(
            f"{gpu.name} {gpu.bytes_per_second / 1e12:.3g} TB/s, "
            f"{gpu.bfloat16_flops / 1e12:.0f} dense bfloat16 TFLOP/s, {gpu.multiprocessors} "
            f"multiprocessors at {gpu.hertz / 1e9:.2f} GHz with {gpu.float64_per_clock} float64 "
            f"and {gpu.conversions_per_clock} conversion results per clock"
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
