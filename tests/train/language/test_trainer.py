"""What goes wrong, and what is told then."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import pytest
import torch

from hqlt.model import HQLTConfig
from hqlt.train.language import Trainer, TrainSettings
from hqlt.train.language.cost import flops_per_token
from hqlt.train.language.ranks import Ranks
from hqlt.train.metrics import Metrics

CONFIG = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32, "window": 4}
ALONE = Ranks(0, 1, torch.device("cpu"))


def trainer(text, folder, changes=None, **settings) -> Trainer:
    settings = {"length": 24, "batch_size": 4, "steps": 6, "save_every": 2, "validation_rows": 4, **settings}
    config = HQLTConfig(vocab_size=256, **CONFIG | (changes or {}))
    return Trainer(TrainSettings(**settings), config, text, folder, ALONE)


@pytest.fixture
def run(text, tmp_path):
    """A folder with two checkpoints, after 4 and 6 updates."""
    for _ in trainer(text, tmp_path).updates():
        pass
    return tmp_path


def test_a_gradient_that_is_not_finite_is_left_out(text, tmp_path):
    training = trainer(text, tmp_path)
    before = {name: weight.clone() for name, weight in training.model.state_dict().items()}
    loss_of, training._summed_loss = training._summed_loss, lambda batch, i: loss_of(batch, i) * float("nan")
    told = training.update()
    assert told.skipped == 1
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


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    [({"window": 5}, {}, "model"), ({}, {"length": 12}, "length"), ({}, {"seed": 1}, "seed")],
)
def test_a_checkpoint_of_another_run_is_refused(text, run, changes, settings, named):
    with pytest.raises(ValueError, match=f"another {named}.*Give another folder"):
        trainer(text, run, changes, **settings).resume()
    assert trainer(text, run).resume() == 6


def test_other_settings_may_change(text, run):
    training = trainer(text, run, steps=8, learning_rate=1e-3)
    assert training.resume() == 6
    assert [told.step for told in training.updates()] == [7, 8]


@pytest.mark.parametrize("damage", ["truncated", "missing", "no trainer.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(text, run, damage):
    newest = run / "checkpoints" / "step-00000006"
    (tensors,) = newest.glob("*.safetensors")
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    else:
        (tensors if damage == "missing" else newest / "trainer.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000006.*remove step-00000006 to go on from the checkpoint before"):
        trainer(text, run).resume()
    shutil.rmtree(newest)
    assert trainer(text, run).resume() == 4


def test_a_write_that_was_killed_hides_nothing(text, run):
    unfinished = run / "checkpoints" / "step-00000008.unfinished"
    unfinished.mkdir()
    (unfinished / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert trainer(text, run).resume() == 6


def test_a_full_disk_is_told_and_the_last_checkpoint_stands(text, run):
    training = trainer(text, run, steps=8)
    training.resume()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000008: could not be written .*step-00000006 is whole"):
            for _ in training.updates():
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


def test_a_vocabulary_that_is_too_small_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"set model.vocab_size=256"):
        Trainer(TrainSettings(length=24), HQLTConfig(vocab_size=100, **CONFIG), text, tmp_path, ALONE)


def test_accumulated_gradients_are_those_of_the_whole_batch(text, tmp_path):
    whole, parts = trainer(text, tmp_path).update(), trainer(text, tmp_path, micro_batch_size=1).update()
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)


def test_carried_memory_is_one_long_sequence(text, tmp_path):
    """Two batches with the memory carried lose as much as one of twice the length; without it, more or less."""
    steps = {"batch_size": 1, "learning_rate": 1e-30}
    carried = trainer(text, tmp_path, carry_state=True, length=24, **steps)
    long = trainer(text, tmp_path, carry_state=True, length=48, **steps)
    halves = [carried.update().loss, carried.update().loss]
    assert sum(halves) / 2 == pytest.approx(long.update().loss, rel=1e-5)
    assert halves[1] != pytest.approx(trainer(text, tmp_path, length=24, **steps).update().loss, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3}, "multiples of the 2 processes"),
        ({"micro_batch_size": 3}, "divisor of the 8 rows"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**settings).micro_batches(2)


def test_learning_rate_rises_and_falls():
    settings = TrainSettings(steps=100, warmup=10, learning_rate=1.0, final_rate=0.1)
    rates = [settings.learning_rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)


def test_metrics_after_the_checkpoint_are_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    metrics = Metrics(path, step=2)
    metrics.write({"step": 3, "loss": 2.0})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0},
    ]  # fmt: skip


def test_cost_of_a_token_by_hand():
    """One layer: q, k, v, o, gate (16²), β (2·16), MLP (3·16·32), head (16·256); KV reads, FW writes and reads."""
    config = HQLTConfig(vocab_size=256, **CONFIG | {"num_hidden_layers": 1, "window": 2})
    linear = 5 * 16 * 16 + 2 * 16 + 3 * 16 * 32 + 16 * 256
    pairs = (1 + 2 + 2) / 3
    assert flops_per_token(config, length=3) == pytest.approx(6 * linear + 12 * 16 * pairs + 18 * 16 * 8)
