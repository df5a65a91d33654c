"""Profile the time and memory of a calibration pass, layer by layer."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

from simdiff.data.batches import model_inputs
from simdiff.errors import SimdiffError
from simdiff.io.kinds import TRACE_SCHEMA, Kind
from simdiff.io.outputs import check_new_file, write_new
from simdiff.io.progress import step
from simdiff.models.structure import DecoderLayers, find_decoder_layers
from simdiff.models.windows import check_windows
from simdiff.scoring.calibration_pass import feed_forward
from simdiff_kernels import RunningScores, default_backend


@dataclass(frozen=True)
class LayerProfile:
    """Time and memory of one decoder layer over all profiled batches, in its device's seconds."""

    layer: int
    forward_seconds: float
    scoring_seconds: float
    peak_bytes: int
    """Highest memory that torch had allocated since the start while the layer ran."""

    @property
    def overhead(self) -> float:
        """Scoring time over forward time."""
        return self.scoring_seconds / self.forward_seconds


@dataclass(frozen=True)
class PassProfile:
    """The profiles of all layers and a description of the pass."""

    layers: tuple[LayerProfile, ...]
    backend: str
    device: str
    num_batches: int
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with the totals."""
        forward = sum(layer.forward_seconds for layer in self.layers)
        scoring = sum(layer.scoring_seconds for layer in self.layers)
        total = {
            "forward_seconds": forward,
            "scoring_seconds": scoring,
            "overhead": scoring / forward,
            "peak_bytes": max(layer.peak_bytes for layer in self.layers),
        }
        layers = [asdict(layer) | {"overhead": layer.overhead} for layer in self.layers]
        return asdict(self) | {"layers": layers, "total": total}


def profile_pass(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    trace: Path,
    *,
    backend: str | None = None,
    overwrite: bool = False,
) -> PassProfile:
    """Run calibration batches under torch's profiler, scored as in `score`.

    A first batch warms up outside of the profile. Ranges "layer 0", "score layer 0", ... mark the
    work of each layer, also as NVTX ranges if the model is on a GPU.

    Args:
        model: any causal language model with recognisable decoder layers.
        batches: token ids `(batch, sequence)`.
        trace: file to write, `.json` or `.json.gz`; Perfetto and chrome://tracing open it.
        backend: backend of simdiff_kernels; None takes the fastest one.
        overwrite: replace the trace if it exists.

    Raises:
        SimdiffError: there are no batches, or the trace has another suffix or exists already.
    """
    if not batches:
        raise SimdiffError("profile_pass: batches must hold at least one batch, got none")
    if not trace.name.endswith((".json", ".json.gz")):
        raise SimdiffError(f"trace must be named .json or .json.gz, got {trace.name}")
    check_new_file(trace, overwrite, Kind.TRACE)
    layers = find_decoder_layers(model)
    device = next(layers.modules.parameters()).device
    inputs = model_inputs(batches, "profile_pass")
    check_windows(model, batches, "profile")
    with step("warm up"):
        warm = RunningScores(len(layers), backend=backend)
        feed_forward(model, layers.modules, warm, inputs[:1])
    running = _NamedScores(len(layers), backend=backend)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        step("profile the calibration pass"),
        _quiet_kineto(),
        _named_layers(layers),
        profile(activities=activities, profile_memory=True, acc_events=True) as profiler,
    ):
        feed_forward(model, layers.modules, running, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    running.finish()
    with step("read and write the trace"):
        events = _export(profiler, trace, overwrite)
        found = _layers_of(events, len(layers), on_gpu=device.type == "cuda")
    return PassProfile(
        layers=tuple(found),
        backend=backend or default_backend(device),
        device=str(device),
        num_batches=len(batches),
        num_tokens=sum(ids.numel() for ids in batches),
    )


@contextlib.contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Torch's profiler tells of its start and stop on standard error, whatever its log level."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


class _NamedScores(RunningScores):
    def update(self, layer: int, *arguments: Any, **keywords: Any) -> None:
        with record_function(f"score layer {layer}"), _nvtx(f"score layer {layer}"):
            super().update(layer, *arguments, **keywords)


@contextlib.contextmanager
def _nvtx(name: str) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


@contextlib.contextmanager
def _named_layers(layers: DecoderLayers) -> Iterator[None]:
    """Open a range around the forward of every layer, without the scoring of the layer."""
    handles, opened = [], {}

    def open_range(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            opened[name] = contextlib.ExitStack()
            opened[name].enter_context(record_function(name))
            opened[name].enter_context(_nvtx(name))

        return hook

    def close_range(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            opened.pop(name).close()

        return hook

    try:
        for index, module in enumerate(layers.modules):
            name = f"layer {index}"
            # The scoring hooks are registered later: they run after this range has closed.
            handles.append(module.register_forward_pre_hook(open_range(name)))
            handles.append(module.register_forward_hook(close_range(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _export(profiler: profile, trace: Path, overwrite: bool) -> list[dict[str, Any]]:
    """Write the trace file, whole or not at all; return its events."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(scratch))
        content = scratch.read_bytes()
    marked = f'{{"schema": "{TRACE_SCHEMA}",'.encode() + content.lstrip()[1:]
    packed = gzip.compress(marked, 5) if trace.suffix == ".gz" else marked
    write_new(trace, packed, overwrite, Kind.TRACE)
    return list(json.loads(content)["traceEvents"])


def _layers_of(
    events: list[dict[str, Any]], num_layers: int, *, on_gpu: bool
) -> list[LayerProfile]:
    """Sum the ranges of each layer and find the highest allocation within its forward."""
    wanted = "gpu_user_annotation" if on_gpu else "user_annotation"
    seconds: dict[str, float] = defaultdict(float)
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == wanted:
            seconds[event["name"]] += event["dur"] / 1e6
        if event.get("cat") == "user_annotation":
            spans[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    device_type = 1 if on_gpu else 0
    allocated = [
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == device_type
    ]
    found = []
    for layer in range(num_layers):
        own = spans[f"layer {layer}"] + spans[f"score layer {layer}"]
        inside = [size for time, size in allocated if any(a <= time <= b for a, b in own)]
        if not own or not seconds[f"layer {layer}"]:
            raise SimdiffError(f"profile_pass: layer {layer} did not run")
        found.append(
            LayerProfile(
                layer,
                seconds[f"layer {layer}"],
                seconds[f"score layer {layer}"],
                int(max(inside, default=0)),
            )
        )
    return found
