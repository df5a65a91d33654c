"""`simdiff verify`: load a pruned directory with stock classes and run eleven checks; all results
are reported, failed or not."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from simdiff.errors import SimdiffError
from simdiff.io.kinds import PLAN_FILE
from simdiff.models.files import check_kind, check_weights, is_gguf_file
from simdiff.models.foreign import in_one_line, quietly
from simdiff.models.loading import load_config, source_directory, stock_model
from simdiff.models.structure import find_decoder_layers, text_config
from simdiff.planning.plan import PruningPlan
from simdiff.provenance import verify_no_op
from simdiff.provenance.subject import Check, Fault, Skip, Subject, UnusableError
from simdiff.recovery.record import RECORD, RecoveryRecord, differing, digest
from simdiff.surgery.layers import layers_removed

# Logits with and without cache are rounded differently. This is the difference allowed, as a share
# of the logits' spread.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_PROMPT, _NEW = 8, 16
# Longest sliding window that the check generates past; a longer one would take too much time.
_LONGEST_WINDOW = 256


def verify(directory: str | Path, against: str | Path | None = None) -> list[Check]:
    """Check a directory with a pruned model.

    Args:
        directory: a directory that `simdiff prune` wrote, or any other checkpoint.
        against: the model before pruning; needs a plan.json in the directory.

    Returns:
        All checks in order; those that depend on a failed one are skipped.

    Raises:
        SimdiffError: the directory or its config.json is missing, or `against` cannot be loaded.
    """
    directory, against = Path(directory), None if against is None else str(against)
    if not (directory / "config.json").is_file():
        if directory.is_dir() or is_gguf_file(directory):
            check_kind(directory)  # says what it is instead
        found = "a file" if directory.is_file() else "no directory of that name"
        raise SimdiffError(f"verify: {directory} must be a directory with a model, got {found}")
    transformers_logging.disable_progress_bar()
    subject = Subject(directory, against)
    checks = []
    table = _NO_OP_CHECKS if verify_no_op.is_one(directory) else _CHECKS
    for name, check in table.items():
        if check in (_against, verify_no_op.against) and against is None:
            continue
        if check is _recovery and not (directory / RECORD).exists():
            continue
        try:
            checks.append(Check(name, True, check(subject)))
        except UnusableError:
            raise
        except Skip as reason:
            checks.append(Check(name, None, str(reason)))
        except Fault as fault:
            checks.append(Check(name, False, str(fault)))
        except Exception as error:  # a damaged model makes libraries raise any error
            checks.append(Check(name, False, _one_line(error)))
    return checks


def _one_line(error: Exception) -> str:
    return str(error) if isinstance(error, SimdiffError) else in_one_line(error)


def _config(subject: Subject) -> str:
    try:
        config = json.loads((subject.directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise Fault(f"config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise Fault(f"config.json must be an object, got {type(config).__name__}")
    subject.config = config
    if "auto_map" in config:
        raise Fault(
            f"config.json names code of its own (auto_map: {config['auto_map']}), which is not "
            "run: stock classes must load this model"
        )
    loaded = load_config(subject.directory)
    return f"{loaded.model_type}, read by {type(loaded).__name__}"


def _load(subject: Subject) -> str:
    if not subject.config:
        raise Skip("needs a config")
    check_weights(subject.directory)
    config = load_config(subject.directory)
    subject.model, subject.loading = stock_model(subject.directory, config)
    subject.model.eval()
    count = sum(p.numel() for p in subject.model.parameters())
    return f"{type(subject.model).__name__}, {count:,} parameters, {subject.model.dtype}"


def _model(subject: Subject) -> PreTrainedModel:
    if subject.model is None:
        raise Skip("needs a model that loads")
    return subject.model


def _keys(subject: Subject) -> str:
    _model(subject)
    faults = []
    for kind, words in (
        ("missing_keys", "not in the files, so filled with random numbers"),
        ("unexpected_keys", "in the files, but not in the model of this config"),
        ("mismatched_keys", "of another shape than the config says"),
        ("error_msgs", "errors"),
    ):
        found = subject.loading.get(kind) or ()
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found)
        if keys:
            more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            faults.append(f"{len(keys)} {words}: {', '.join(keys[:2])}{more}")
    if faults:
        raise Fault("; ".join(faults))
    return "every parameter is in the files, and nothing else"


def _layers(subject: Subject) -> str:
    """Check the layer count and the lists of one entry per layer in config.json."""
    found = find_decoder_layers(_model(subject))
    layers = len(found)
    decoder = subject.config
    for part in ("text_config", "decoder"):
        if isinstance(decoder.get(part), dict):
            decoder = decoder[part]
    before = subject.plan.num_layers if subject.plan else None
    stale = [
        f"{name} has {len(value)} entries"
        for name, value in decoder.items()
        if isinstance(value, list)
        and len(value) != layers
        and (name.endswith(("layer_types", "_per_layer")) or len(value) == before)
    ]
    if stale:
        raise Fault(f"the model has {layers} decoder layers, but {'; '.join(stale)}")
    indices = {
        index: module.layer_idx
        for index, layer in enumerate(found.modules)
        for module in layer.modules()
        if hasattr(module, "layer_idx")
    }
    wrong = [index for index, value in indices.items() if index != value]
    if wrong:
        raise Fault(f"layer {wrong[0]} has the cache slot {indices[wrong[0]]}")
    return f"{layers} decoder layers at {found.path}"


def _plan(subject: Subject) -> str:
    path = subject.directory / PLAN_FILE
    if not path.exists():
        raise Skip(f"no {PLAN_FILE}: simdiff did not write this directory")
    plan = PruningPlan.load(path)
    subject.plan = plan
    model = _model(subject)
    kept, layers = len(plan.kept), len(find_decoder_layers(model))
    faults = []
    if kept != layers:
        faults.append(
            f"{kept} layers ({plan.num_layers} less {len(plan.removed)}) against {layers}"
        )
    for key, found in (
        ("hidden_size", text_config(model).hidden_size),
        ("architecture", type(model).__name__),
    ):
        if plan.model.get(key, found) != found:
            faults.append(f"{key} {plan.model[key]} against {found}")
    if faults:
        raise Fault(f"the plan and the model differ: {'; '.join(faults)}")
    return f"{layers} of {plan.num_layers} layers stayed"


def _recovery(subject: Subject) -> str:
    """Check that parameters changed by recovery have the recorded digests."""
    record = RecoveryRecord.load(subject.directory / RECORD)
    subject.recovery = record
    parameters = dict(_model(subject).named_parameters())
    missing = [name for name in record.changed if name not in parameters]
    if missing:
        raise Fault(f"{RECORD} names {missing[0]}, which is no parameter of the model")
    damaged = [name for name, known in record.changed.items() if digest(parameters[name]) != known]
    if damaged:
        raise Fault(
            f"{len(damaged)} of {len(record.changed)} recovered parameters are not those that "
            f"{RECORD} describes, first {damaged[0]}"
        )
    return f"{record.method}: {len(record.changed)} parameters are as they were written"


def _ids(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids that are the same in every run and avoid special tokens at the beginning."""
    vocabulary = text_config(model).vocab_size
    generator = torch.Generator().manual_seed(0)
    low = min(10, vocabulary - 1)
    return torch.randint(low, vocabulary, (1, length), generator=generator)


