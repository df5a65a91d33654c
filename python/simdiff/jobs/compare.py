"""`simdiff compare` from beginning to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from simdiff.comparison.compare import ComparisonOptions, compare, remove_journal
from simdiff.comparison.results import Comparison
from simdiff.data.text_options import TextOptions, both_parts
from simdiff.io import ranks
from simdiff.io.kinds import Kind
from simdiff.io.outputs import check_new_path, new_directory, write_config
from simdiff.io.progress import step
from simdiff.io.trackers import Log, logged
from simdiff.jobs.tracking import comparison_tracked, options_told
from simdiff.models.loading import load_model
from simdiff.models.streamed import StreamOptions
from simdiff.models.structure import find_decoder_layers
from simdiff.models.sweep import remove_states
from simdiff.report.page import write_comparison


def run_comparison(
    name: str,
    directory: str | Path,
    *,
    text: TextOptions,
    options: ComparisonOptions,
    held_out_source: str | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    stream: StreamOptions | None = None,
    overwrite: bool = False,
    restart: bool = False,
    config: str | None = None,
    log: Log | Sequence[str] = (),
) -> Comparison:
    """Compare criteria on one model, see `simdiff.comparison.compare.compare`.

    Writes into `directory`: compare.html, compare.csv, compare.json, scores.json and
    plans/. What is finished before an interruption is kept beside it,
    in a directory of the same name that ends with .journal, and removed at the end.

    Args:
        name, directory, text, held_out_source, batch_size, dtype, device, overwrite, log: see
            `run`.
        options: what is compared.
        restart: forget what an interrupted comparison left.
        stream: see `load_model`.
        config: content of the config.yaml that repeats this; None writes none.
    """
    directory = Path(directory).absolute()
    check_new_path(directory, overwrite, Kind.COMPARISON)
    text.check(held_out_source)
    told = options_told("compare", name, text, asdict(options))
    with logged(log, directory, told) as trackers:
        journal = directory.with_name(directory.name + ".journal")
        if restart:
            ranks.first(lambda: remove_journal(journal))
        model, tokenizer = load_model(name, dtype=dtype, device=device, stream=stream)
        options.counts(len(find_decoder_layers(model)))
        calibration, held_out = both_parts(text, tokenizer, held_out_source)
        comparison = compare(
            model, calibration, held_out, options, journal, name=name, batch_size=batch_size
        )
        with new_directory(directory, overwrite, Kind.COMPARISON, finished=True) as scratch:
            write_config(scratch, config)
            ranks.first(lambda: _write(comparison, scratch))
        ranks.first(lambda: remove_journal(journal))
        remove_states(model)
        comparison_tracked(trackers, comparison, directory)
        return comparison


def _write(comparison: Comparison, directory: Path) -> None:
    comparison.save(directory)
    with step("write the report"):
        write_comparison(directory, comparison)
