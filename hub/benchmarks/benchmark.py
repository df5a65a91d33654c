"""What `kernels benchmark` runs: the scorers beside the same formulas in plain PyTorch."""

import torch
from kernels.benchmark import Benchmark
from torch import Tensor

NUM_LAYERS = 8


def formulas(before: Tensor, after: Tensor) -> Tensor:
    """The six metrics of each token in float32, stacked in the order of the kernel's `METRICS`."""
    x, y = before.float(), after.float()
    d = y - x
    norm_before, norm_after = x.norm(dim=-1), y.norm(dim=-1)
    return torch.stack(
        [
            1 - (x * y).sum(-1) / (norm_before * norm_after),
            d.square().sum(-1),
            d.abs().mean(-1),
            d.norm(dim=-1) / norm_before,
            norm_before,
            norm_after,
        ]
    )


def checked(got: Tensor, wanted: Tensor) -> Tensor:
    """The reference, after a comparison closer than the runner's, whose tolerance is 0.01."""
    torch.testing.assert_close(got.float(), wanted, rtol=1e-4, atol=1e-5)
    return wanted


class ScorersBenchmark(Benchmark):
    """Hidden states of a model with 4096 channels in bfloat16, as a calibration pass has them."""

    seed = 0

    def setup(self) -> None:
        """The states that enter and leave `NUM_LAYERS` layers."""
        batch = (1, 64) if self.device == "cpu" else (8, 2048)
        shape = (NUM_LAYERS + 1, *batch, 4096)
        steps = torch.randn(shape, device=self.device, dtype=torch.bfloat16)
        self.states = steps.cumsum(0)

    def benchmark_token_metrics(self) -> None:
        """The metrics of every token of one layer."""
        self.out = torch.stack(self.kernel.token_metrics(self.states[0], self.states[1]))

    def verify_token_metrics(self) -> Tensor:
        """The same by formulas."""
        return checked(self.out, formulas(self.states[0], self.states[1]))

    def benchmark_running_scores(self) -> None:
        """Means over tokens of all layers, each as soon as it has run, read once at the end."""
        running = self.kernel.RunningScores(NUM_LAYERS)
        for layer in range(NUM_LAYERS):
            running.update(layer, self.states[layer], self.states[layer + 1])
        summary = running.finish()
        means = torch.stack([summary[name].mean for name in self.kernel.METRICS])
        self.out = means.float().to(self.device)

    def verify_running_scores(self) -> Tensor:
        """The same by formulas."""
        layers = zip(self.states[:-1], self.states[1:], strict=True)
        means = [formulas(before, after).flatten(1).double().mean(1) for before, after in layers]
        return checked(self.out, torch.stack(means, dim=1).float())
