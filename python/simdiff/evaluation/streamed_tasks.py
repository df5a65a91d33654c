"""Tasks of lm_eval on a streamed model: its requests of a kind are answered in one pass.

lm_eval hands over all requests of a kind at once, and its own code divides them into batches. It
runs twice: first to note the batches, while nothing is computed, and then, once all layers have
been applied to all batches, to make answers of the logits. So the answers are those of the model
loaded whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.io.outputs import new_file
from simdiff.io.progress import tell, track
from simdiff.models.partial_forward import Course
from simdiff.models.state_files import DONE
from simdiff.models.streamed import stream_of
from simdiff.models.sweep import WHOLE, Plan, Sweep

Answers: TypeAlias = list[Any]
"""One for each request: log-likelihood, and whether it is the greedy choice where lm_eval asks."""


class TaskAnswers:
    """What a streamed model answers without the layers of some plans: all of them in a pass.

    Args:
        plans: sets of removed layers.
    """

    def __init__(self, plans: Sequence[Plan] = (WHOLE,)) -> None:
        """Know nothing yet."""
        self.plans = tuple(plans)
        self._known: dict[str, dict[Plan, Answers]] = {}

    def get(
        self,
        plan: Plan,
        kind: str,
        requests: Sequence[Any],
        read: Callable[[], dict[Plan, Answers]],
    ) -> Answers:
        """The answers of a plan, of which `read` makes those of all plans if none are known."""
        asked = json.dumps([kind, [request.args for request in requests]])
        key = hashlib.sha256(asked.encode()).hexdigest()
        if key not in self._known:
            self._known[key] = read()
        return self._known[key][plan]


def check_tasks(model: PreTrainedModel, loaded: Any) -> None:
    """Refuse tasks that a streamed model cannot answer.

    Args:
        model: any model.
        loaded: see `simdiff.evaluation.tasks.LoadedTasks`.

    Raises:
        SimdiffError: the model is streamed, and a task lets it generate.
    """
    if stream_of(model) is None:
        return
    for name, task in loaded.tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            raise SimdiffError(
                f"task {name} lets the model generate, got a streamed one, which would read all "
                "its weights for every token: give tasks that ask for log-likelihoods, or run it "
                "on a machine that holds the model"
            )


def streamed_harness(
    harness: type[Any], model: PreTrainedModel, answers: TaskAnswers, plan: Plan
) -> type[Any]:
    """A class of lm_eval's that answers all requests of a kind in one pass over the weights.

    Args:
        harness: lm_eval's class of models of transformers, or one made of it; it is returned as it
            is for a model that is not streamed.
        model: which will be asked.
        answers: what is known already, and which plans are read together.
        plan: whose answers are wanted.
    """
    if stream_of(model) is None:
        return harness
    from lm_eval.models.huggingface import HFLM

    class StreamedHarness(harness):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._noted: list[Tensor] | None = None
            self._logits: Callable[[Tensor], Tensor] | None = None

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Answers:
            return self._answered("loglikelihood", requests)

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> Answers:
            return self._answered("loglikelihood_rolling", requests)

        def _answered(self, kind: str, requests: Sequence[Any]) -> Answers:
            def ask() -> Answers:
                found: Answers = getattr(HFLM, kind)(self, requests, disable_tqdm=True)
                return found

            def read() -> dict[Plan, Answers]:
                self._noted = []
                ask()
                batches, self._noted = self._noted, None
                with ranks.alone():  # each process has requests of its own
                    return _in_one_pass(self, ask, batches, answers.plans, kind, len(requests))

            return answers.get(plan, kind, requests, read)

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, **{**options, "disable_tqdm": True})

        def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
            if self._noted is not None:
                self._noted.append(inps.cpu())
                return torch.zeros(*inps.shape, 1, device=inps.device)
            assert self._logits is not None
            return self._logits(inps)

        def _select_cont_toks(self, logits: Tensor, **of: Any) -> Tensor:
            if self._noted is None:
                chosen: Tensor = super()._select_cont_toks(logits, **of)
                return chosen
            size = self.model.get_input_embeddings().weight.shape[0]
            return logits.new_zeros(1).expand(of["contlen"], size)

    return StreamedHarness


def _in_one_pass(
    harness: Any,
    ask: Callable[[], Answers],
    batches: Sequence[Tensor],
    plans: Sequence[Plan],
    kind: str,
    num_requests: int,
) -> dict[Plan, Answers]:
    """The answers of every plan; see `streamed_harness`."""
    purpose = f"tasks, {kind}"
    read = dict.fromkeys(plans, range(len(batches)))
    sweep = Sweep(harness.model, [{"input_ids": ids} for ids in batches], read, purpose=purpose)
    path = None if sweep.directory is None else sweep.directory / DONE
    if path is not None and path.exists():
        return _loaded(path, plans)
    _tell_sizes(harness.model, sweep, batches, kind, num_requests)
    found: dict[Plan, Answers] = {}
    with sweep.finished(head=True) as partial:
        bar = track(range(len(plans) * len(batches)), f"{purpose}, head")
        for plan in plans:
            turns = iter(range(len(batches)))

            def logits(ids: Tensor, plan: Plan = plan, turns: Any = turns) -> Tensor:
                batch = next(turns)
                if not torch.equal(ids.cpu(), batches[batch]):
                    raise SimdiffError(f"{purpose}: lm_eval must ask the same twice, and did not")
                course = Course(len(partial.layers), sweep.states(plan, batch))
                with partial.following(course):
                    made: Tensor = harness.model(input_ids=ids, use_cache=False).logits
                next(bar, None)
                return made

            harness._logits = logits
            found[plan] = ask()
        for _ in bar:  # to its end
            pass
    if path is not None:
        with new_file(path, overwrite=True) as scratch:
            content = {
                _name(plan): torch.tensor(made, dtype=torch.float64) for plan, made in found.items()
            }
            safetensors.torch.save_file(content, scratch)
        sweep.drop_states()
    return found


def _tell_sizes(
    model: PreTrainedModel, sweep: Sweep, batches: Sequence[Tensor], kind: str, num_requests: int
) -> None:
    """Say before the pass what it reads and takes."""
    stream = stream_of(model)
    assert stream is not None
    size, most = model.get_input_embeddings().weight, sweep.most_bytes()
    place = "" if sweep.directory is None else f" on the disk of {stream.options.folder}"
    logits = 2 * max(ids.numel() for ids in batches) * size.shape[0] * size.element_size()
    tell(
        f"Note: {num_requests} requests ({kind}) in {len(batches)} batches of "
        f"{sum(ids.numel() for ids in batches):,} tokens are answered in one pass over the "
        f"weights, with at most {most / 1e9:.3g} GB of hidden states{place}, "
        f"{min(most, stream.options.memory) / 1e9:.3g} GB of them in memory, and "
        f"{logits / 1e9:.3g} GB of logits"
    )


def _name(plan: Plan) -> str:
    return f"without {','.join(map(str, sorted(plan)))}"


def _loaded(path: Path, plans: Sequence[Plan]) -> dict[Plan, Answers]:
    """What `_in_one_pass` left in a file."""
    content = safetensors.torch.load_file(path)
    return {
        plan: [
            (one[0], bool(one[1])) if isinstance(one, list) else one
            for one in content[_name(plan)].tolist()
        ]
        for plan in plans
    }
