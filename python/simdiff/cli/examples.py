"""Examples that end the help of each command; all of them parse."""

from __future__ import annotations

EXAMPLES = {
    "run": (
        "simdiff run ./my-model --text corpus.txt --ratio 0.25 --output out",
        "simdiff run demo --num-layers 4 --speed-rounds 0 --output out",
    ),
    "score": (
        "simdiff score ./my-model --text corpus.txt --output scores.json",
        "simdiff score ./my-model --text corpus.txt --calibrate-until-stable -o scores.json",
    ),
    "plan": (
        "simdiff plan scores.json --speed-up 1.3",
        "simdiff plan scores.json --model ./my-model --effort normal --num-layers 8 -o plan.json",
    ),
    "prune": (
        "simdiff prune ./my-model --plan plan.json --output ./small",
        "simdiff prune model-Q4_K_M.gguf --remove 8-11 --output small.gguf",
    ),
    "recover": (
        "simdiff recover ./my-model --plan plan.json --text corpus.txt --output ./repaired",
        "simdiff recover ./my-model --plan plan.json --text corpus.txt --method lora -o ./new",
    ),
    "verify": ("simdiff verify ./small --against ./my-model",),
    "export": (
        "simdiff export plan.json --format mergekit --model org/my-model",
        "simdiff export plan.json --format llama.cpp",
        "simdiff export sublayers.json --format vllm --model ./my-model --output no-op",
    ),
    "eval": (
        "simdiff eval ./my-model ./small --text corpus.txt --output evaluation.json",
        "simdiff eval ./my-model --remove 8-11 --tasks piqa,arc_easy --limit 200",
    ),
    "compare": (
        "simdiff compare ./my-model --text corpus.txt --num-layers 2,4,8 --output comparison",
        "simdiff compare ./my-model --text corpus.txt --criteria simdiff,last-n -o comparison",
    ),
    "bench": (
        "simdiff bench ./my-model ./small --batch-sizes 1,8 --output bench.json",
        "simdiff bench ./my-model --remove 8-11",
    ),
    "reproduce": (
        "simdiff reproduce paper-table-1 --models org/my-model --output table",
        "simdiff reproduce paper-table-1 --models demo --text demo --tasks piqa,squad --task-data "
        "demo --limit 50 --output table",
    ),
    "rerun": ("simdiff rerun out --output again",),
    "report": (
        "simdiff report out --output report.html",
        "simdiff report bench.json -o speed.html",
        "simdiff report ./small --evaluation evaluation.json --bench bench.json -o report.html",
    ),
    "plot": ("simdiff plot out --output figures",),
    "push": ("simdiff push out me/my-model-small --dry-run",),
    "profile": ("simdiff profile ./my-model --text corpus.txt --output trace.json",),
    "info": ("simdiff info", "simdiff info --json"),
    "doctor": ("simdiff doctor ./my-model",),
}


def epilog(command: str, further: str | None) -> str | None:
    """The end of a command's help: its examples, and what it adds itself."""
    lines = EXAMPLES.get(command, ())
    shown = "\n".join(("examples:", *(f"  {line}" for line in lines))) if lines else ""
    return "\n\n".join(filter(None, (shown, further))) or None
