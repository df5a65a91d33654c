"""Scores from inside a serving engine: hooks for the layers of SGLang and vLLM.

Both engines pass two tensors from layer to layer, whose sum is the hidden state, and all tokens of
a forward in one row without padding. A layer writes over what enters it, so that states are taken
before each layer and before the final norm: L + 1 of them, which is what `RunningGroups` takes.
They stay on the device; what is written is the file of scores.

Every token that passes counts, those of a warm-up too. The engine must run without CUDA graphs,
without prefix caching and without pipeline parallelism. Sequences cannot be told apart: the scores
have no bootstrap and no angles of last tokens.
"""

from __future__ import annotations

import atexit
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simdiff.errors import SimdiffError
from simdiff.models.identity import model_identity
from simdiff.models.loading import find_model, load_config, meta_model
from simdiff.scoring.calibration_pass import scores_of
from simdiff.scoring.running_groups import RunningGroups
from simdiff.scoring.scores import LayerScores
from simdiff_kernels import default_backend

# More sequences than any pass has: all tokens are of one group.
_ALL = 1 << 31
_SCORES = "_simdiff_scores"
_WHERE = (
    "hooks belong on whole layers and on the final norm alone, all in one process (no pipeline "
    "parallelism)"
)


class EngineScores:
    """Running scores of all tokens that pass through an engine's layers.

    Args:
        name: directory or hub name of the model, of which the config is read.
        blocks: also score every run of consecutive layers; the L + 1 states of a forward are then
            in memory at once.
    """

    def __init__(self, name: str, *, blocks: bool = True) -> None:
        """Read the config; no token is seen."""
        model = meta_model(load_config(find_model(name)[1]))
        self._identity = model_identity(model, name)
        self._running = RunningGroups(
            self._identity["num_layers"], 1, blocks=blocks, group_size=_ALL
        )
        self._places: dict[int, int] = {}
        self._states: list[Tensor] = []
        self._lengths: list[int] = []
        self._device, self._dtype = torch.device("cpu"), torch.float32

    @property
    def num_forwards(self) -> int:
        """How many forwards have passed through all layers."""
        return len(self._lengths)

    @torch.no_grad()
    def before(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Take the state that enters a layer or the final norm; a pre-hook with keywords calls it.

        Returns:
            Whether a forward has now passed through all layers.

        Raises:
            SimdiffError: the states are not those of the model, or a layer was passed by.
        """
        # In the first forward modules come in their order, the final norm last.
        place = self._places.setdefault(id(module), len(self._places))
        if place == 0:
            self._states = []
        num_states, width = self._running.num_layers + 1, self._identity["hidden_size"]
        if place >= num_states or place != len(self._states):
            raise SimdiffError(
                f"the engine must pass through {num_states - 1} layers and the final norm in their "
                f"order, got {type(module).__name__} as number {place} after {len(self._states)}: "
                f"{_WHERE}"
            )
        state = _state(module, args, kwargs)
        if state.shape[-1] != width:
            raise SimdiffError(
                f"{type(module).__name__} must take hidden states (tokens, {width}), got "
                f"{tuple(state.shape)}"
            )
        self._states.append(state.reshape(1, -1, width))
        if len(self._states) < num_states:
            return False
        self._add()
        return True

    def _add(self) -> None:
        """Add the tokens of a forward."""
        states, running = self._states, self._running
        self._states, self._device, self._dtype = [], states[0].device, states[0].dtype
        length = states[0].shape[1]
        if not length:
            return
        running.begin(torch.ones(1, length))
        for layer in range(running.num_layers):
            running.update(layer, states[layer], states[layer + 1])
        if running.blocks is not None:
            running.blocks.update(states)
        running.end()
        self._lengths.append(length)

    def scores(self) -> LayerScores:
        """The scores of all tokens so far; more may follow.

        Raises:
            SimdiffError: no forward has passed yet.
            simdiff_kernels.NonFiniteError: a hidden state contains NaN or Inf.
        """
        if not self._lengths:
            raise SimdiffError("no forward has passed through the engine's layers yet")
        ids = [torch.tensor(-1).expand(1, length) for length in self._lengths]  # not known here
        dtype = str(self._dtype).removeprefix("torch.")
        return scores_of(
            self._running,
            ids,
            sequences=False,
            model={**self._identity, "dtype": dtype},
            calibration={"forwards": len(self._lengths), "num_tokens": sum(self._lengths)},
            provenance={
                "backend": default_backend(self._device.type),
                "device": self._device.type,
            },
        )


def sglang(config: Mapping[str, Any]) -> Callable[..., None]:
    """A hook factory for SGLang's `--forward-hooks`, whose scores are written to a file.

    Args:
        config: `model`, a directory or hub name; `output`, the file of scores, in which `{rank}`
            stands for the number of the process, and which without that process 0 alone writes;
            `every`, after how many forwards it is written (1; at the end of the process too).

    Raises:
        SimdiffError: an entry is missing or unknown.
    """
    known = {"model", "output", "every"}
    if not {"model", "output"} <= set(config) <= known:
        raise SimdiffError(
            f"simdiff.engines:sglang: config must hold model and output, and may hold every, got "
            f"{', '.join(sorted(config)) or 'nothing'}"
        )
    scores, every = EngineScores(str(config["model"])), int(config.get("every", 1))

    def save() -> None:
        path = _output(str(config["output"]))
        if path is not None and scores.num_forwards:
            scores.scores().save(path)

    def hook(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if scores.before(module, args, kwargs) and scores.num_forwards % every == 0:
            save()

    atexit.register(save)
    return hook


def vllm_hooks(model: nn.Module, name: str) -> None:
    """Begin to score inside vLLM: `llm.apply_model(partial(vllm_hooks, name=...))`.

    Args:
        model: what vLLM passes.
        name: directory or hub name of the model.

    Raises:
        SimdiffError: its layers and the norm after them are not found.
    """
    scores = EngineScores(name)
    setattr(model, _SCORES, scores)

    def hook(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        scores.before(module, args, kwargs)

    for module in _layers_and_norm(model, scores):
        module.register_forward_pre_hook(hook, with_kwargs=True)


def vllm_scores(model: nn.Module) -> dict[str, Any]:
    """The content of scores.json so far, of one worker: `llm.apply_model(vllm_scores)[0]`.

    Raises:
        SimdiffError: `vllm_hooks` was not applied, or no forward has passed yet.
    """
    scores = getattr(model, _SCORES, None)
    if scores is None:
        raise SimdiffError("vllm_scores: vllm_hooks must have been applied to the model")
    return scores.scores().to_dict()


def _layers_and_norm(model: nn.Module, scores: EngineScores) -> list[nn.Module]:
    """The decoder layers and the norm beside them, by the names that engines give them."""
    depth = scores._running.num_layers
    for owner in model.modules():
        layers, norm = getattr(owner, "layers", None), getattr(owner, "norm", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == depth and norm is not None:
            return [*layers, norm]
    raise SimdiffError(
        f"{type(model).__name__} must have {depth} modules named layers, and norm beside them"
    )


def _state(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden state that enters a layer or a norm, as a tensor of its own."""
    given = dict(kwargs)
    names = list(inspect.signature(module.forward).parameters)
    if "hidden_states" in names:
        given |= dict(zip(names, args, strict=False))
        states, residual = given.get("hidden_states"), given.get("residual")
    else:  # a norm: what it norms, and the residual
        pair = [*args, *kwargs.values(), None, None]
        states, residual = pair[0], pair[1]
    found = [value.shape if isinstance(value, Tensor) else value for value in (states, residual)]
    if not isinstance(states, Tensor) or found[1] not in (None, found[0]):
        raise SimdiffError(
            f"{type(module).__name__} must take hidden states, and a residual of their shape or "
            f"none, got {found[0]} and {found[1]}: {_WHERE}"
        )
    return states.clone() if residual is None else states + residual


def _output(path: str) -> Path | None:
    """Where this process writes; None where another one does."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    if "{rank}" in path:
        return Path(path.replace("{rank}", str(rank)))
    return Path(path) if rank == 0 else None
