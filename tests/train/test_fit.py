import dataclasses
import itertools
import math

import pytest
import torch

from hqlt.evaluate import Score
from hqlt.model import HQLTConfig, HQLTForCausalLM
from hqlt.task import Parity, StandardLibrary, generator_for
from hqlt.train import Budget, Fit, fit
from hqlt.train.fit import loss_of, parameter_groups

TASK = Parity(train_lengths=(3, 6), test_lengths=(6, 12))
BUDGET = Budget(steps=6, batch_size=8, validations=3, validation_rows=16, test_rows=16)


def tiny(seed: int = 0, **more) -> HQLTForCausalLM:
    torch.manual_seed(seed)
    options = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "window": 4, "intermediate_size": 16}
    return HQLTForCausalLM(HQLTConfig(**options, **more, vocab_size=TASK.vocab_size))


def test_the_same_seed_trains_the_same_model_bit_for_bit():
    losses = [
        [update.loss for update in fit(tiny(), TASK, BUDGET, seed=1) if not isinstance(update, Fit)] for _ in range(2)
    ]
    assert losses[0] == losses[1]
    other = [update.loss for update in fit(tiny(), TASK, BUDGET, seed=2) if not isinstance(update, Fit)]
    assert losses[0] != other


def test_the_best_checkpoint_by_validation_is_tested():
    model = tiny()
    *progress, result = fit(model, TASK, BUDGET, seed=0)
    taken = {update.step: update.validation for update in progress if update.validation is not None}
    assert list(taken) == [2, 4, 6]
    assert result.validation.value == max(taken.values()) == taken[result.best_step]
    assert result.best_step == min(step for step, value in taken.items() if value == max(taken.values()))


def test_learning_rate_has_linear_warmup_and_cosine_decay():
    budget = Budget(steps=100, batch_size=1, learning_rate=2.0, warmup_ratio=0.1)
    rates = [budget.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[10] == rates[9] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.001 + 0.999 * 0.5))
    assert rates[99] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    constant = dataclasses.replace(budget, min_lr_ratio=1.0)
    assert {constant.learning_rate_at(step) for step in range(10, 100)} == {2.0}


def test_gradients_are_clipped_to_the_maximum_norm(monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def watch(self, *args):
        parameters = [p for group in self.param_groups for p in group["params"]]
        seen.append(math.sqrt(sum(p.grad.square().sum().item() for p in parameters if p.grad is not None)))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    budget = Budget(steps=3, batch_size=8, max_grad_norm=1e-3, validations=1, validation_rows=4, test_rows=4)
    updates = [update for update in fit(tiny(), TASK, budget, seed=0) if not isinstance(update, Fit)]
    assert all(t.gradient_norm > 1e-3 for t in updates)
    assert seen == pytest.approx([1e-3] * 3, rel=1e-2)


def test_an_update_whose_gradient_is_not_finite_is_skipped_and_counted():
    model = tiny()
    model.lm_head.weight.register_hook(lambda grad: grad * torch.nan)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    budget = Budget(steps=2, batch_size=4, validations=1, validation_rows=4, test_rows=4)
    updates = [progress for progress in fit(model, TASK, budget, seed=0) if not isinstance(progress, Fit)]
    assert [progress.skipped for progress in updates] == [1, 2]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_moving_average_of_the_weights_is_evaluated_and_saved():
    """ā_i = d ā_{i−1} + (1 − d) a_i with d = min(ema_decay, i / (i + 9)); training itself is not affected."""
    budget = dataclasses.replace(BUDGET, validations=1)
    model, averaged = tiny(), tiny()
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    both = zip(
        fit(model, TASK, budget, seed=0),
        fit(averaged, TASK, dataclasses.replace(budget, ema_decay=0.3), 0),
        strict=True,
    )
    for i in range(1, budget.steps + 1):
        raw, smoothed = next(both)
        assert raw.loss == smoothed.loss
        decay = min(0.3, i / (i + 9))
        for name, weight in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach()
    next(both)
    for name, weight in averaged.named_parameters():
        assert torch.allclose(weight, expected[name], atol=1e-6), name


def test_a_curriculum_grows_to_the_full_lengths_of_the_task():
    budget = Budget(steps=100, batch_size=1, curriculum=0.5)
    task = Parity(train_lengths=(3, 40))
    longest = [budget.task_at(task, step).train_lengths[1] for step in range(100)]
    assert longest[0] == 4
    assert longest[49:] == [40] * 51
    assert all(0 <= b - a <= 1 for a, b in itertools.pairwise(longest))
    assert Budget(steps=100, batch_size=1).task_at(task, 0) is task
    with pytest.raises(ValueError, match="curriculum: expected 0 for a task whose lengths do not grow"):
        budget.task_at(StandardLibrary(), 0)


@pytest.mark.parametrize("blend", ["synchronous", "delayed-streaming", "delayed-chunk"])
def test_packing_does_not_change_the_loss(blend):
    config = tiny().config
    config.blend, config.conv_size = blend, 3
    model = HQLTForCausalLM(config).double()
    batch = Parity(labels="prefix").sample(generator_for("train", 0), 9, "train")
    assert loss_of(model, batch).item() == pytest.approx(loss_of(model, batch.packed()).item(), abs=1e-6)
    updates = [*fit(tiny(), TASK, dataclasses.replace(BUDGET, pack=True), seed=0)]
    assert updates[0].loss == pytest.approx(next(fit(tiny(), TASK, BUDGET, seed=0)).loss, rel=1e-5)


def test_weights_stay_float32_with_bfloat16_activations():
    model = tiny()
    updates = [*fit(model, TASK, dataclasses.replace(BUDGET, precision="bfloat16"), seed=0)]
    exact = [*fit(tiny(), TASK, BUDGET, seed=0)]
    assert updates[0].loss != exact[0].loss
    assert updates[0].loss == pytest.approx(exact[0].loss, rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_only_linear_layers_have_weight_decay():
    model = tiny()
    decayed, free = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in free["params"]} >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(p.dim() == 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    tied = tiny(tie_word_embeddings=True)
    assert all(p is not tied.lm_head.weight for p in parameter_groups(tied, 0.1)[0]["params"])


@pytest.mark.parametrize("metric", ["bits", "accuracy"])
def test_a_nan_score_is_never_the_best(metric):
    number, nan = Score(metric, 0.5, []), Score(metric, float("nan"), [])
    assert number.better_than(nan)
    assert not nan.better_than(number)
    assert not nan.better_than(nan)
