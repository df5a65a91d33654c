"""What can be done with a model, by the checks that the commands make; nothing is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from simdiff.checkpoints.config_file import read_entries
from simdiff.checkpoints.cut import cut_checkpoint
from simdiff.checkpoints.gguf.cut import examine_gguf, is_gguf
from simdiff.checkpoints.no_op_blocks import ARCHITECTURE, check_architecture
from simdiff.errors import SimdiffError, SurgeryError
from simdiff.evaluation.losses import window_losses
from simdiff.jobs.plans import fitted
from simdiff.jobs.recover import check_recoverable
from simdiff.models.config import layer_count, quantization, text_part
from simdiff.models.files import GGUF_USE, check_kind
from simdiff.models.foreign import in_one_line
from simdiff.models.layer_indices import spans
from simdiff.models.loading import find_model, load_config, load_model, meta_model, source_directory
from simdiff.models.partial_forward import PartialForward
from simdiff.models.structure import find_decoder_layers
from simdiff.models.windows import positions
from simdiff.planning.export import FORMATS, export_plan
from simdiff.planning.plan import PruningPlan
from simdiff.recovery.closed_form.projections import find_inner_parts, find_projection
from simdiff.scoring.calibration_pass import score
from simdiff.surgery.layers import layers_removed

_TOKENS = 8


@dataclass(frozen=True)
class Finding:
    """Whether one thing can be done with a model, and what was found or why not."""

    name: str
    able: bool
    detail: str

    def line(self) -> str:
        """The finding in words."""
        return f"{'yes' if self.able else 'no '}  {self.name}: {self.detail}"


@dataclass
class Diagnosis:
    """What a model is, and what can be done with it."""

    model: str
    what: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the model can be scored and cut."""
        able = {finding.name for finding in self.findings if finding.able}
        return "scored" in able and bool(able & {"cut as files", "cut in memory"})

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        findings = [asdict(finding) for finding in self.findings]
        return {"model": self.model, "what": self.what, "ok": self.ok, "findings": findings}

    def add(self, name: str, check: Callable[[], str]) -> None:
        """Make a check: what it returns is the detail, what it raises the reason why not."""
        try:
            self.findings.append(Finding(name, True, check()))
        except SimdiffError as error:
            self.findings.append(Finding(name, False, str(error)))
        except Exception as error:  # what a model's own code raises
            self.findings.append(Finding(name, False, in_one_line(error)))


def diagnose(name: str, *, dtype: str = "auto", device: str | None = None) -> Diagnosis:
    """Find out whether a model can be scored, cut, recovered and exported, and why not.

    Args:
        name: a directory, a hub name, "demo", a GGUF file, or the directory of an adapter.
        dtype, device: see `load_model`; the weights are loaded.

    Raises:
        SimdiffError: there is no such model.
    """
    if is_gguf(name) and Path(name).is_file():
        return _gguf(Path(name))
    _, directory = find_model(name)
    try:
        check_kind(directory)
        config = load_config(directory)
        # The stock model without weights: what can be cut as files needs no more.
        stock = meta_model(config)
        plans = [fitted(PruningPlan(cut), stock, name) for cut in _candidates(stock)]
    except SimdiffError as error:
        return _unusable(name, str(error))
    found = Diagnosis(name, _description(stock))
    loaded: list[PreTrainedModel] = []
    found.add("loaded", lambda: _load(name, dtype, device, loaded))
    found.add("scored", lambda: _scored(_of(loaded)))
    found.add("cut as files", lambda: _first(plans, lambda plan: _cut_files(name, plan)))
    found.add("cut in memory", lambda: _first(plans, lambda plan: _cut_memory(_of(loaded), plan)))
    found.add("recovered in closed form", lambda: _closed_form(_of(loaded)))
    found.add("recovered by training", lambda: _trained(_of(loaded)))
    found.add("exported", lambda: _exported(plans[0], name, directory))
    return found


def _of(loaded: list[PreTrainedModel]) -> PreTrainedModel:
    if not loaded:
        raise SimdiffError("it cannot be loaded, see above")
    return loaded[0]


