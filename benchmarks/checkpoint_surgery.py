"""Layers out of a checkpoint on disk: memory, and speed against `cp` of the same bytes.

Memory: a sparse checkpoint with the shapes of Llama 3 70B, as many layers as asked for, is cut by a
fresh process; its peak is compared with that of a process that only imports the libraries and
builds the model of the config on the meta device, and with one that streams without importing them.

Speed: a checkpoint of real, random bytes is cut and its kept bytes are copied by `cp`, in turns;
both read from the page cache, both end with the bytes on the disk (fsync). The result is compared
before anything is timed.

    python benchmarks/checkpoint_surgery.py --directory /data/scratch --output results.json

`--quick` takes layers of a few thousand weights and one round: does it run?
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import provenance
import ratios
from transformers import LlamaConfig

from simdiff.checkpoints.cut import cut_checkpoint, write_cut
from simdiff.checkpoints.shards import split_shards, write_index
from simdiff.checkpoints.weight_index import read_weights
from simdiff.io.machine import describe_machine
from simdiff.io.outputs import new_directory
from simdiff.io.safetensors_header import StoredTensor, header_bytes, total_bytes
from simdiff.models.identity import model_identity
from simdiff.models.loading import meta_model
from simdiff.planning.plan import PruningPlan

SHAPES_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
SHAPES_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SHAPES_QUICK = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHARD_BYTES = 5 * 10**9
_IMPORTS = """
from pathlib import Path; import sys
from simdiff.checkpoints.cut import cut_checkpoint
from simdiff.models.loading import load_config, meta_model
meta_model(load_config(Path(sys.argv[1])))
"""
_COMMAND = """
import sys; from simdiff import cli
assert cli.main(sys.argv[1:]) == 0
"""
_STREAM = """
from pathlib import Path; import sys
from simdiff.checkpoints.weight_index import read_weights
from simdiff.checkpoints.shards import split_shards, write_shards
weights, removed = read_weights(Path(sys.argv[1])), set(sys.argv[3].split(","))
groups = [[(name, tensor)] for name, tensor in weights.tensors.items()
          if not (".layers." in name and name.split(".")[2] in removed)]
