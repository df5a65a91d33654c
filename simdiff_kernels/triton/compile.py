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
from simdiff_kernels.triton import block_metrics, block_partials, layer_metrics, partials
from simdiff_kernels.triton.configurations import (
    CONFIGURATIONS,
    THREADS,
    configuration,
    launch_options,
)

ELEMENT_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}  # bytes
# What a launch asks of the main kernel: (HAS_MASK, STORE_TOKENS, REDUCE).
USES = {
    "token_metrics": (False, True, False),
    "accumulate": (False, False, True),
    "accumulate_masked": (True, False, True),
    "accumulate_masked_keep_tokens": (True, True, True),
}


# What a launch asks of the main kernel of all blocks, HAS_MASK; its two companions.
BLOCK_USES = {"blocks": False, "blocks_masked": True}
BLOCK_COMPANIONS = ("describe_blocks", "join_blocks")
ALL_USES = (*USES, "join", *BLOCK_USES, *BLOCK_COMPANIONS)


def parse_target(text: str) -> GPUTarget:
    """`cuda:80`, `cuda:90`, ... or `hip:gfx942`."""
    backend, _, arch = text.partition(":")
    if backend == "cuda" and arch.isdigit():
        return GPUTarget("cuda", int(arch), 32)
    if backend == "hip" and arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"target must be cuda:<capability> or hip:<arch>, got {text!r}")


def variants(uses: Sequence[str] = (*USES, "join")) -> Iterator[dict[str, Any]]:
    """Every configuration and element type of these uses of the main kernel; the joining kernel."""
    for element, size in ELEMENT_TYPES.items():
        # The first hidden size of each row of the table.
        first = [1, *(row[0] + 1 for row in CONFIGURATIONS[size][:-1])]
        main = [use for use in USES if use in uses]
        for hidden_size, aligned, use in itertools.product(first, (True, False), main):
            yield {"hidden_size": hidden_size, "element": element, "aligned": aligned, "use": use}
    if "join" in uses:
        yield {"use": "join"}
    for element, aligned in itertools.product(ELEMENT_TYPES, (True, False)):
        for use in BLOCK_USES:
            if use in uses:
                yield {"use": use, "element": element, "aligned": aligned}
    yield from ({"use": use} for use in BLOCK_COMPANIONS if use in uses)


def compile_variant(target: GPUTarget, variant: dict[str, Any]) -> Any:
    """Compile a kernel as the operators launch it.

    A variant has a use, and for the main kernel a hidden size (which chooses the configuration)
    and an element type. "aligned": False is for rows of which nothing is known, "wide": True for
    numbers of tokens and outer strides of 2^31 and more, "ones": True for a hidden size and
    strides of one, which Triton makes constants.
    """
    wide = variant.get("wide", False)
    if variant["use"] == "join":
        return _compile_join(target, wide)
    if variant["use"] in BLOCK_USES:
        return _compile_blocks(target, variant)
    if variant["use"] in BLOCK_COMPANIONS:
        return _compile_block_companion(target, variant["use"])
    element, aligned = variant["element"], variant.get("aligned", True)
    row = configuration(variant["hidden_size"], ELEMENT_TYPES[element], aligned)
    mask, store, reduce = USES[variant["use"]]
    constants: dict[str, Any] = {
        "TOKENS": row.tokens,
        "VECTORS": row.vectors,
        "THREADS": row.threads,
        "ENTRIES": row.entries,
        "NUM_METRICS": partials.NUM_METRICS,
        "METRIC_BLOCK": partials.METRIC_BLOCK,
        "PARTIAL_BLOCK": partials.PARTIAL_BLOCK,
        "HAS_MASK": mask,
        "STORE_TOKENS": store,
        "REDUCE": reduce,
    }
    strides = {
        f"{states}_{axis}_stride" for states in ("before", "after") for axis in ("outer", "inner")
    }
    types = {
        "p_before": f"*{element}",
        "p_after": f"*{element}",
        "p_mask": "*i1" if mask else None,
        "p_per_token": ("*fp64" if element == "fp64" else "*fp32") if store else None,
        "p_scratch": "*i64" if reduce else None,
    }
    # Values divisible by 16 are specialised at launch: pointers, sizes and strides of such rows.
    divisible = {name for name, kind in types.items() if kind is not None}
    divisible = divisible | {"hidden_size"} | strides if aligned else set()
    if wide:
        outer = ("before_outer_stride", "after_outer_stride")
        types |= dict.fromkeys(("num_tokens", "inner", *outer), "i64")
    if variant.get("ones"):
        constants |= dict.fromkeys({"hidden_size", *strides}, 1)
    kernel = layer_metrics._layer_metrics_kernel
    return _compile(kernel, target, constants, types, divisible, THREADS)


def _compile_join(target: GPUTarget, wide: bool) -> Any:
    constants = {
        "NUM_METRICS": partials.NUM_METRICS,
        "METRIC_BLOCK": partials.METRIC_BLOCK,
        "PARTIAL_BLOCK": partials.PARTIAL_BLOCK,
    }
    types: dict[str, str | None] = {"p_moments": "*fp64", "p_tallies": "*i64", "p_scratch": "*i64"}
    divisible = set(types)
    if wide:
        types["num_tokens"] = "i64"
    kernel = partials._join_partials_kernel
    return _compile(kernel, target, constants, types, divisible, partials.JOIN_THREADS)


