"""Layers scored while transformers' `Trainer` trains: which of them does fine-tuning put to use?

    python examples/trainer_callback.py --steps 20

`LayerScores` is a callback for any `Trainer` of a decoder. Every few steps it watches the forward
passes of one step and keeps the block influence of every layer, mean(1 - cos). The hooks are there
for that step alone; no hidden state is kept and no pass is added.
"""

from __future__ import annotations

import argparse
import tempfile

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainingArguments

from simdiff.data.text import token_windows
from simdiff.models.loading import load_model
from simdiff.models.structure import find_decoder_layers
from simdiff_kernels import RunningScores


class LayerScores(TrainerCallback):
    """Keeps in `history`, by step, the block influence of every layer."""

    def __init__(self, every: int = 10) -> None:
        """Watch one step of `every`."""
        self.every = every
        self.history: dict[int, list[float]] = {}
        self._handles: list[RemovableHandle] = []

    def on_step_begin(self, args, state, control, *, model: nn.Module, **more) -> None:
        """Put hooks on the layers for the step that begins."""
        if state.global_step % self.every:
            return
        layers = find_decoder_layers(model).modules
        self._scores = RunningScores(num_layers=len(layers))

        def hook(index: int):
            def after(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
                before = args[0] if args else kwargs["hidden_states"]
                self._scores.update(index, before.detach(), output.detach())

            return after

        self._handles = [
            layer.register_forward_hook(hook(index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]

    def on_step_end(self, args, state, control, **more) -> None:
        """Take the hooks away, and the scores of the step."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            found = self._scores.finish()["cosine_distance"].mean
            self.history[state.global_step - 1] = found.tolist()


def main(argv: list[str] | None = None) -> dict[int, list[float]]:
    """Returns the block influence of every layer by step."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="demo", help="a directory, a hub name, or demo")
    arguments.add_argument("--text", default="demo", help="a text file, .jsonl, or demo")
    arguments.add_argument("--steps", type=int, default=20, help="of training")
    arguments.add_argument("--windows", type=int, default=32, help="of text to train on")
    arguments.add_argument("--window-length", type=int, default=256, help="in tokens")
    given = arguments.parse_args(argv)

    model, tokenizer = load_model(given.model, dtype="float32")
    amount = {"num_windows": given.windows, "window_length": given.window_length}
    tokens = token_windows(given.text, tokenizer, **amount).tokens
    callback = LayerScores(every=max(1, given.steps // 4))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=given.steps,
                learning_rate=1e-4,
                per_device_train_batch_size=2,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": window, "labels": window} for window in tokens],
            callbacks=[callback],
        ).train()
    for step, influence in callback.history.items():
        lowest = sorted(range(len(influence)), key=influence.__getitem__)[:3]
        print(f"step {step}: the least influence have layers {', '.join(map(str, lowest))}")
    return callback.history


if __name__ == "__main__":
    main()
