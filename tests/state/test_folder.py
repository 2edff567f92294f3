"""The prefix store on disk: across restarts, shared by processes, with damaged and foreign files."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file

from hqlt.disk import UNFINISHED
from hqlt.state import PrefixStore
from hqlt.state.folder import PrefixFolder
from hqlt.state.prefixes import prefix_hashes, prefix_keys, token_ids
from tests.laws import close
from tests.state.test_prefixes import KINDS, MORE, build, put, read, trees

TEXT = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def one():
    return build()


@pytest.fixture
def files(one, tmp_path):
    """The files of a store with two prefixes of 2 and 4 tokens, the longer last."""
    store = PrefixStore(one, folder=tmp_path / "store")
    put(store, one, TEXT[:2])
    put(store, one, TEXT[:4])
    return sorted((tmp_path / "store").glob("*/*"))


def key_of(ids, owner):
    return prefix_keys(ids, owner, prefix_hashes(ids), [len(ids)])[len(ids)]


def found(one, folder, text=TEXT, **options) -> int:
    return PrefixStore(one, folder=folder, **options).find(text).length


@pytest.mark.parametrize("kind", KINDS | MORE)
def test_continuing_after_a_restart(kind, tmp_path):
    model = build(kind)
    put(PrefixStore(model, folder=tmp_path), model, TEXT[:4])
    store = PrefixStore(build(kind), folder=tmp_path)
    cache = store.cache_for([*TEXT, 6])
    assert cache.seen_tokens == 4
    close(read(model, [*TEXT, 6], cache)[0], read(model, [*TEXT, 6])[0][4:])
    assert store.statistics[:3] == (1, 0, 1), "the state is in memory from then on"


@given(texts=trees())
def test_a_tree_of_prompts_read_by_many_stores(one, texts):
    """Each prompt is read with a new store, starting from what earlier stores left in the folder."""
    with tempfile.TemporaryDirectory() as folder:
        for text in texts:
            store = PrefixStore(one, folder=folder)
            length = store.find(text).length
            logits, cache = read(one, text, store.cache_for(text))
            assert cache.seen_tokens == len(text) > length
            close(logits, read(one, text)[0][length:])
            store.put(text, cache.states)
            assert found(one, folder, [*text, 1]) == len(text)


def test_only_the_same_model_dtype_and_salt_are_found(one, files, tmp_path):
    folder = tmp_path / "store"
    assert found(one, folder) == 4
    assert found(build(seed=1), folder) == 0
    assert found(build().float(), folder) == 0
    assert found(one, folder, dtype="int8") == 0
    assert PrefixStore(one, folder=folder).find(TEXT, "other").length == 0
    assert PrefixStore(one, max_bytes=0, folder=folder).find(TEXT).length == 4


def test_entries_of_another_store_are_found(one, tmp_path):
    mine, yours = (PrefixStore(one, folder=tmp_path / "new" / "store") for _ in range(2))
    assert yours.find(TEXT).length == 0
    put(mine, one, TEXT[:2])
    assert yours.find(TEXT).length == 2
    put(mine, one, TEXT[:4])
    assert yours.find(TEXT).length == 4
    shutil.rmtree(tmp_path / "new" / "store")
    assert mine.find(TEXT).length == 4, "from memory"
    assert found(one, tmp_path / "new" / "store") == 0
    assert os.stat(tmp_path / "new" / "store").st_mode & 0o077 == 0, "the folder contains texts"


def truncated(longer, shorter):
    longer.write_bytes(longer.read_bytes()[:-100])


def empty(longer, shorter):
    longer.write_bytes(b"")


def changed(longer, shorter):
    data = bytearray(longer.read_bytes())
    data[-9] ^= 1
    longer.write_bytes(data)


def renamed(longer, shorter):
    shutil.copy(shorter, longer)


def pickled(longer, shorter):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was run",)

    longer.write_bytes(pickle.dumps(Trap()))


def foreign(longer, shorter):
    save_file({"weight": torch.ones(3)}, longer)


def of_another_owner(longer, shorter):
    save_file(load_file(longer), longer, {"format": "hqlt-prefix-1", "owner": "0" * 64})


def a_folder(longer, shorter):
    longer.unlink()
    longer.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "expected a safetensors file"),
        (empty, "expected a safetensors file"),
        (changed, "expected tensors that match the checksum"),
        (renamed, "expected the tokens whose digest is in the file name"),
        (pickled, "expected a safetensors file"),
        (foreign, "expected format 'hqlt-prefix-1', got None"),
        (of_another_owner, "expected a state of the model and salt that the folder belongs to"),
        (a_folder, ""),
    ],
)
def test_damaged_files_are_skipped_reported_once_and_rewritten(one, files, tmp_path, caplog, damage, message):
    shorter, longer = files
    damage(longer, shorter)
    store = PrefixStore(one, folder=tmp_path / "store")
    assert store.find(TEXT).length == store.find(TEXT).length == 2
    (warning,) = caplog.messages
    assert f"{longer} is skipped: " in warning
    assert message in warning
    put(store, one, TEXT[:4])
    assert found(one, tmp_path / "store") == (2 if damage is a_folder else 4)


def test_tensors_of_other_shapes_are_skipped(one, files, tmp_path, caplog):
    """Even if all digests match."""
    _, longer = files
    folder = PrefixFolder(tmp_path / "store")
    owner, ids = longer.parent.name, token_ids(TEXT[:4])
    for damage in (lambda x: {name: part[..., :1] for name, part in x.items()}, lambda x: dict([x.popitem()])):
        tensors = load_file(longer)
        del tensors["tokens"]
        longer.unlink()
        folder.write(owner, ids, key_of(ids, owner), damage(tensors))
        caplog.clear()
        assert found(one, tmp_path / "store") == 2
        assert "is skipped: state" in caplog.text
        put(PrefixStore(one, folder=tmp_path / "store"), one, TEXT[:4])


def test_files_with_other_names_are_left_alone(one, files, tmp_path):
    others = [tmp_path / "store" / "notes.txt", files[0].parent / "3-notes.safetensors", files[0].parent / "notes"]
    for path in others:
        path.write_text("mine")
    assert found(one, tmp_path / "store") == 4
    store = PrefixStore(one, folder=tmp_path / "store", max_disk_bytes=64 + sum(path.stat().st_size for path in files))
    put(store, one, [7, 7, 7])
    assert all(path.exists() for path in others)
    assert [path.exists() for path in files] == [False, True]


def test_the_least_recently_used_file_is_removed_first(one, tmp_path):
    store = PrefixStore(one, folder=tmp_path)
    for n in (1, 2, 3):
        put(store, one, TEXT[:n])
        time.sleep(0.01)
    sizes = {int(path.name.partition("-")[0]): path.stat().st_size for path in tmp_path.glob("*/*")}
    again = PrefixStore(one, max_bytes=0, folder=tmp_path, max_disk_bytes=sum(sizes.values()) + 8)
    assert again.find(TEXT[:2]).length == 1
    put(again, one, [9])
    assert sorted(int(path.name.partition("-")[0]) for path in tmp_path.glob("*/*")) == [1, 1, 3]
    assert again.find(TEXT[:2]).length == 1
    assert again.find(TEXT[:3]).length == 1
    put(PrefixStore(one, folder=tmp_path, max_disk_bytes=10), one, [8])
    assert len(list(tmp_path.glob("*/*"))) == 3, "a file larger than the budget evicts nothing"
    put(PrefixStore(one, folder=tmp_path, max_disk_bytes=sizes[1] + 8), one, [8], "another salt")
    assert [path.is_dir() for path in sorted(tmp_path.glob("*"))] == [True, False], "no empty folder remains"


@pytest.mark.parametrize("total", ["0", "", "many", str(10**9), None])
def test_a_wrong_total_of_bytes_is_corrected(one, files, tmp_path, total):
    folder = tmp_path / "store"
    (folder / "bytes").write_text(total) if total is not None else (folder / "bytes").unlink()
    budget = sum(path.stat().st_size for path in files) + 64
    store = PrefixStore(one, folder=folder, max_disk_bytes=budget)
    for token in (7, 8, 9):
        put(store, one, [token])
    there = [path.stat().st_size for path in folder.glob("*/*")]
    assert sum(there) == int((folder / "bytes").read_text()) <= budget
    assert len(there) == 2


def test_a_failed_write_is_reported_and_the_state_stays_in_memory(one, tmp_path, caplog):
    store = PrefixStore(one, folder=tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").touch()
    put(store, one, TEXT[:4])
    assert store.find(TEXT).length == 4
    assert "was not written" in caplog.text
    with pytest.raises(OSError, match="expected a folder, found a file"):
        PrefixStore(one, folder=tmp_path / "store")
    with pytest.raises(ValueError, match="max_disk_bytes: expected a folder as well, got 5 without one"):
        PrefixStore(one, max_disk_bytes=5)
    with pytest.raises(ValueError, match="dtype: expected one of 'bfloat16', 'int8', got 'int9'; did you mean 'int8'"):
        PrefixStore(one, dtype="int9")


WRITER = """
import sys, torch
from hqlt.state.folder import PrefixFolder
from hqlt.state.prefixes import token_ids, prefix_keys, prefix_hashes
torch.set_num_threads(1)
folder, owner = PrefixFolder(sys.argv[1], int(sys.argv[2])), "ab" * 32
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    n = 1 + i % 7
    ids = token_ids(range(n))
    key = prefix_keys(ids, owner, prefix_hashes(ids), [n])[n]
    folder.write(owner, ids, key, {"0.x": torch.full((1, 50_000 + n), float(n))})
    got = folder.read(owner, ids, key)
    assert got is None or (got["0.x"] == n).all()
