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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simdiff_kernels.backends import interpreting_triton
from simdiff_kernels.triton import layer_metrics

ELEMENT_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}  # bytes


def parse_target(text: str) -> GPUTarget:
    """`cuda:80`, `cuda:90`, ... or `hip:gfx942`."""
    backend, _, arch = text.partition(":")
    if backend == "cuda" and arch.isdigit():
        return GPUTarget("cuda", int(arch), 32)
    if backend == "hip" and arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"target must be cuda:<capability> or hip:<arch>, got {text!r}")


def variants(hidden_sizes: tuple[int, ...] = (576, 4096, 8192)) -> Iterator[dict[str, Any]]:
    """Every configuration, element type and use of the main kernel on aligned rows."""
    uses = ((True, False), (False, True))  # (store tokens, reduce): token_metrics, accumulate
    for hidden_size, element, (store, reduce) in itertools.product(
        hidden_sizes, ELEMENT_TYPES, uses
    ):
        yield {"hidden_size": hidden_size, "element": element, "store": store, "reduce": reduce}


def compile_variant(target: GPUTarget, variant: dict[str, Any]) -> Any:
    """Compile the main kernel as `accumulate` or `token_metrics` launches it.

    A variant has a hidden size, element type and use; "aligned": False is for rows of which
    nothing is known, "mask" tells whether there is one (default: with `accumulate`).
    """
    block_t, block_h, num_warps = layer_metrics.configuration(variant["hidden_size"])
    element, reduce, store = variant["element"], variant["reduce"], variant["store"]
    mask = variant.get("mask", reduce)
    constants: dict[str, Any] = {
        "BLOCK_T": block_t,
        "BLOCK_H": block_h,
        "GROUP": layer_metrics.group_size(ELEMENT_TYPES[element], variant.get("aligned", True)),
        "NUM_METRICS": layer_metrics._NUM_METRICS,
        "METRIC_BLOCK": layer_metrics._METRIC_BLOCK,
        "HAS_MASK": mask,
        "STORE_TOKENS": store,
        "REDUCE": reduce,
    }
    pointers = {
        "p_before": f"*{element}",
        "p_after": f"*{element}",
        "p_mask": "*i1" if mask else None,
        "p_per_token": ("*fp64" if element == "fp64" else "*fp32") if store else None,
        "p_partial_moments": "*fp64" if reduce else None,
        "p_partial_tallies": "*i64" if reduce else None,
    }
    # Values divisible by 16 are specialised at launch: pointers, sizes and strides of such rows.
    aligned = {"p_before", "p_after", "hidden_size"} if variant.get("aligned", True) else set()
    if aligned:
        aligned |= {f"{name}_{axis}_stride" for name in ("before", "after")
                    for axis in ("outer", "inner")}  # fmt: skip
    kernel = layer_metrics._layer_metrics_kernel
    return _compile(kernel, target, constants, pointers, aligned, num_warps)


def compile_join(target: GPUTarget) -> Any:
    """Compile the kernel that joins the partial states."""
    constants = {
        "NUM_METRICS": layer_metrics._NUM_METRICS,
        "METRIC_BLOCK": layer_metrics._METRIC_BLOCK,
        "PARTIAL_BLOCK": layer_metrics._PARTIAL_BLOCK,
    }
    pointers: dict[str, str | None] = {
        "p_moments": "*fp64",
        "p_tallies": "*i64",
        "p_partial_moments": "*fp64",
        "p_partial_tallies": "*i64",
    }
    kernel = layer_metrics._join_partials_kernel
    return _compile(kernel, target, constants, pointers, set(pointers), 4)


def _compile(
    kernel: Any,
    target: GPUTarget,
    constants: dict[str, Any],
    pointers: dict[str, str | None],
    aligned: set[str],
    num_warps: int,
) -> Any:
    """Compile one kernel; parameters that are neither constants nor pointers are int32."""
    names = kernel.arg_names
    constants = constants | {name: None for name, kind in pointers.items() if kind is None}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or "i32" for name in names
    }
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        attributes,
    )
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def save_ptx(directory: Path, target: GPUTarget, requests: list[dict[str, Any]]) -> None:
    """Write `<index>.ptx` and `<index>.json` for each variant; "join" is the joining kernel."""
    for index, request in enumerate(requests):
        compiled = compile_join(target) if "join" in request else compile_variant(target, request)
        (directory / f"{index}.ptx").write_text(compiled.asm["ptx"])
        launch = {
            "kernel": compiled.metadata.name,
            "threads": 32 * compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
        }
        (directory / f"{index}.json").write_text(json.dumps(request | launch))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory per thread, shared memory per block of a cubin."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": usage["SHARED"],
        "local": usage["LOCAL"],
    }


def describe(target: GPUTarget, variant: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant and tell its loads and, for CUDA, its use of registers and memory."""
    compiled = compile_variant(target, variant)
    report = {**variant, "target": f"{target.backend}:{target.arch}"}
    if target.backend == "cuda":
        loads = re.findall(
            r"ld\.global(?:\.(?!v\d)\w+)*?(?:\.(v\d))?\.[bfus](\d+)", compiled.asm["ptx"]
        )
        report["load_bits"] = sorted({int((v or "v1")[1:]) * int(bits) for v, bits in loads})
        report.update(resources(compiled.asm["cubin"]))
    return report


def main() -> None:
    """Print one JSON line per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="cuda:90", help="cuda:80, cuda:90, hip:gfx942, ...")
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
    for variant in variants():
        print(json.dumps(describe(target, variant)), flush=True)


if __name__ == "__main__":
    main()
