"""RecoveryRecord, the content of recovery.json: the changed parameters and the quality gained."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError
from simdiff.io.json_files import header, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

RECORD = "recovery.json"
SCHEMA = "simdiff.recovery"
STAGES = ("dense", "pruned", "recovered")


@dataclass(frozen=True)
class RecoveryRecord:
    """The method and the result of a recovery."""

    method: str
    formula: str
    trained: bool
    settings: dict[str, Any]
    changed: dict[str, str]
    """SHA-256 (see `digest`) of every parameter that differs from the dense model's, by its name in
    the pruned model."""
    calibration: dict[str, Any]
    """Identity of the text that the method read (`TextIdentity`)."""
    evaluation: dict[str, Any]
    """Identity of the text on which `quality` was measured, disjoint from `calibration`."""
    quality: dict[str, dict[str, Any]]
    """Fields of `Perplexity` for each of `STAGES`: dense, plainly cut, recovered."""
    seconds: float
    """Time that the method took, without loading and evaluation."""
    machine: str
    details: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    """Identity of the dense model, see `simdiff.models.identity.model_identity`."""
    notes: tuple[str, ...] = ()

    def perplexity(self, stage: str) -> float:
        """Held-out perplexity of the "dense", the "pruned" (plain cut) or the "recovered" model."""
        return float(self.quality[stage]["perplexity"])

    @property
    def recovered_share(self) -> float | None:
        """Share of the way from the plain cut back to the dense model, in log perplexity."""
        dense, pruned, recovered = (self.quality[stage]["nll"] for stage in STAGES)
        return (pruned - recovered) / (pruned - dense) if pruned > dense else None

    def to_dict(self) -> dict[str, Any]:
        """The content of recovery.json."""
        return {
            **header(SCHEMA),
            "model": self.model,
            "method": self.method,
            "formula": self.formula,
            "trained": self.trained,
            "settings": self.settings,
            "calibration": self.calibration,
            "evaluation": self.evaluation,
            "quality": self.quality,
            "recovered_share": self.recovered_share,
            "seconds": self.seconds,
            "machine": self.machine,
            "notes": list(self.notes),
            "changed": self.changed,
            "details": self.details,
        }

    def save(self, path: Path) -> None:
        """Write recovery.json."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> RecoveryRecord:
        """Read recovery.json.

        Raises:
            SimdiffError: the file is missing, damaged, or of a newer version.
        """
        content = read_json(path, SCHEMA)
        try:
            quality = {stage: dict(content["quality"][stage]) for stage in STAGES}
            for stage, values in quality.items():
                if not math.isfinite(float(values["perplexity"])):
                    raise ValueError(f"perplexity of {stage} must be finite")
            return cls(
                method=str(content["method"]),
                formula=str(content["formula"]),
                trained=bool(content["trained"]),
                settings=dict(content["settings"]),
                changed={str(name): str(text) for name, text in content["changed"].items()},
                calibration=dict(content["calibration"]),
                evaluation=dict(content["evaluation"]),
                quality=quality,
                seconds=float(content["seconds"]),
                machine=str(content["machine"]),
                details=dict(content["details"]),
                model=dict(content.get("model", {})),
                notes=tuple(map(str, content["notes"])),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                f"{path}: must be a complete record of a recovery, but is damaged: "
                f"{type(error).__name__}: {error}"
            ) from None


def digest(tensor: Tensor) -> str:
    """SHA-256 over a tensor's dtype, shape and bytes as stored in files."""
    import torch

    flat = tensor.detach().cpu().contiguous()
    result = hashlib.sha256(f"{flat.dtype} {tuple(flat.shape)}".encode())
    result.update(memoryview(flat.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return result.hexdigest()


def differing(model: nn.Module, other: nn.Module) -> Iterator[str]:
    """Yield names of parameters that differ between two models, or exist in only one of them."""
    import torch

    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in wanted or not torch.equal(parameter, wanted.pop(name)):
            yield name
    yield from wanted


def changed_parameters(model: nn.Module, plain: nn.Module) -> dict[str, str]:
    """Digests of the parameters of a model that differ from its plain cut.

    Raises:
        SimdiffError: parameters were added or removed, or are not finite.
    """
    import torch

    parameters = dict(model.named_parameters())
    names = list(differing(model, plain))
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    if {name: p.shape for name, p in parameters.items()} != shapes:
        raise SimdiffError(
            "recovery must leave the names and shapes of all parameters as they were, got another "
            "set of them"
        )
    bad = [name for name in names if not bool(torch.isfinite(parameters[name]).all())]
    if bad:
        raise SimdiffError(
            f"recovery must give finite parameters, got NaN or Inf in {len(bad)}, first {bad[0]}"
        )
    return {name: digest(parameters[name]) for name in names}


def worse_notes(quality: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Notes that warn if recovery made the held-out perplexity worse; else empty."""
    pruned, recovered = (float(quality[stage]["perplexity"]) for stage in STAGES[1:])
    shown = [f"{perplexity:.4g}" for perplexity in (recovered, pruned)]
    if recovered <= pruned or len({*shown}) == 1:
        return ()
    return (
        f"recovery made it worse: held-out perplexity {shown[0]} against {shown[1]} of the plain "
        "cut, which is the better model on this text",
    )