"""


def writer(folder, budget, times):
    arguments = [sys.executable, "-W", "error", "-c", WRITER, str(folder), str(budget), str(times)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lengths_in(folder) -> set[int]:
    """The lengths of the entries in a folder, after reading each of them."""
    there, owner = PrefixFolder(folder), "ab" * 32
    lengths = {int(path.name.partition("-")[0]) for path in folder.glob("*/*.safetensors")}
    for n in lengths:
        ids = token_ids(range(n))
        assert (there.read(owner, ids, key_of(ids, owner))["0.x"] == n).all()
    return lengths


def test_two_processes_write_at_once(tmp_path):
    budget = 4 * 201_000
    processes = [writer(tmp_path, budget, 60) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for process, (_, errors) in zip(
            processes, pool.map(lambda process: process.communicate(), processes), strict=True
        ):
            assert (process.returncode, errors) == (0, "")
    assert len(lengths_in(tmp_path)) in (3, 4)
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= budget
    assert not list(tmp_path.glob(f"**/*{UNFINISHED}"))
    assert int((tmp_path / "bytes").read_text()) == sum(path.stat().st_size for path in tmp_path.glob("*/*"))


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_leaves_nothing_broken(tmp_path):
    process = writer(tmp_path, 2 * 201_000, 10**6)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    place = tmp_path / ("ab" * 32)
    (place / f"7-{'0' * 16}-{'0' * 64}.safetensors{UNFINISHED}").write_bytes(b"half")
    before = lengths_in(tmp_path)
    assert before
    ids = token_ids(range(9))
    PrefixFolder(tmp_path).write("ab" * 32, ids, key_of(ids, "ab" * 32), {"0.x": torch.full((1, 3), 9.0)})
    assert lengths_in(tmp_path) == {*before, 9}
    assert not list(place.glob(f"*{UNFINISHED}"))