@torch.inference_mode()
def _finite(subject: Subject) -> str:
    model = _model(subject)
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise Fault(f"NaN or Inf in {len(bad)} parameters, first in {bad[0]}")
    logits = model(input_ids=_ids(model, 32), use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise Fault("the logits hold NaN or Inf although no parameter does")
    return f"all parameters, and logits between {logits.min():.3g} and {logits.max():.3g}"


@torch.inference_mode()
def _cached(subject: Subject) -> str:
    model = _model(subject)
    length, passed_window = _length(model)
    prompt = _ids(model, length)
    # The model's own generation config may sample, penalise or stop, so it is not used.
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(
            max_new_tokens=_NEW,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    try:
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True)
    finally:
        model.generation_config = own
    cached = torch.cat(output.logits).float()
    logits = model(input_ids=output.sequences[:, :-1], use_cache=False).logits
    uncached = logits[0, length - 1 :].float()
    allowed = _TOLERANCE.get(model.dtype, 1e-3) * float(uncached.std())
    difference = float((cached - uncached).abs().max())
    if not difference <= allowed:  # NaN fails
        raise Fault(
            f"logits with the cache differ by {difference:.3g} from those without, "
            f"{allowed:.3g} allowed"
        )
    # Greedy: each token has the highest logit without the cache too, up to that difference.
    chosen = uncached.gather(1, output.sequences[0, length:, None]).squeeze(1)
    if not bool((uncached.max(dim=1).values - chosen <= 2 * allowed).all()):
        raise Fault("another token is the best one without the cache")
    return f"{_NEW} tokens after {length}{passed_window}, logits within {difference:.2g}"


def _length(model: PreTrainedModel) -> tuple[int, str]:
    """The length of the prompt, which exceeds a short sliding window, and a remark on it."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    most = getattr(config, "max_position_embeddings", None) or math.inf
    if not isinstance(window, int) or window < 1:
        return _PROMPT, ""
    if window > _LONGEST_WINDOW or window + _PROMPT + _NEW > most:
        return _PROMPT, f" (the sliding window of {window} was not passed)"
    return window + _PROMPT, f", past the sliding window of {window}"


def _tokenizer(subject: Subject) -> str:
    # Without tokenizer files transformers builds an empty tokenizer of the model's type, or fails.
    if not _has_tokenizer_files(subject.directory):
        raise Fault("no tokenizer files in the directory")
    with quietly():
        tokenizer = AutoTokenizer.from_pretrained(subject.directory, trust_remote_code=False)
    if len(tokenizer) == 0:
        raise Fault("no tokenizer files in the directory")
    largest = max(tokenizer.get_vocab().values())
    if subject.model is None:
        return f"{len(tokenizer)} tokens"
    rows = subject.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise Fault(f"token id {largest} has no row in the embedding of {rows}")
    ids = tokenizer("The history of the steam engine")["input_ids"]
    if not ids:
        raise Fault("a sentence gives no tokens")
    return f"{len(tokenizer)} tokens, ids to {largest}, embedding of {rows}"


def _has_tokenizer_files(directory: Path) -> bool:
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
    )
    return any((directory / name).is_file() for name in names)


def _generation(subject: Subject) -> str:
    path = subject.directory / "generation_config.json"
    if not path.is_file():
        raise Skip("no generation_config.json; stock defaults apply")
    config = GenerationConfig.from_pretrained(subject.directory)
    if subject.model is None:
        return "readable"
    rows = subject.model.get_input_embeddings().weight.shape[0]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not -1 <= token < rows:
                raise Fault(f"{name} {token} has no row in the embedding of {rows}")
    return "readable, its special tokens are in the vocabulary"


@torch.inference_mode()
def _against(subject: Subject) -> str:
    if subject.plan is None:
        raise Fault(f"needs a readable {PLAN_FILE} in the directory, which names the layers")
    pruned = _model(subject)
    try:
        source = source_directory(str(subject.against))
        original, _ = stock_model(source, load_config(source), dtype=pruned.dtype)
    except SimdiffError as error:
        raise UnusableError(
            f"verify: against={subject.against} must be a model that transformers loads: {error}"
        ) from None
    ids = _ids(pruned, 64)
    found = pruned(input_ids=ids, use_cache=False).logits
    changed = subject.recovery.changed if subject.recovery else {}
    with layers_removed(original, subject.plan.removed):
        _adopt(original, pruned, changed)
        wanted = original(input_ids=ids, use_cache=False).logits
        if wanted.shape != found.shape:
            raise Fault(f"logits of shape {tuple(found.shape)} against {tuple(wanted.shape)}")
        unequal = list(differing(pruned, original))
    del original
    gc.collect()
    difference = float((found.float() - wanted.float()).abs().max())
    if unequal:
        raise Fault(
            f"{len(unequal)} parameters differ, first {unequal[0]}; logits by {difference:.3g}"
        )
    if difference != 0:
        raise Fault(f"the parameters are equal, but logits differ by {difference:.3g}")
    which = f"all parameters but the {len(changed)} recovered ones" if changed else "all parameters"
    return f"{which}, and the logits of {ids.numel()} tokens, exactly"


def _adopt(original: PreTrainedModel, pruned: PreTrainedModel, changed: Collection[str]) -> None:
    """Copy the parameters that recovery changed into the original; all others must be equal."""
    theirs, ours = dict(original.named_parameters()), dict(pruned.named_parameters())
    for name in changed:
        if name in theirs and name in ours and theirs[name].shape == ours[name].shape:
            theirs[name].copy_(ours[name])


_CHECKS: dict[str, Callable[[Subject], str]] = {
    "config": _config,
    "loads with stock classes": _load,
    "weights against config": _keys,
    "plan against config": _plan,
    "recovery": _recovery,
    "layers": _layers,
    "finite": _finite,
    "cached generation": _cached,
    "tokenizer": _tokenizer,
    "generation config": _generation,
    "equals the plan applied to the original": _against,
}
# Of a directory for vLLM's no-op blocks, which stock classes do not load.
_NO_OP_CHECKS: dict[str, Callable[[Subject], str]] = {
    "config": verify_no_op.config,
    "loads with stock classes": verify_no_op.not_stock,
    "weights against config": verify_no_op.weights,
    "plan against config": verify_no_op.plan,
    "finite": verify_no_op.finite,
    "cached generation": verify_no_op.not_stock,
    "tokenizer": _tokenizer,
    "generation config": _generation,
    "equals the original's tensors": verify_no_op.against,
}
