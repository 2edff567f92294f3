import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqlt.data import Stream, TokenFiles, Windows, prepare
from hqlt.data.permutation import permute
from hqlt.task import IGNORE
from tests.data.conftest import texts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i, text in enumerate(texts()):
        (folder / f"{i:03d}.txt").write_text(text)
    prepare(folder, folder / "tokens", shard_tokens=700, validation_share=0.2, test_share=0)
    return TokenFiles(folder / "tokens")


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(key=st.integers(0, 2**64 - 1), places=st.sets(st.integers(0, 10**12 - 1), min_size=2, max_size=50))
def test_a_permutation_of_a_large_size_is_injective(key, places):
    out = permute(np.array(sorted(places)), 10**12, key)
    assert len(set(out.tolist())) == len(places)
    assert out.min() >= 0
    assert out.max() < 10**12


def test_a_permutation_mixes():
    """Over many keys, each window is equally frequent at each position (χ² within five standard deviations)."""
    for size in (5, 12):
        counts = np.zeros((size, size))
        for key in range(2000):
            counts[np.arange(size), permute(np.arange(size), size, key * 0x9E3779B97F4A7C15 % 2**64)] += 1
        expected = 2000 / size
        free = (size - 1) ** 2
        assert abs(((counts - expected) ** 2 / expected).sum() - free) < 5 * (2 * free) ** 0.5


@given(data=st.data(), length=st.integers(1, 400), ranks=st.integers(1, 4), seed=st.integers(0, 3))
def test_every_window_occurs_once_per_epoch_with_any_number_of_ranks(data, length, ranks, seed, files):
    windows = Windows(files, length, seed)
    rows = ranks * data.draw(st.integers(1, 5))
    epoch = data.draw(st.integers(0, 3))
    whole = files.read(0, len(files))[0]
    places = np.arange(epoch * len(windows), (epoch + 1) * len(windows))
    assert sorted(windows.windows_at(places).tolist()) == list(range(len(windows)))
    index = data.draw(st.integers(0, 3 * len(windows)))
    batch = windows.batch(index, rows)
    parts = [windows.batch(index, rows, rank, ranks) for rank in range(ranks)]
    for one, split in zip(batch, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(split))
    at = windows.windows_at(np.arange(index * rows, index * rows + rows))
    for row, window in enumerate(at.tolist()):
        assert torch.equal(batch.inputs[row], whole[window * length : window * length + length])


@given(length=st.integers(1, 400), index=st.integers(0, 50))
def test_resets_mark_document_starts_and_no_target_crosses_them(length, index, files):
    whole, begins = files.read(0, len(files))
    windows = Windows(files, length)
    batch = windows.batch(index, 3)
    for row, window in enumerate(windows.windows_at(np.arange(index * 3, index * 3 + 3)).tolist()):
        here = slice(window * length, window * length + length)
        next_ = slice(here.start + 1, here.stop + 1)
        assert batch.resets[row, 0]
        assert torch.equal(batch.resets[row, 1:], begins[here][1:])
        assert torch.equal(batch.targets[row], torch.where(begins[next_], IGNORE, whole[next_]))
    assert batch.coordinate.tolist() == [list(range(length))] * 3


def test_epochs_and_seeds_differ_and_a_batch_is_always_the_same(files):
    windows = Windows(files, 16, seed=0)
    first, second = windows.windows_at(np.arange(2 * len(windows))).reshape(2, -1).tolist()
    assert first != second
    assert first != Windows(files, 16, seed=1).windows_at(np.arange(len(windows))).tolist()
    assert all(map(torch.equal, windows.batch(7, 4), Windows(files, 16, seed=0).batch(7, 4)))


@given(length=st.integers(1, 60), rows=st.integers(1, 6))
def test_a_stream_continues_where_the_last_batch_ended(length, rows, files):
    whole, begins = files.read(0, len(files))
    stream = Stream(files, length, rows)
    batches = [stream.batch(i) for i in range(2 * len(stream))]
    stretch = len(stream) * length
    for epoch in (batches[: len(stream)], batches[len(stream) :]):
        for row in range(rows):
            here = slice(row * stretch, (row + 1) * stretch)
            assert torch.equal(torch.cat([batch.inputs[row] for batch in epoch]), whole[here])
            resets = torch.cat([batch.resets[row] for batch in epoch])
            assert resets[0]
            assert torch.equal(resets[1:], begins[here][1:])
    for ranks in (r for r in range(1, rows + 1) if rows % r == 0):
        parts = [stream.batch(3, rank, ranks) for rank in range(ranks)]
        assert torch.equal(stream.batch(3).inputs, torch.cat([part.inputs for part in parts]))


def test_the_eos_token_is_a_target_and_the_first_token_of_a_document_is_not(tmp_path, bpe):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"{name} memory")
    prepare(folder, tmp_path / "tokens", tokenizer=bpe, validation_share=0, test_share=0)
    files = TokenFiles(tmp_path / "tokens")
    batch = Windows(files, len(files) - 1).batch(0, 1)
    first, second = (files.tokenizer.encode(f"{name} memory") for name in "ab")
    eos = files.tokenizer.eos_id
    assert batch.inputs[0].tolist() == [*first, eos, *second]
    assert batch.targets[0].tolist() == [*first[1:], eos, IGNORE, *second[1:], eos]
    assert batch.resets[0].nonzero()[:, 0].tolist() == [0, len(first) + 1]


def test_errors(files):
    with pytest.raises(ValueError, match=rf"length: expected from 1 to {len(files) - 1}, because the train split"):
        Windows(files, len(files))
    with pytest.raises(ValueError, match=r"rows: expected a multiple of the 2 ranks, got 3"):
        Windows(files, 8).batch(0, 3, 0, 2)
    with pytest.raises(ValueError, match=r"rank: expected from 0 to 1, got 2"):
        Windows(files, 8).batch(0, 4, 2, 2)
    with pytest.raises(ValueError, match=r"length, rows: expected at most"):
        Stream(files, len(files), 1)


def test_a_damaged_file_of_the_right_size_is_reported(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("a text of some tokens")
    prepare(tmp_path / "a.txt", tmp_path / "d", tokenizer=bpe, validation_share=0, test_share=0)
    file = tmp_path / "d" / "train-00000.tokens"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    files = TokenFiles(tmp_path / "d")
    with pytest.raises(
        ValueError, match=r"train-00000\.tokens: expected tokens below .*, found 65535.*hqlt data check"
    ):
        files.read(0, len(files))


def test_reading_across_shards_equals_reading_everything(files):
    whole, begins = files.read(0, len(files))
    assert len(files.ends) > 2
    assert begins.sum() == files.documents
    edges = [0, *(end + off for end in files.ends.tolist() for off in (-1, 0, 1) if end + off <= len(files))]
    for start, stop in itertools.combinations(sorted(set(edges)), 2):
        tokens, borders = files.read(start, stop)
        assert torch.equal(tokens, whole[start:stop])
        assert torch.equal(borders, begins[start:stop])
    for start, stop in ((-1, 3), (3, 3), (0, len(files) + 1)):
        with pytest.raises(IndexError, match="expected 0 ≤ start < stop"):
            files.read(start, stop)
