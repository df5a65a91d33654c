"""Compiles the Triton kernels for a GPU that need not be present, and reports what came out.

`python -m simdiff_kernels.triton.compile --target cuda:90` prints one JSON line per kernel
variant. Must run without `TRITON_INTERPRET`, which replaces the kernels by Python.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simdiff_kernels.backends import interpreting_triton
from simdiff_kernels.triton.fold import THREADS as FOLD_THREADS
from simdiff_kernels.triton.fold import _fold_kernel, _token_metrics_kernel
from simdiff_kernels.triton.launch import launch_options
from simdiff_kernels.triton.row_sums import (
    CONFIGURATIONS,
    THREADS,
    _row_sums_kernel,
    configuration,
)

ELEMENT_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}  # bytes
KERNELS = ("row_sums", "fold", "token_metrics")


def parse_target(text: str) -> GPUTarget:
    """`cuda:80`, `cuda:90`, ... or `hip:gfx942`."""
    backend, _, arch = text.partition(":")
    if backend == "cuda" and arch.isdigit():
        return GPUTarget("cuda", int(arch), 32)
    if backend == "hip" and arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"target must be cuda:<capability> or hip:<arch>, got {text!r}")


def variants(kernels: Sequence[str] = KERNELS) -> Iterator[dict[str, Any]]:
    """Every form in which the operators launch these kernels, masks and strides aside."""
    if "row_sums" in kernels:
        for element, aligned in itertools.product(ELEMENT_TYPES, (True, False)):
            for first in (0, *(row[0] for row in CONFIGURATIONS[:-1])):
                hidden_size = first // ELEMENT_TYPES[element] + 1  # the first of the table's row
                variant = {"kernel": "row_sums", "element": element, "aligned": aligned}
                yield {**variant, "hidden_size": hidden_size, "masked": True, "nested": True}
    for apart in (False, True) if "fold" in kernels else ():
        yield {"kernel": "fold", "kinds": "u8", "apart": apart}
    for element in ("fp32", "fp64") if "token_metrics" in kernels else ():
        yield {"kernel": "token_metrics", "element": element}


def compile_variant(target: GPUTarget, variant: dict[str, Any]) -> Any:
    """Compile a kernel as the operators launch it.

    Of `row_sums`: "hidden_size" chooses the configuration, "nested" tells sequences that do not
    follow each other like tokens. Of `fold`: "kinds" is "u8", "i1" or None.
    """
    if variant["kernel"] == "row_sums":
        size = ELEMENT_TYPES[variant["element"]]
        row = configuration(variant["hidden_size"], size, variant["aligned"])
        states, mask = f"*{variant['element']}", "*i1" if variant["masked"] else None
        constants = {name.upper(): value for name, value in row._asdict().items()}
        constants["NESTED"] = variant["nested"]
        pointers = {"p_sums": "*fp64", "p_before": states, "p_after": states, "p_mask": mask}
        return _compile(_row_sums_kernel, target, constants, pointers, THREADS)
    constants = {"TOKENS": FOLD_THREADS}
    if variant["kernel"] == "token_metrics":
        pointers = {"p_sums": "*fp64", "p_per_token": f"*{variant['element']}"}
        return _compile(_token_metrics_kernel, target, constants, pointers, FOLD_THREADS)
    constants["APART"] = variant["apart"]
    kinds = None if variant["kinds"] is None else f"*{variant['kinds']}"
    pointers = {"p_moments": "*fp64", "p_tallies": "*i64", "p_sums": "*fp64", "p_kinds": kinds}
    return _compile(_fold_kernel, target, constants, pointers, FOLD_THREADS)


def _compile(
    kernel: Any,
    target: GPUTarget,
    constants: dict[str, Any],
    pointers: dict[str, str | None],
    num_threads: int,
) -> Any:
    """Compile one kernel; the types of its numbers stand in its source."""
    constants = constants | {name: None for name, kind in pointers.items() if kind is None}
    signature = {
        param.name: "constexpr"
        if param.name in constants
        else pointers.get(param.name) or param.annotation_type
        for param in kernel.params
    }
    values = {(i,): constants[name] for i, name in enumerate(signature) if name in constants}
    source = ASTSource(kernel, signature, values, {})
    return triton.compile(
        source, target=target, options=launch_options(num_threads, target.warp_size)
    )


def save_ptx(directory: Path, target: GPUTarget, requests: list[dict[str, Any]]) -> None:
    """Write `<index>.ptx` and `<index>.json` for each variant."""
    for index, request in enumerate(requests):
        compiled = compile_variant(target, request)
        (directory / f"{index}.ptx").write_text(compiled.asm["ptx"])
        launch = {
            "kernel": compiled.metadata.name,
            "threads": target.warp_size * compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
        }
        (directory / f"{index}.json").write_text(json.dumps(request | launch))


def _disassemble(cubin: bytes, option: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory per thread, shared memory per block of a cubin."""
    text = _disassemble(cubin, "-res-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": usage["SHARED"],
        "local": usage["LOCAL"],
    }


def _instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of every instruction, its predicate left out."""
    lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*);", sass, re.MULTILINE)
    return [(int(address, 16), text) for address, text in lines]


def loops(sass: str) -> list[Counter[str]]:
    """How often each opcode occurs in each innermost loop, in the order of the code."""
    found = _instructions(sass)
    jumps = [(address, re.search(r"BRA\S* .*?0x([0-9a-f]+)", text)) for address, text in found]
    spans = [(int(to[1], 16), address) for address, to in jumps if to is not None]
    spans = [(first, last) for first, last in spans if first < last]  # a jump to itself ends a file
    inner = [
        (first, last)
        for first, last in spans
        if not any(first <= other[0] and other[1] < last for other in spans)
    ]
    return [
        Counter(text.split()[0] for address, text in found if first <= address <= last)
        for first, last in inner
    ]


def describe(target: GPUTarget, variant: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant and tell, for CUDA, its registers, memory and instructions."""
    compiled = compile_variant(target, variant)
    report = {**variant, "target": f"{target.backend}:{target.arch}"}
    report["threads"] = compiled.metadata.num_warps * target.warp_size
    if target.backend == "cuda":
        report.update(resources(compiled.asm["cubin"]), shared=compiled.metadata.shared)
        sass = _disassemble(compiled.asm["cubin"], "-sass")
        report["opcodes"] = Counter(text.split()[0] for _, text in _instructions(sass))
        report["loops"] = loops(sass)
    return report


def main() -> None:
    """Print one JSON line per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="cuda:90", help="cuda:80, cuda:90, hip:gfx942, ...")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, metavar="KERNEL")
    parser.add_argument(
        "--save",
        nargs=2,
        metavar=("DIRECTORY", "VARIANTS"),
        help="write the PTX of these variants, a JSON list, instead of describing all",
    )
    arguments = parser.parse_args()
    target = parse_target(arguments.target)
    if interpreting_triton():
        raise SystemExit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if arguments.save:
        save_ptx(Path(arguments.save[0]), target, json.loads(arguments.save[1]))
        return
    for variant in variants(arguments.kernels):
        print(json.dumps(describe(target, variant)), flush=True)


if __name__ == "__main__":
    main()
