"""The trainer, and its errors."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

from hqlt.data import prepare
from hqlt.disk import exclusive_folder
from hqlt.model import HQLTConfig
from hqlt.run_folder import run_folder
from hqlt.train.language import LanguageTrainer, TrainSettings
from hqlt.train.language.cost import Part, flops_per_token, parts_of_update, peak_flops, share_of_dense
from hqlt.train.language.ranks import Ranks, join
from hqlt.train.language.run import run as language_run
from hqlt.train.metrics import Metrics

CONFIG = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32, "window": 4}
ALONE = Ranks(0, 1, torch.device("cpu"))


def trainer(text, folder, changes=None, **settings) -> LanguageTrainer:
    settings = {"length": 24, "batch_size": 4, "steps": 6, "save_every": 2, "validation_rows": 4, **settings}
    config = HQLTConfig(vocab_size=256, **CONFIG | (changes or {}))
    return LanguageTrainer(TrainSettings(**settings), config, text, folder, ALONE)


@pytest.fixture
def run(text, tmp_path):
    """A folder with two checkpoints, after 4 and 6 updates."""
    for _ in trainer(text, tmp_path).train():
        pass
    return tmp_path


def test_an_update_with_a_nonfinite_gradient_is_skipped(text, tmp_path):
    training = trainer(text, tmp_path)
    before = {name: weight.clone() for name, weight in training.model.state_dict().items()}
    loss_of, training._summed_loss = training._summed_loss, lambda batch, i: loss_of(batch, i) * float("nan")
    update = training.update()
    assert update.skipped == 1
    assert all(torch.equal(before[name], weight) for name, weight in training.model.state_dict().items())
    training._summed_loss = loss_of
    assert training.update().skipped == 1
    assert not all(torch.equal(before[name], weight) for name, weight in training.model.state_dict().items())
    training.save()
    training.checkpoints.wait()
    again = trainer(text, tmp_path)
    assert again.resume() == 2
    assert again.skipped == 1
    assert again.update() == training.update()


def test_a_nonfinite_state_is_not_carried(text, tmp_path):
    training = trainer(text, tmp_path, carry_state=True)
    training.update()
    hook = training.model.model.layers[0].register_forward_hook(lambda *call: (call[2][0] * math.nan, *call[2][1:]))
    assert training.update().skipped == 1
    hook.remove()
    assert all(part.isfinite().all() for part in tree_leaves(training.caches[0].states) if part.is_floating_point())
    assert training.update().skipped == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"layer_kinds": ["hybrid", "kv"]}, "kv_window"), ({"window": None}, "window")],
)
def test_carrying_an_unbounded_state_is_refused(text, tmp_path, changes, field):
    with pytest.raises(ValueError, match=rf"carry_state: .* set model\.{field}"):
        trainer(text, tmp_path, changes, carry_state=True)


def test_evaluation_is_skipped_if_the_data_has_no_held_out_splits(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 200)
    prepare(tmp_path / "a.txt", tmp_path / "tokens", validation_share=0, test_share=0)
    *_, last = trainer(tmp_path / "tokens", tmp_path, steps=2).updates()
    assert last.validation is None


def test_held_out_text_too_short_for_a_window_is_refused_before_training(tmp_path):
    for name, text in {"a": "0123456789" * 200, "b": "0123456789", "c": "9876543210" * 9}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    prepare(tmp_path / "a.txt", tmp_path / "tokens", validation=tmp_path / "b.txt", test=tmp_path / "c.txt")
    with pytest.raises(ValueError, match="length: expected from 1 to 9, because the validation split"):
        trainer(tmp_path / "tokens", tmp_path)


def test_the_score_does_not_depend_on_the_number_of_processes(text, tmp_path):
    sums = []

    class Apart(Ranks):
        def sum(self, numbers):
            sums.append(torch.tensor(numbers))
            return list(numbers)

    settings = TrainSettings(length=24, batch_size=4, validation_rows=3)
    for ranks in (Apart(0, 1, ALONE.device), Apart(0, 2, ALONE.device), Apart(1, 2, ALONE.device)):
        LanguageTrainer(settings, HQLTConfig(vocab_size=256, **CONFIG), text, tmp_path, ranks).bits_per_byte(
            "validation"
        )
    torch.testing.assert_close(sums[0], sums[1] + sums[2])


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    [
        ({"window": 5}, {}, r"model\.window: expected 4, got 5\."),
        ({}, {"length": 12}, "length: expected 24, got 12"),
        ({}, {"seed": 1}, "seed"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(text, run, changes, settings, named):
    with pytest.raises(ValueError, match=f"another {named}.*Give another folder"):
        trainer(text, run, changes, **settings).resume()
    assert trainer(text, run).resume() == 6


def test_other_settings_may_change(text, run):
    training = trainer(text, run, steps=8, learning_rate=1e-3)
    assert training.resume() == 6
    assert [update.step for update in training.updates()] == [7, 8]


@pytest.mark.parametrize("damage", ["truncated", "missing", "no trainer.json", "[]", '{"step": 6}', "\udcff"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_can_be_used(text, run, damage):
    newest = run / "checkpoints" / "step-00000006"
    (tensors,) = newest.glob("*.safetensors")
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage in ("missing", "no trainer.json"):
        (tensors if damage == "missing" else newest / "trainer.json").unlink()
    else:
        (newest / "trainer.json").write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"step-00000006.*remove step-00000006 to resume from the checkpoint before"):
        trainer(text, run).resume()
    shutil.rmtree(newest)
    assert trainer(text, run).resume() == 4


def test_a_killed_write_does_not_affect_earlier_checkpoints(text, run):
    unfinished = run / "checkpoints" / "step-00000008.unfinished"
    unfinished.mkdir()
    (unfinished / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    training = trainer(text, run, steps=8, keep_checkpoints=1)
    assert training.resume() == 6
    training.update()
    training.save()
    training.checkpoints.wait()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000007"]


def test_a_second_process_in_the_same_folder_is_refused(text, tmp_path):
    settings = TrainSettings(data=str(text), length=24, steps=1, model=CONFIG)
    with exclusive_folder(tmp_path), pytest.raises(ValueError, match="another process is using this folder"):
        language_run(settings, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_full_disk_is_reported_and_the_last_checkpoint_is_intact(text, run):
    training = trainer(text, run, steps=8)
    training.resume()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000008: could not be written .*step-00000006 is intact"):
            for _ in training.train():
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert trainer(text, run).resume() == 6


def test_a_damaged_shard_is_refused(text, tmp_path):
    shutil.copytree(text, copy := tmp_path / "tokens")
    shard = next(path for path in copy.iterdir() if path.suffix == ".tokens" and "train" in path.name)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name}: expected \d+ bytes, found \d+"):
        trainer(copy, tmp_path)


def test_too_small_a_vocabulary_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"give --model.vocab_size=256"):
        LanguageTrainer(TrainSettings(length=24), HQLTConfig(vocab_size=100, **CONFIG), text, tmp_path, ALONE)


def test_accumulated_gradients_equal_those_of_the_whole_batch(text, tmp_path):
    whole, parts = trainer(text, tmp_path).update(), trainer(text, tmp_path, micro_batch_size=1).update()
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)


def test_a_carried_state_equals_one_long_sequence(text, tmp_path):
    """Two batches with a carried state have the loss of one batch of twice the length; without it, another one."""
    steps = {"batch_size": 1, "learning_rate": 1e-30}
    carried = trainer(text, tmp_path, carry_state=True, length=24, **steps)
    long = trainer(text, tmp_path, carry_state=True, length=48, **steps)
    halves = [carried.update().loss, carried.update().loss]
    assert sum(halves) / 2 == pytest.approx(long.update().loss, rel=1e-5)
    assert halves[1] != pytest.approx(trainer(text, tmp_path, length=24, **steps).update().loss, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3}, "multiple of the 2 processes"),
        ({"micro_batch_size": 3}, "divisor of 8, the number of rows"),
        ({"steps": 0}, "steps: expected a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number above 0"),
        ({"learning_rate": math.inf}, "learning_rate: expected a number above 0"),
        ({"eps": math.nan}, "eps: expected a number above 0"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
        ({"weight_decay": math.nan}, "weight_decay: expected a number of at least 0"),
        ({"min_lr_ratio": -1.0}, "min_lr_ratio: expected a number from 0 to 1"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio: expected a number from 0 to 1"),
        ({"betas": (0.9, 1.0)}, "betas: expected two numbers from 0 to below 1"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"warmup_steps": 7, "steps": 6}, "warmup_steps: expected a whole number from 0 to 6, got 7"),
        ({"micro_batch_size": 0}, "micro_batch_size: expected a whole number of at least 1"),
        ({"shard_over": -1}, "shard_over: expected a whole number of at least 1"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**settings).micro_batches(2)


def test_default_warmup_is_at_most_a_tenth_of_the_steps():
    assert [TrainSettings(steps=steps).num_warmup_steps for steps in (3, 100, 600, 10_000)] == [0, 10, 60, 60]


def documents(folder, *texts):
    (folder / "in").mkdir()
    for i, text in enumerate(texts):
        (folder / "in" / f"{i:03}.txt").write_text(text)
    prepare(folder / "in", folder / "tokens", validation_share=0.1, test_share=0.1)
    return folder / "tokens"


def test_documents_of_one_token_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data: expected documents of at least two tokens"):
        trainer(documents(tmp_path, *"abcdefghij"), tmp_path, length=1, batch_size=1)


def test_windows_without_a_token_to_predict_are_refused_and_batches_of_them_skipped(tmp_path):
    data = documents(tmp_path, *(f"{chr(65 + i)}{chr(66 + i)}" for i in range(40)))  # four are held out for validation
    with pytest.raises(ValueError, match="length: expected windows with at least one token to predict in "):
        trainer(data, tmp_path, length=1, validation_rows=1)
    training = trainer(data, tmp_path, length=1, batch_size=1, steps=20)
    updates = list(training.updates())
    assert 0 < updates[-1].skipped < 20
    assert math.isfinite(updates[-1].validation)
    assert all(weight.isfinite().all() for weight in training.model.parameters())


@pytest.mark.parametrize("kind", ["agent", "study"])
def test_the_folder_of_another_kind_of_run_is_refused_and_not_changed(text, tmp_path, kind):
    with run_folder(tmp_path, kind):
        (tmp_path / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="expected a run of hqlt train, found one of"):
        language_run(TrainSettings(data=str(text), model=CONFIG, length=24), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_of_the_report_is_reported_before_training(text, tmp_path, package, monkeypatch):
    for name in ("hqlt.report.training", "hqlt.report.page", "hqlt.report.plots"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=package):
        language_run(TrainSettings(data=str(text), model=CONFIG, length=24), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_learning_rate_schedule():
    settings = TrainSettings(steps=100, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [settings.learning_rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)


def test_metrics_after_the_checkpoint_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    metrics = Metrics(path, step=2)
    metrics.write({"step": 3, "loss": 2.0})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0},
    ]  # fmt: skip


def test_nonfinite_values_are_null_and_a_damaged_line_is_reported(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, step=0)
    metrics.write({"step": 1, "loss": math.nan, "gradient_norm": math.inf})
    metrics.close()
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "gradient_norm": None}
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected JSON with a step, got .* remove the line"):
        Metrics(path, step=3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12), ("NVIDIA H100 80GB HBM3", 989e12), ("Other", None)],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_an_unavailable_device_is_refused(device):
    with pytest.raises(ValueError, match="device: expected one that torch can use here"), join(TrainSettings(), device):
        pass


def test_cost_of_a_token():
    """One layer: q, k, v, o, gate (16²), β (2·16), MLP (3·16·32), head (16·256); KV reads, FW writes and reads."""
    config = HQLTConfig(vocab_size=256, **CONFIG | {"num_hidden_layers": 1, "window": 2})
    linear = 5 * 16 * 16 + 2 * 16 + 3 * 16 * 32 + 16 * 256
    pairs = (1 + 2 + 2) / 3
    assert flops_per_token(config, length=3) == pytest.approx(6 * linear + 12 * 16 * pairs + 18 * 16 * 8)


def test_cost_of_an_update():
    """Two rows of three tokens; values of two bytes, except logits, gradients of the head, and weights."""
    config = HQLTConfig(vocab_size=256, **CONFIG | {"num_hidden_layers": 1, "window": 2})
    linear = 5 * 16 * 16 + 2 * 16 + 3 * 16 * 32 + 16 * 256
    weights = linear + 16 * 256 + 3 * 16 + 8  # embeddings, three norms and the norm per head
    parts = {part.name: part for part in parts_of_update(config, 2, 3, compiled=True, in_chunks=True, memory_units=57)}
    assert parts["matrix products"].operations == 6 * 6 * linear
    assert parts["memories"].bytes == 2 * 6 * 57 * 16
    assert parts["elementwise"].bytes == 2 * 6 * (27 * 16 + 9 * 32)
    assert parts["loss"].bytes == 6 * 256 * 18 + 12 * 256 * 16
    assert (parts["AdamW"].bytes, parts["clipping, casts"].bytes) == (28 * weights, 24 * weights)
    eager = parts_of_update(config, 2, 3, compiled=False, in_chunks=False, memory_units=57)
    assert sum(part.bytes for part in eager) - sum(part.bytes for part in parts.values()) == (
        2 * 6 * (15 * 16 + 5 * 32) + 6 * 256 * 16 - 12 * 256 * 16
    )


def test_the_share_of_peak_performance():
    bound_by_operations, bound_by_bytes = Part("a", 600, 0, slower=2), Part("b", 0, 40)
    assert bound_by_operations.seconds(dense=100, bandwidth=10) == 12
    assert share_of_dense([bound_by_operations, bound_by_bytes], flops=800, dense=100, bandwidth=10) == 0.5
