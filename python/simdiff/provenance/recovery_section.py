"""The section of the model card on recovery."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from simdiff.io.kinds import PLAN_FILE
from simdiff.provenance.markdown import code, plain
from simdiff.recovery.methods import METHODS
from simdiff.recovery.record import RECORD, STAGES, RecoveryRecord

_WORDS = {"dense": "before the cut", "pruned": "plain cut", "recovered": "this model"}


def what_was_done(recovery: RecoveryRecord | None) -> str:
    """A sentence for the introduction that tells whether the kept layers were changed."""
    if recovery is None:
        return "The layers that stay are as they were: nothing was trained afterwards."
    if not recovery.changed:
        return (
            f"Recovery ({code(recovery.method)}) was tried and changed nothing: the layers that "
            "stay are as they were."
        )
    how = "trained afterwards" if recovery.trained else "solved for, not trained"
    return (
        f"Of the layers that stay {len(recovery.changed)} weights were changed to make up for it "
        f"({code(recovery.method)}: {how}); all others are as they were."
    )


def recovery_section(recovery: RecoveryRecord) -> str:
    """The section that describes the recovery, with its numbers."""
    lines = [
        "## Quality and recovery\n",
        "| | held-out perplexity | against the plain cut |",
        "|---|---|---|",
    ]
    plain = recovery.perplexity("pruned")
    for stage in STAGES:
        value = recovery.perplexity(stage)
        lines.append(f"| {_WORDS[stage]} | {value:.2f} | {value / plain - 1:+.1%} |")
    lines += [
        "",
        f"Measured on {_text(recovery.evaluation)}, which recovery did not see.",
        "",
        f"- Method: {code(recovery.method)}: {code(recovery.formula)}",
        f"- Saw: {_text(recovery.calibration)}",
        f"- Took: {recovery.seconds:.0f} s on {code(recovery.machine)}",
        f"- Changed: {len(recovery.changed)} weights, listed in `{RECORD}` with their SHA-256",
    ]
    lines += [f"- {code(name)}: {code(value)}" for name, value in recovery.settings.items()]
    lines += [f"- **Note**: {code(note)}" for note in recovery.notes]
    return "\n".join(lines) + "\n"


def _text(identity: Mapping[str, Any]) -> str:
    return (
        f"{identity.get('num_windows')} windows of {identity.get('window_length')} tokens of "
        f"{code(identity.get('source'))}, part {code(identity.get('part'))}"
    )


def recovery_command(recovery: RecoveryRecord, model: str) -> str:
    """The command that repeats the cut and the recovery; `model` must be quoted already."""
    text = recovery.calibration
    options = "".join(
        f" --{option} {int(text[key])}"
        for option, key in (
            ("num-windows", "num_windows"),
            ("window-length", "window_length"),
            ("seed", "seed"),
        )
        if isinstance(text.get(key), int)
    )
    own = METHODS[recovery.method].options if recovery.method in METHODS else ()
    options += "".join(
        f" --{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(plain(value))}")
        for name, value in {**recovery.settings}.items()
        if name in ("batch_size", *own) and value is not None and value is not False
    )
    if "column" in text:
        options += f" --text-column {shlex.quote(plain(text['column']))}"
    if recovery.evaluation.get("part") == "all":
        options += f" --held-out {shlex.quote(plain(recovery.evaluation.get('source')))}"
    method = shlex.quote(plain(recovery.method))
    return (
        f"simdiff recover {model} --plan {PLAN_FILE} --method {method} "
        f"--text {shlex.quote(plain(text.get('source') or 'TEXT'))}{options} --output recovered"
    )