Path(sys.argv[2]).mkdir()
write_shards(split_shards(groups, 50 * 10**9), Path(sys.argv[2]), weights.metadata)
assert "torch" not in sys.modules
"""


def make_checkpoint(directory: Path, config: LlamaConfig, sparse: bool) -> PruningPlan:
    """Write a bfloat16 checkpoint in shards of 5 GB; returns a plan that removes a quarter."""
    model = meta_model(config)
    tensors = [
        StoredTensor(name, "BF16", tuple(p.shape), directory, 0, 2 * p.numel())
        for name, p in model.named_parameters()
    ]
    shards = split_shards([[(tensor.name, tensor)] for tensor in tensors], SHARD_BYTES)
    directory.mkdir(parents=True)
    for shard in shards:
        head, data_bytes = header_bytes(shard.tensors, {"format": "pt"})
        with (directory / shard.name).open("wb") as file:
            file.write(head)
            while not sparse and file.tell() < len(head) + data_bytes:
                file.write(os.urandom(min(1 << 24, len(head) + data_bytes - file.tell())))
            file.truncate(len(head) + data_bytes)
    write_index(shards, directory, model.num_parameters())
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    num_layers = config.num_hidden_layers
    return PruningPlan(
        removed=tuple(range(1, num_layers - 1))[: num_layers // 4],
        num_layers=num_layers,
        protected=(),
        criterion="none",
        formula="",
        alpha=None,
        importance=(0.0,) * num_layers,
        ranking=tuple(range(num_layers)),
        notes=(),
        model=model_identity(model, "synthetic"),
        calibration={},
    )


def peak_of(code: str, *arguments: object) -> tuple[float, float]:
    """Peak resident memory in MB and seconds of a fresh process that runs some code."""
    # Not ru_maxrss: it counts what this process had when it forked.
    code += "\nimport re; status = open('/proc/self/status').read()"
    code += "\nprint(re.search(r'VmHWM:\\s+(\\d+)', status)[1])"
    start = time.monotonic()
    printed = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, stdout=subprocess.PIPE
    ).stdout
    return int(printed.split()[-1]) * 1024 / 1e6, time.monotonic() - start


def measure_memory(folder: Path, shapes: dict[str, int], num_layers: int) -> dict[str, Any]:
    """Peaks of the whole command, of its libraries alone, and of the streaming alone."""
    source, plan_file = folder / "sparse", folder / "plan.json"
    config = LlamaConfig(**shapes, num_hidden_layers=num_layers)
    plan = make_checkpoint(source, config, sparse=True)
    plan.save(plan_file)
    total = total_bytes(list(read_weights(source).tensors.values()))
    command, seconds = peak_of(
        _COMMAND, "prune", source, "--plan", plan_file, "-o", folder / "small", "--json"
    )
    kept = check_copied(source, folder / "small", plan)
    shutil.rmtree(folder / "small")
    libraries, _ = peak_of(_IMPORTS, source)
    removed = ",".join(map(str, plan.removed))
    streaming, _ = peak_of(_STREAM, source, folder / "small", removed)
    shutil.rmtree(folder / "small")
    return {
        "layers": num_layers,
        "checkpoint_gb": total / 1e9,
        "kept_gb": kept / 1e9,
        "command_peak_mb": command,
        "command_seconds": seconds,
        "libraries_peak_mb": libraries,
        "added_peak_mb": command - libraries,
        "streaming_peak_mb": streaming,
    }


def check_copied(source: Path, target: Path, plan: PruningPlan) -> int:
    """Names, dtypes, shapes and sizes of the result; returns the bytes of its tensors."""
    old, new = read_weights(source).tensors, read_weights(target).tensors
    number = {layer: index for index, layer in enumerate(plan.kept)}
    wanted = {}
    for name, tensor in old.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in number:
                continue
            parts[2] = str(number[int(parts[2])])
        wanted[".".join(parts)] = tensor
    assert wanted.keys() == new.keys()
    for name, tensor in wanted.items():
        assert (tensor.dtype, tensor.shape) == (new[name].dtype, new[name].shape)
    return total_bytes(list(new.values()))


def check_bytes(source: Path, target: Path, plan: PruningPlan) -> None:
    """Every byte of every kept tensor."""
    old, new = read_weights(source).tensors, read_weights(target).tensors
    number = {layer: index for index, layer in enumerate(plan.kept)}
    for name, tensor in old.items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) in number:
            parts[2] = str(number[int(parts[2])])
        elif parts[1] == "layers":
            continue
        copy = new[".".join(parts)]
        with tensor.path.open("rb") as first, copy.path.open("rb") as second:
            first.seek(tensor.start)
            second.seek(copy.start)
            assert first.read(tensor.num_bytes) == second.read(copy.num_bytes), name


def measure_speed(
    folder: Path, shapes: dict[str, int], num_layers: int, rounds: int
) -> dict[str, Any]:
    """Interleaved: the cut, and `cp` of its result with the bytes synced; medians of rounds."""
    source, kept = folder / "real", folder / "kept"
    config = LlamaConfig(**shapes, num_hidden_layers=num_layers)
    plan = make_checkpoint(source, config, sparse=False)
    with new_directory(kept) as scratch:
        write_cut(cut_checkpoint(source, plan), scratch)
    check_bytes(source, kept, plan)
    size = total_bytes(list(read_weights(kept).tensors.values()))
    times: dict[str, list[float]] = {"cut": [], "cp": []}
    for _ in range(rounds):
        for name in times:
            for path in (*source.glob("*.safetensors"), *kept.glob("*.safetensors")):
                with path.open("rb") as file:  # into the page cache, for both alike
                    while file.read(1 << 24):
                        pass
            os.sync()
            start = time.monotonic()
            if name == "cut":
                with new_directory(folder / "out") as scratch:
                    write_cut(cut_checkpoint(source, plan), scratch)
            else:
                subprocess.run(["cp", "-r", "--sparse=never", kept, folder / "out"], check=True)
                subprocess.run(["sync", *(folder / "out").iterdir()], check=True)
            times[name].append(time.monotonic() - start)
            shutil.rmtree(folder / "out")
    speeds = {name: [size / 1e6 / seconds for seconds in values] for name, values in times.items()}
    found, intervals = ratios.of_rounds({"ratio": times["cp"]}, times["cut"])
    return {
        "kept_gb": size / 1e9,
        "rounds": rounds,
        "cut_mb_per_s": statistics.median(speeds["cut"]),
        "cp_mb_per_s": statistics.median(speeds["cp"]),
        **found,
        "interval": intervals,
        "ratios": [cp / cut for cut, cp in zip(times["cut"], times["cp"], strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to write; needs about 25 GB free")
    parser.add_argument("--layers", type=int, default=12, help="of 70B shapes: 1.7 GB each")
    parser.add_argument("--real-layers", type=int, default=24, help="of 1B shapes: 88 MB each")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", choices=("memory", "speed"))
    parser.add_argument("--quick", action="store_true", help="tiny: does it run?")
    parser.add_argument("--output", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    large, small = (SHAPES_QUICK, SHAPES_QUICK) if arguments.quick else (SHAPES_70B, SHAPES_1B)
    rounds = 1 if arguments.quick else arguments.rounds
    results: dict[str, Any] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        if arguments.only != "memory":
            results["speed"] = measure_speed(Path(folder), small, arguments.real_layers, rounds)
        if arguments.only != "speed":
            results["memory"] = measure_memory(Path(folder), large, arguments.layers)
    for part in ("memory", "speed"):
        for key, value in results.get(part, {}).items():
            print(f"{part:<8}{key:<22}{value if not isinstance(value, float) else f'{value:.2f}'}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        provenance.keep([arguments.output], ["checkpoint surgery"])


if __name__ == "__main__":
    main()