def _compile_blocks(target: GPUTarget, variant: dict[str, Any]) -> Any:
    element, aligned = variant["element"], variant["aligned"]
    walk = block_metrics.walk_over(ELEMENT_TYPES[element], aligned)
    constants: dict[str, Any] = {
        "ELEMENT": {str(kind): kind for kind in block_metrics.ELEMENTS.values()}[element],
        "ELEMENT_BYTES": ELEMENT_TYPES[element],
        "THREADS": THREADS,
        "ENTRIES": walk.entries,
        "SLICE": walk.slice_size,
        "STATE_BLOCK": triton.next_power_of_2(variant.get("num_states", 33)),
        "FOLD_BLOCK": block_metrics.FOLD_BLOCK,
        "NUM_METRICS": block_partials.NUM_METRICS,
        "HAS_MASK": BLOCK_USES[variant["use"]],
    }
    types: dict[str, str | None] = {
        "p_table": "*i64",
        "p_programs": "*i64",
        "p_mask": "*i1" if constants["HAS_MASK"] else None,
    }
    # The programs' words follow the table, whose size is any.
    divisible = {"p_table", "p_mask"} | ({"hidden_size"} if aligned else set())
    if variant.get("wide"):
        types |= {"num_tokens": "i64", "inner": "i64", "tokens_per_program": "i64"}
    kernel = block_metrics._block_metrics_kernel
    options = block_metrics.block_launch_options(ELEMENT_TYPES[element], target.warp_size)
    return _compile(kernel, target, constants, types, divisible, THREADS, options)


def _compile_block_companion(target: GPUTarget, use: str) -> Any:
    if use == "describe_blocks":
        kernel = block_partials._describe_states_kernel
        types: dict[str, str | None] = {"p_table": "*i64"}
        types |= {name: "i64" for name in kernel.arg_names if name.startswith("address")}
        return _compile(kernel, target, {}, types, set(), block_partials.DESCRIBE_THREADS)
    constants = {
        "NUM_METRICS": block_partials.NUM_METRICS,
        "JOIN_PROGRAMS": block_partials.JOIN_PROGRAMS,
        "JOIN_PAIRS": block_partials.JOIN_PAIRS,
    }
    types = {"p_moments": "*fp64", "p_tallies": "*i64", "p_programs": "*i64"}
    kernel = block_partials._join_programs_kernel
    return _compile(kernel, target, constants, types, {"p_moments", "p_tallies"}, THREADS)


def _compile(
    kernel: Any,
    target: GPUTarget,
    constants: dict[str, Any],
    types: dict[str, str | None],
    divisible: set[str],
    num_threads: int,
    options: dict[str, int | bool] | None = None,
) -> Any:
    """Compile one kernel; parameters that are neither constants nor typed are int32."""
    names = kernel.arg_names
    constants = constants | {name: None for name, kind in types.items() if kind is None}
    signature = {
        name: "constexpr" if name in constants else types.get(name) or "i32" for name in names
    }
    # In the order of the parameters: Triton's cache key depends on it, a set's order on the run.
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in divisible
    }
    values = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    source = ASTSource(kernel, signature, values, attributes)
    options = options or launch_options(num_threads, target.warp_size)
    return triton.compile(source, target=target, options=options)


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


def _ptx_load_bits(ptx: str) -> list[int]:
    """The widths of the loads from global memory."""
    loads = re.findall(r"ld\.global(?:\.(?!v\d)\w+)*?(?:\.(v\d))?\.[bfus](\d+)", ptx)
    return sorted({int((vector or "v1")[1:]) * int(bits) for vector, bits in loads})


def sass_accesses(cubin: bytes) -> dict[str, int]:
    """How often each instruction that touches global or local memory occurs in the SASS."""
    sass = _disassemble(cubin, "-sass")
    return dict(Counter(re.findall(r"\b((?:LDG|LDL|STL)[\w.]*)", sass)))


def describe(target: GPUTarget, variant: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant and tell its loads and, for CUDA, its use of registers and memory."""
    compiled = compile_variant(target, variant)
    report = {**variant, "target": f"{target.backend}:{target.arch}"}
    report["threads"] = compiled.metadata.num_warps * target.warp_size
    if target.backend == "cuda":
        report["load_bits"] = _ptx_load_bits(compiled.asm["ptx"])
        report.update(resources(compiled.asm["cubin"]))
        # Disassembling takes as long as compiling: one use of each aligned configuration.
        if variant["use"] in ("accumulate", "blocks") and variant["aligned"]:
            report["sass"] = sass_accesses(compiled.asm["cubin"])
    return report


def main() -> None:
    """Print one JSON line per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="cuda:90", help="cuda:80, cuda:90, hip:gfx942, ...")
    parser.add_argument("--uses", nargs="+", choices=ALL_USES, default=ALL_USES, metavar="USE")
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
    for variant in variants(arguments.uses):
        print(json.dumps(describe(target, variant)), flush=True)


if __name__ == "__main__":
    main()
