"""Training: what it learns, that it can be interrupted anywhere, and that it never ends worse."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from own_text import decided, drawn
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.recovery import fine_tuning, training_step
from simdiff.recovery.copies import pruned_copy
from simdiff.recovery.fine_tuning import FineTuning, fine_tune
from simdiff.recovery.fine_tuning_options import PRESETS, FineTuningOptions, preset
from simdiff.recovery.head_loss import Distillation
from simdiff.recovery.lora import Adapters, LoraOptions, target_modules
from simdiff.recovery.training_data import Examples, batch_indices, cut_windows
from simdiff.recovery.training_state import STATE
from simdiff.recovery.training_step import Student

SMALL = replace(
    PRESETS["distillation"], lora=LoraOptions(rank=4, alpha=8.0, dropout=0.1), length=24,
    micro_batch_size=3, steps=12, learning_rate=1e-2, warmup_steps=2, evaluations=4, patience=0,
    compute_dtype="float32",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dense() -> PreTrainedModel:
    return decided(make_tiny("llama"))


@pytest.fixture
def text(dense: PreTrainedModel) -> tuple[Examples, Examples]:
    return cut_windows(drawn(dense, 80, 24), 24, {"source": "own"}).set_apart(16)


def trained(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    options: FineTuningOptions = SMALL,
    directory: Path | None = None,
) -> tuple[PreTrainedModel, FineTuning]:
    pruned = pruned_copy(dense, (2, 3))
    return pruned, fine_tune(
        pruned, *text, options, teacher=dense, directory=directory, progress=False
    )


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("teaches", [True, False])
def test_it_learns_and_leaves_a_stock_model(
    dense: PreTrainedModel, text: tuple[Examples, Examples], teaches: bool
) -> None:
    before, plain = weights(dense), pruned_copy(dense, (2, 3))
    options = SMALL if teaches else replace(SMALL, distillation=None)
    model, result = trained(dense, text, replace(options, steps=40))
    losses = [point["set_apart_loss"] for point in result.curve]
    with torch.no_grad():
        ids = text[1].tokens
        best = float(dense(input_ids=ids, labels=ids).loss)
    share = 0.4 if teaches else 0.1  # 1472 tokens of text alone say little
    assert min(losses) < losses[0] - share * (losses[0] - best), (losses, best)
    assert result.best_step == result.curve[losses.index(min(losses))]["step"]
    assert equal(weights(dense), before), "the dense model stays as it is"
    assert list(weights(model)) == list(weights(plain))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model) is type(plain)
    assert set(vars(model)) == set(vars(plain)), "nothing of peft stays behind"
    with torch.no_grad():  # the loss of the merged model is that of the best evaluation
        loss = model(input_ids=ids, labels=ids).loss
    assert float(loss) == pytest.approx(min(losses), rel=1e-5)
    changed = [name for name in before if not equal_name(name, plain, model)]
    assert changed
    assert all("proj" in name for name in changed)


def equal_name(name: str, one: PreTrainedModel, other: PreTrainedModel) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return name not in mine or torch.equal(mine[name], theirs[name])


def test_seeds(dense: PreTrainedModel, text: tuple[Examples, Examples]) -> None:
    torch.manual_seed(5)
    drawn_after = torch.rand(3)
    torch.manual_seed(5)
    first = weights(trained(dense, text)[0])
    assert torch.equal(torch.rand(3), drawn_after), "the caller's generator stays as it was"
    torch.manual_seed(6)
    assert equal(first, weights(trained(dense, text)[0]))
    assert not equal(first, weights(trained(dense, text, replace(SMALL, seed=1))[0]))


@pytest.mark.parametrize("call", [2, 9, 20, 33])
def test_interrupted_anywhere_it_gives_the_same_weights(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    """Stopped within the n-th forward; states are written every few steps only."""
    options = replace(SMALL, steps=10, checkpoint_minutes=0)
    wanted, whole = trained(dense, text, options)
    left = call
    loss = Student._loss
    saves = fine_tuning._Run._save
    saved = 0

    def stopping(self: Student, *arguments: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    def seldom(self: object) -> None:
        nonlocal saved
        saved += 1
        if saved % 3 == 1:
            saves(self)

    monkeypatch.setattr(Student, "_loss", stopping)
    monkeypatch.setattr(fine_tuning._Run, "_save", seldom)
    with pytest.raises(KeyboardInterrupt):
        trained(dense, text, options, tmp_path / "state")
    monkeypatch.undo()
    torch.set_num_threads(1)
    model, result = trained(dense, text, options, tmp_path / "state")
    assert equal(weights(model), weights(wanted))
    keys = ("step", "tokens", "learning_rate", "train_loss", "set_apart_loss")
    assert [[p[k] for k in keys] for p in result.curve] == [
        [p[k] for k in keys] for p in whole.curve
    ]


def test_a_finished_training_is_not_done_again(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, result = trained(dense, text, directory=tmp_path / "state")
    monkeypatch.setattr(Student, "_loss", lambda *_: pytest.fail("it trained"))
    again, same = trained(dense, text, directory=tmp_path / "state")
    assert equal(weights(again), weights(model))
    assert same == result


def test_a_state_of_other_input_or_damaged(
    dense: PreTrainedModel, text: tuple[Examples, Examples], tmp_path: Path
) -> None:
    directory = tmp_path / "state"
    trained(dense, text, directory=directory)
    with pytest.raises(SimdiffError, match="another run: it differs in options"):
        trained(dense, text, replace(SMALL, learning_rate=2e-2), directory)
    other = text[0].take(slice(1, None)), text[1]
    with pytest.raises(SimdiffError, match="differs in start, examples"):
        trained(dense, other, SMALL, directory)
    whole = (directory / STATE).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PK nothing"):
        (directory / STATE).write_bytes(damaged)
        with pytest.raises(SimdiffError, match="but is damaged .*: remove .* to start again"):
            trained(dense, text, SMALL, directory)


@pytest.mark.parametrize("where", ["loss", "gradient", "evaluation"])
def test_nan_stops_and_keeps_the_last_good_state(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    options = replace(SMALL, steps=12, evaluations=12)
    short, _ = trained(dense, text, replace(options, schedule="constant", steps=5, evaluations=5))
    options = replace(options, schedule="constant")
    if where == "evaluation":
        evaluate = Student.evaluate

        def broken(self: Student, examples: Examples) -> float:
            value = evaluate(self, examples)
            steps = self.optimizer.state.get(self._parameters[0], {}).get("step", 0)
            return math.nan if steps > 5 else value

        monkeypatch.setattr(Student, "evaluate", broken)
    else:
        gradients = Student.gradients

        def poisoned(self: Student, step: int) -> tuple[float, int]:
            loss, tokens = gradients(self, step)
            if step == 5 and where == "gradient":
                self._parameters[0].grad[0] = math.inf
            return math.nan if step == 5 and where == "loss" else loss, tokens

        monkeypatch.setattr(Student, "gradients", poisoned)
    model, result = trained(dense, text, options)
    assert result.stopped == fine_tuning.NOT_FINITE
    assert result.steps == (6 if where == "evaluation" else 5)
    assert result.best_step == 5
    assert "NaN or Inf" in result.notes[0]
    assert "those of step 5, the best before" in result.notes[0]
    assert equal(weights(model), weights(short))


def test_an_exploding_rate_gives_what_there_was(
    dense: PreTrainedModel, text: tuple[Examples, Examples]
) -> None:
    """No step was better: the weights are those from before, and it says so."""
    plain = weights(pruned_copy(dense, (2, 3)))
    model, result = trained(dense, text, replace(SMALL, learning_rate=1e4, warmup_steps=0))
    assert result.best_step == 0
    assert "no step of training lowered the loss" in result.notes[-1]
    assert equal(weights(model), plain)


def test_it_stops_early(dense: PreTrainedModel, text: tuple[Examples, Examples]) -> None:
    few = text[0].take(slice(0, 4)), text[1]  # learnt by heart: what is set apart gets worse
    options = replace(
        SMALL, distillation=None, steps=200, evaluations=100, patience=3, learning_rate=3e-2
    )
    _, result = trained(dense, few, options)
    losses = [point["set_apart_loss"] for point in result.curve]
    assert result.stopped == fine_tuning.EARLY
    assert result.steps < 200
    assert len(losses) - 1 - losses.index(min(losses)) == 3
    assert result.best_step == result.curve[-4]["step"]


def test_a_budget_of_time_settles_the_steps(
    dense: PreTrainedModel, text: tuple[Examples, Examples], tmp_path: Path
) -> None:
    options = replace(SMALL, steps=10**6, max_minutes=0.1, evaluations=2)
    _, result = trained(dense, text, options, tmp_path / "state")
    assert 2 < result.num_steps < 10**5
    assert result.seconds < 60 * 0.1 + 3
    assert result.curve[-1]["step"] == result.steps
    if result.stopped == fine_tuning.FINISHED:
        assert result.curve[-1]["learning_rate"] < 0.2 * SMALL.learning_rate
    with pytest.raises(SimdiffError, match="max_minutes must allow a step, which takes about"):
        trained(dense, text, replace(options, max_minutes=1e-6))


def test_measuring_the_time_of_a_step_leaves_no_trace(
    dense: PreTrainedModel, text: tuple[Examples, Examples]
) -> None:
    """As many steps as asked for fit: then the budget changes nothing."""
    plain, _ = trained(dense, text)
    model, result = trained(dense, text, replace(SMALL, max_minutes=10.0))
    assert result.num_steps == SMALL.steps
    assert equal(weights(model), weights(plain))


@pytest.mark.parametrize(
    ("keeps", "seconds", "most", "wanted"),
    [
        (None, 100.0, 1000, 33),  # 3 s a step, the second one measured
        (None, 100.0, 30, 30),
        (None, 2.9, 30, 0),
        # 2 s a step without the teacher, which reads 8 examples a second: 2 n + n.
        (False, 99.0, 1000, 33),
        (False, 98.9, 1000, 32),
        (False, 98.9, 31, 31),
        # Of 20 examples it reads each once: 2 n + 20 / 8 from the third step on.
        (True, 98.5, 1000, 48),
        (True, 98.4, 1000, 47),
        (True, 3.0, 1000, 1),
        (True, 2.9, 1000, 0),
    ],
)
def test_steps_that_fit(
    keeps: bool | None, seconds: float, most: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    teacher = SimpleNamespace(seconds=7.0, num_read=100, keeps=keeps, forget=lambda: None)
    student = object.__new__(Student)
    student.device, student._options = torch.device("cpu"), SMALL
    student.train, student.optimizer = range(20), SimpleNamespace(zero_grad=lambda: None)
    student.teacher = None if keeps is None else teacher

    def forget() -> None:
        teacher.seconds, teacher.num_read = 0.0, 0

    def step(number: int) -> None:
        nonlocal now
        now += (50.0, 3.0)[number]
        teacher.seconds, teacher.num_read = teacher.seconds + 1, teacher.num_read + 8

    teacher.forget, student.gradients = forget, step
    monkeypatch.setattr(training_step, "time", SimpleNamespace(perf_counter=lambda: now))
    assert SMALL.batch_size == 8
    assert student.steps_within(seconds, most) == wanted
    assert student.step_seconds == 3


def recomputes(model: PreTrainedModel) -> bool:
    """By the name that transformers 5 gave it in the end, or by the old one."""
    new = "is_activation_checkpointing"
    return bool(getattr(model, new if hasattr(model, new) else "is_gradient_checkpointing"))


def gradients(
    dense: PreTrainedModel, train: Examples, options: FineTuningOptions
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    pruned = pruned_copy(dense, (2, 3))
    student = Student(pruned, train, options, dense)
    assert recomputes(pruned) is options.gradient_checkpointing
    with torch.no_grad():
        for name, parameter in student.adapters.parameters().items():
            if "lora_B" in name:  # else A has no gradient yet
                parameter.normal_(std=0.1)
    student.gradients(0)
    found = {name: p.grad.clone() for name, p in student.adapters.parameters().items()}
    student.discard()
    assert not recomputes(pruned)
    assert not pruned.training
    return found


def test_gradient_checkpointing_and_portions_give_the_same_gradients(
    dense: PreTrainedModel, text: tuple[Examples, Examples]
) -> None:
    options = replace(SMALL, lora=replace(SMALL.lora, dropout=0.0))
    wanted = gradients(dense, text[0], options)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in wanted.values())
    for other in (
        replace(options, gradient_checkpointing=True),
        replace(options, micro_batch_size=1),
        replace(options, micro_batch_size=8),
    ):
        found = gradients(dense, text[0], other)
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_padding_changes_nothing(dense: PreTrainedModel) -> None:
    """Examples of several lengths in a batch against each alone."""
    tokens = drawn(dense, 6, 24)
    mask = torch.arange(24) < torch.tensor([24, 9, 15, 24, 5, 20])[:, None]
    counted = mask.clone()
    counted[:, :2] = False
    padded = Examples(tokens.where(mask, 0), mask, counted, {})
    options = replace(
        SMALL, lora=replace(SMALL.lora, dropout=0.0), batch_size=6, micro_batch_size=6
    )
    wanted = gradients(dense, padded, replace(options, micro_batch_size=1))
    found = gradients(dense, padded, options)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
    garbage = Examples(tokens, mask, counted, {})
    other = gradients(dense, garbage, options)
    for name, gradient in found.items():
        assert torch.allclose(other[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_logits_are_those_with_adapters(family: str, dtype: str) -> None:
    model = make_tiny(family).to(getattr(torch, dtype))
    adapters = Adapters(model, LoraOptions(rank=4, alpha=6.0))
    with torch.no_grad():
        for parameter in adapters.parameters().values():
            assert parameter.dtype == torch.float32
            parameter.normal_(std=0.2)
    exact = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            weight = module.get_base_layer().weight.detach().double()
            sums = [1.5 * (y @ x) for x, y in ((a.double(), b.double()), (a.abs(), b.abs()))]
            change, size = (s.detach().T if family == "gpt2" else s.detach() for s in sums)
            exact[name] = weight + change, weight.abs() + size
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.float()
        merged = adapters.merge()
        found = merged(input_ids=ids).logits.float()
    rounding = torch.finfo(getattr(torch, dtype)).eps
    assert float((found - wanted).abs().max()) <= 40 * rounding * float(wanted.abs().max())
    for name, (value, size) in exact.items():
        # 7 roundings of a float32 sum (4 products, their sum, the scale, the weight), then one to
        # the stored dtype: added in 16 bits, there would be two of those.
        allowed = 7 * 2**-24 * size + 0.5 * rounding * value.abs()
        stored = merged.get_submodule(name).weight.double()
        assert bool(((stored - value).abs() <= allowed * 1.001 + 2**-25).all()), name
    assert merged.dtype == getattr(torch, dtype)


def test_a_head_that_is_not_linear(dense: PreTrainedModel) -> None:
    """Capped logits: the loss is still that of the model."""
    from transformers import Gemma2Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Gemma2Config(
            vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, head_dim=8, final_logit_softcapping=2.0,
        )
    ).eval()  # fmt: skip
    train, apart = cut_windows(drawn(model, 40, 24), 24, {}).set_apart(8)
    pruned = pruned_copy(model, (2,))
    result = fine_tune(pruned, train, apart, SMALL, teacher=model, progress=False)
    with torch.no_grad():
        loss = pruned(input_ids=apart.tokens, labels=apart.tokens).loss
    best = min(point["set_apart_loss"] for point in result.curve)
    assert float(loss) == pytest.approx(best, rel=1e-5)


def test_targets() -> None:
    model = make_tiny("llama")
    assert len(target_modules(model)) == 6 * 7
    assert {name.rpartition(".")[2] for name in target_modules(model, ("q_proj", "up_proj"))} == {
        "q_proj", "up_proj"
    }  # fmt: skip
    with pytest.raises(SimdiffError, match="q_proj, k_proj.* got x_proj"):
        target_modules(model, ("q_proj", "x_proj"))


def test_a_mixture_of_experts_trains_what_is_linear() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, num_local_experts=4,
        )
    ).eval()  # fmt: skip
    train, apart = cut_windows(drawn(model, 40, 16), 16, {}).set_apart(8)
    pruned = pruned_copy(model, (1,))
    result = fine_tune(pruned, train, apart, replace(SMALL, steps=4), teacher=model, progress=False)
    assert any("q_proj" in name for name in result.targets)
    with torch.no_grad():
        loss = pruned(input_ids=apart.tokens, labels=apart.tokens).loss
    best = min(point["set_apart_loss"] for point in result.curve)
    assert float(loss) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_minutes": -1.0}, "max_minutes must be above 0"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant"),
        ({"distillation_weight": 2.0}, "distillation: weight must be 0 to 1"),
        ({"speed": 2}, "no option is called speed"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SimdiffError, match=message):
        preset("distillation", **changes)


@pytest.mark.parametrize(
    ("weights", "device", "wanted", "fast", "found"),
    [
        ("float32", "cpu", "float32", True, "float32"),
        ("float32", "cpu", "bfloat16", False, "bfloat16"),
        ("float32", "cpu", "auto", True, "bfloat16"),
        ("float32", "cpu", "auto", False, "float32"),
        ("float32", "cuda", "auto", True, "bfloat16"),
        ("float32", "cuda", "auto", False, "float32"),
        ("bfloat16", "cpu", "auto", False, "bfloat16"),
        ("float16", "cpu", "auto", False, "bfloat16"),
    ],
)
def test_dtype_of_products(
    weights: str, device: str, wanted: str, fast: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((torch.cpu, "_is_avx512_bf16_supported"), (torch.cuda, "is_bf16_supported"),
                        (torch.cpu, "_is_amx_tile_supported")):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda: fast)
    model = SimpleNamespace(dtype=getattr(torch, weights), device=torch.device(device))
    assert training_step.compute_dtype(model, wanted) == getattr(torch, found)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    if device == "cpu" and wanted == "auto":
        assert training_step.compute_dtype(model, wanted) == torch.bfloat16
    if weights != "float32":
        with pytest.raises(SimdiffError, match=f"needs a model in float32, got torch.{weights}"):
            training_step.compute_dtype(model, "float32")


def test_presets() -> None:
    paper = preset("paper")
    assert (paper.lora.rank, paper.lora.alpha, paper.epochs, paper.batch_size) == (8, 16.0, 1.0, 64)
    assert paper.distillation is None
    assert preset("distillation", rank=8).lora.alpha == 16.0, "the scale of the update stays"
    assert preset("distillation", distillation_weight=0.0).distillation is None
    assert preset("text", distillation_weight=0.5).distillation == Distillation(0.5)
    rates = [paper.learning_rate_at(step, 300) for step in range(300)]
    assert max(rates) == rates[100] == 1e-4
    assert rates[0] == pytest.approx(1e-4 / 101)
    assert rates[200] == pytest.approx(0.5e-4)
    assert 0 < rates[-1] < 1e-6


def test_peft_is_needed(
    dense: PreTrainedModel, text: tuple[Examples, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SimdiffError, match=r"package peft .*pip install 'simdiff-kernels\[recover"):
        trained(dense, text)


def test_distillation_needs_the_dense_model(
    dense: PreTrainedModel, text: tuple[Examples, Examples]
) -> None:
    with pytest.raises(SimdiffError, match="needs the dense model as teacher"):
        fine_tune(pruned_copy(dense, (2, 3)), *text, SMALL, progress=False)


def test_the_teacher_reads_an_example_once(
    dense: PreTrainedModel, text: tuple[Examples, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    from simdiff.recovery import teacher as module

    student = Student(pruned_copy(dense, (2, 3)), text[0], SMALL, dense)
    assert student.teacher is not None
    for step in range(20):
        student.gradients(step)
    distinct = {int(i) for step in range(20) for i in batch_indices(64, 8, step, 0)}
    assert student.teacher.num_read == len(distinct) == 64
    monkeypatch.setattr(module, "MEMORY_BUDGET", 0)
    forgetful = Student(pruned_copy(dense, (2, 3)), text[0], SMALL, dense)
    for step in range(20):
        forgetful.gradients(step)
    assert forgetful.teacher is not None
    assert forgetful.teacher.num_read == 160