def _candidates(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Layers to try: one, then several, since some patterns are cut only by whole periods."""
    depth = len(find_decoder_layers(model))
    middle = [range(depth // 2, depth // 2 + 1), range(depth - 1, depth)]
    ends = [range(depth - count, depth) for count in (2, 4, 6, 8)]
    return [tuple(layers) for layers in (*middle, *ends) if 0 < layers.start < depth]


def _first(plans: Sequence[PruningPlan], cut: Callable[[PruningPlan], str]) -> str:
    """What the first cut that can be made says; the reason of the first one if none can."""
    reasons: list[SurgeryError] = []
    for plan in plans:
        try:
            detail = cut(plan)
        except SurgeryError as error:
            reasons.append(error)
            continue
        return f"{detail}; others cannot go alone: {reasons[0]}" if reasons else detail
    raise reasons[0] if reasons else SimdiffError("it has a single layer")


def _description(stock: PreTrainedModel) -> str:
    """What a model is, from its config."""
    config, found = stock.config, find_decoder_layers(stock)
    parts = [
        type(stock).__name__,
        f"{len(found)} decoder layers at {found.path}",
        f"{sum(p.numel() for p in stock.parameters()):,} parameters",
    ]
    if text_part(config) is not config:
        parts.append("its text part is scored and cut")
    packed = quantization(config)
    if packed:
        parts.append(f"quantised ({packed.get('quant_method', 'no quant_method')})")
    limit, learned = positions(stock)
    if limit is not None:
        parts.append(f"windows of {'at most' if learned else 'up to'} {limit} tokens")
    return ", ".join(parts)


def _load(name: str, dtype: str, device: str | None, loaded: list[PreTrainedModel]) -> str:
    model, tokenizer = load_model(name, dtype=dtype, device=device)
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise SimdiffError(
            f"the tokenizer has ids up to {largest}, the embedding {rows} rows: text with the "
            "tokens beyond is refused; call model.resize_token_embeddings and save it"
        )
    loaded.append(model)
    kind = str(model.dtype).removeprefix("torch.")
    return f"every weight came from its files, {kind} on {model.device}; tokenizer of {largest + 1}"


def _ids(model: PreTrainedModel) -> torch.Tensor:
    """Two windows of token ids that are no special ones."""
    rows = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(2 * _TOKENS).reshape(2, -1) * 7919 + rows // 3) % rows


def _scored(model: PreTrainedModel) -> str:
    score(model, [_ids(model)], progress=False)
    losses = window_losses(model, _ids(model), description=None)
    if not all(loss == loss and abs(loss) != float("inf") for loss in losses):
        raise SimdiffError("its losses on a few tokens are NaN or Inf")
    return f"layers and blocks of layers on {2 * _TOKENS} tokens, and perplexity"


def _layers(plan: PruningPlan) -> str:
    return f"layer{'' if len(plan.removed) == 1 else 's'} {spans(plan.removed)}"


def _cut_files(name: str, plan: PruningPlan) -> str:
    cut = cut_checkpoint(source_directory(name), plan)
    return f"without {_layers(plan)}: {cut.num_bytes:,} bytes (simdiff prune)"


def _cut_memory(model: PreTrainedModel, plan: PruningPlan) -> str:
    with layers_removed(model, plan.removed):
        pass
    return f"without {_layers(plan)} (simdiff eval --plan, bench, prune --dtype)"


def _closed_form(model: PreTrainedModel) -> str:
    check_recoverable(model)
    depth, batch = layer_count(model.config), {"input_ids": _ids(model)[:1]}
    with PartialForward(model) as partial:
        for layer in dict.fromkeys((depth - 1, depth // 2)):
            states = partial.run(batch, None, 0, layer)

            def run(at: int = layer, entering: torch.Tensor = states) -> torch.Tensor:
                return partial.run(batch, entering, at, at + 1)

            module, hidden_size = partial.layers[layer], int(states.shape[-1])
            projection = find_projection(module, run, hidden_size)
            if projection is not None:
                return f"through {projection.name} of its layers"
            parts = find_inner_parts(module, run, hidden_size)
            names = [name for part in parts for name in part.names]
    if names:
        return (
            f"behind a cut alone, through {', '.join(names)}: the last map of its layers is not "
            "one matrix (a mixture of experts?)"
        )
    raise SimdiffError(
        "no map of its layers reads from the residual stream or writes to it: train instead "
        "(simdiff recover --method distillation)"
    )


def _trained(model: PreTrainedModel) -> str:
    check_recoverable(model)
    if importlib.util.find_spec("peft") is None:
        return "partial; lora and distillation need peft (pip install 'simdiff-kernels[recover]')"
    return "lora, distillation and partial"


def _exported(plan: PruningPlan, name: str, directory: Path) -> str:
    able, refused = [], []
    for form in FORMATS:
        try:
            export_plan(plan, form, name)
            able.append(form)
        except SimdiffError as error:
            refused.append(f"{form} not: {error}")
    try:
        check_architecture(directory, read_entries(directory))
        able.append("vllm (a plan of sub-layers)")
    except SurgeryError:
        refused.append(f"vllm not: its no-op blocks are those of {ARCHITECTURE}, unquantised")
    return "; ".join([f"a plan of it, as {', '.join(able)}", *refused])


def _unusable(name: str, reason: str) -> Diagnosis:
    """Of a model that no command takes."""
    every = ("scored", "cut as files", "cut in memory", "recovered", "exported")
    return Diagnosis(name, reason, [Finding(what, False, "see above") for what in every])


def _gguf(path: Path) -> Diagnosis:
    """Of a GGUF file: it can be cut as a file, and nothing else."""
    found = Diagnosis(str(path), "a GGUF file")

    def cut() -> str:
        architecture, depth, reasons = examine_gguf(path)
        found.what = f"a GGUF file, {architecture}, {depth} layers"
        if len(reasons) == depth:
            raise SimdiffError(next(iter(reasons.values())))
        must = f"; layers that must stay: {', '.join(map(str, reasons))}" if reasons else ""
        return f"with a plan of the model it was made from (simdiff prune --plan){must}"

    found.findings.append(Finding("scored", False, GGUF_USE))
    found.add("cut as files", cut)
    for name in ("cut in memory", "recovered"):
        found.findings.append(Finding(name, False, "take the model that it was made from"))
    found.findings.append(Finding("exported", False, "llama-quantize --prune-layers reads a plan"))
    return found
