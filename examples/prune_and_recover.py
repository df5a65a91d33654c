"""The whole way in Python: score, plan, prune, repair, evaluate.

    python examples/prune_and_recover.py --output out        # about five minutes on two cores

`out/pruned` and `out/recovered` are checkpoints that `from_pretrained` loads. The repair is the
training-free one; `--method distillation` trains on from there, for as long as `--minutes` says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import simdiff


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the held-out perplexity of each model."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="demo", help="a directory, a hub name, or demo")
    arguments.add_argument("--text", default="demo", help="a text file, .jsonl, or demo")
    arguments.add_argument("--ratio", type=float, default=0.25, help="of the layers that go")
    arguments.add_argument("--windows", type=int, default=32, help="of text")
    arguments.add_argument("--window-length", type=int, default=512, help="in tokens")
    arguments.add_argument("--method", default="closed-form", help="or lora, distillation, partial")
    arguments.add_argument("--minutes", type=float, help="of training")
    arguments.add_argument("--output", type=Path, required=True, help="a directory")
    given = arguments.parse_args(argv)
    given.output.mkdir(exist_ok=True)
    amount = {"num_windows": given.windows, "window_length": given.window_length}

    scores = simdiff.score(given.model, given.text, **amount)
    scores.save(given.output / "scores.json")
    plan = simdiff.plan(scores, ratio=given.ratio, model=given.model)
    for note in plan.notes:
        print(f"note: {note}")
    pruned = simdiff.prune(given.model, plan, given.output / "pruned")

    training = {} if given.minutes is None else {"max_minutes": given.minutes}
    record = simdiff.recover(
        given.model,
        plan,
        given.output / "recovered",
        given.text,
        method=given.method,
        **amount,
        **training,
    )
    print(f"repaired in {record.seconds:.0f} s: {record.formula}")

    names = {"dense": given.model, "pruned": pruned, "recovered": given.output / "recovered"}
    quality = simdiff.evaluate(list(names.values()), given.text, **amount)
    perplexities = {}
    for name, model in zip(names, quality.models, strict=True):
        perplexities[name] = model.perplexity.perplexity
        print(f"{name:10} {model.num_parameters / 1e6:6.1f} M {perplexities[name]:8.2f}")
    return perplexities


if __name__ == "__main__":
    main()
