import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hqlt.data import TokenFiles, check, parts_of, prepare, training_texts
from hqlt.data.hub import Hub
from hqlt.data.manifest import dtype_for, read_manifest
from tests.data.conftest import texts, write_lines

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents_of(files):
    """The texts of the documents."""
    tokens, begins = files.read(0, len(files))
    starts = begins.nonzero()[:, 0].tolist()
    return [
        files.tokenizer.decode(tokens[start:stop].tolist())
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)
    ]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_documents_survive_a_round_trip(name, bpe, tmp_path):
    documents = texts(80)
    tokenizer = "bytes" if name == "bytes" else bpe
    lines = write_lines(tmp_path / "a.jsonl", [*documents[:40], "", *documents[40:]])
    manifest = prepare(
        lines, tmp_path / "d", tokenizer=tokenizer, validation_share=0.1, test_share=0.05, shard_tokens=500
    )
    read = {split: TokenFiles(tmp_path / "d", split) for split in ("train", "validation", "test")}
    kept = {split: documents_of(files) for split, files in read.items()}
    assert [len(kept[split]) for split in kept] == [68, 8, 4]
    for split, files in read.items():
        assert kept[split] == [text for text in documents if text in kept[split]]
        assert files.bytes == sum(len(text.encode()) for text in kept[split]) == manifest.bytes(split)
        assert files.documents == len(kept[split])
        assert files.vocab_size == (256 if name == "bytes" else 300)
    assert sorted(itertools.chain(*kept.values())) == sorted(documents)
    assert len(manifest.splits["train"]) > 3
    assert manifest.dtype == dtype_for(read["train"].vocab_size) == ("uint8" if name == "bytes" else "uint16")
    assert all(fault is None for _, fault in check(tmp_path / "d"))
    assert len({files.digest for files in read.values()}) == 3


def test_the_library_has_the_splits_of_the_task(tmp_path):
    from hqlt.task.text import files_of

    prepare("python-library", tmp_path)
    for split in ("train", "validation", "test"):
        tokens, begins = files_of(split)
        files = TokenFiles(tmp_path, split)
        read, starts = files.read(0, len(files))
        assert read.equal(tokens.long())
        assert starts.equal(begins)
        assert files.bytes == len(tokens)


def test_a_finished_folder_is_not_changed_and_other_settings_are_refused(tmp_path, bpe):
    lines = write_lines(tmp_path / "a.jsonl", texts(20))
    folder = tmp_path / "d"
    first = prepare(lines, folder, limit_tokens=300)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    progress = []
    assert prepare(lines, folder, limit_tokens=300, on_progress=progress.append) == first
    assert not progress
    for other, message in (
        ({"limit_tokens": 400}, "limit_tokens: expected 300, got 400"),
        ({"tokenizer": bpe}, "tokenizer: expected bytes, got"),
        ({"test_share": 0.3}, r"source, for: expected \[0.005, 0.005\], got \[0.005, 0.3\]"),
        ({"text_field": "n"}, "source, text_field: expected text, got n"),
    ):
        with pytest.raises(ValueError, match=f"has data prepared with other settings .{message}"):
            prepare(lines, folder, **{"limit_tokens": 300, **other})
    write_lines(lines, texts(21))
    with pytest.raises(ValueError, match="source, names and sizes: expected"):
        prepare(lines, folder, limit_tokens=300)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="expected a new or empty folder, found other files"):
        prepare(lines, tmp_path)


def test_a_token_limit_is_exceeded_by_at_most_one_document(tmp_path):
    documents = texts(60)
    lines = write_lines(tmp_path / "a.jsonl", documents)
    held = write_lines(tmp_path / "v.jsonl", texts(69)[60:])
    for limit in (1, 700, 10**9):
        manifest = prepare(lines, tmp_path / str(limit), validation=held, test_share=0, limit_tokens=limit)
        trained = documents_of(TokenFiles(tmp_path / str(limit)))
        sizes = [len(text.encode()) for text in trained]
        assert trained == documents[: len(trained)]
        assert sum(sizes[:-1]) < limit
        assert sum(sizes) >= limit or len(trained) == 60
        assert manifest.documents("validation") == 9


def test_documents_of_held_out_files_are_not_trained_on(tmp_path, bpe):
    """They are excluded from training data and tokenizer training, but stay in the held-out split."""
    documents = texts(40)
    lines = write_lines(tmp_path / "a.jsonl", documents)
    held = tmp_path / "held.txt"
    held.write_text("\n".join(documents[3:9]))  # blank lines between documents, no newline at the end
    own = {"validation": held, "separator": ""}
    manifest = prepare(lines, tmp_path / "d", **own, test_share=0.1, shard_tokens=200)
    assert manifest.skipped == {"files": 0, "names": [], "documents": 6}
    read = {split: documents_of(TokenFiles(tmp_path / "d", split)) for split in ("train", "validation", "test")}
    assert [len(read[split]) for split in read] == [31, 6, 3]
    assert sorted([*read["train"], *read["test"]]) == sorted([*documents[:3], *documents[9:]])
    assert sorted(training_texts(parts_of(lines, **own, test_share=0.1))) == sorted(read["train"])
    assert read_manifest(tmp_path / "d")[0] == manifest
    with pytest.raises(
        ValueError, match=r"none for train: 40 of the source were skipped, because the files given with"
    ):
        prepare(lines, tmp_path / "e", validation=lines, test_share=0)


def test_a_manifest_of_an_earlier_version_is_read(tmp_path):
    prepare(write_lines(tmp_path / "a.jsonl", texts(9)), tmp_path / "d")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    del manifest["skipped"]
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    assert TokenFiles(tmp_path / "d").manifest.skipped["documents"] == 0


def test_a_document_begins_with_the_prefix_of_the_tokenizer(tmp_path, bpe):
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lines = write_lines(tmp_path / "a.jsonl", texts(30))
    prepare(lines, tmp_path / "d", tokenizer=tmp_path / "tokenizer.json")
    prepare(lines, tmp_path / "e", tokenizer=bpe)
    begun, plain = TokenFiles(tmp_path / "d"), TokenFiles(tmp_path / "e")
    assert len(begun) == len(plain) + begun.documents
    tokens, begins = begun.read(0, len(begun))
    assert begins.equal(tokens == 300)
    assert documents_of(begun) == documents_of(plain)
    assert begun.manifest.settings["prefix_ids"] == [300]
    assert begun.tokenizer.prefix_ids == [300]
    assert "prefix_ids" not in plain.manifest.settings


def test_no_split_is_empty(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(ValueError, match="expected at least 3 different documents"):
        prepare(lines, tmp_path / "d")
    prepare(lines, tmp_path / "d", validation_share=0, test_share=0)  # the failed attempt left nothing behind
    manifest = prepare(write_lines(tmp_path / "b.jsonl", texts(60)), tmp_path / "e", limit_tokens=1)
    assert [manifest.documents(split) for split in ("train", "validation", "test")] == [1, 1, 1]


def test_an_empty_split_is_an_error(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", [str(i) for i in range(4096)])
    with pytest.raises(ValueError, match=r"expected documents in every split, found none for test; raise"):
        prepare(lines, tmp_path / "d", test_share=1e-9)


COMMAND = """
import json, sys, time
from hqlt.data import prepare
def slowly(progress):
    time.sleep(float(sys.argv[4]))
prepare(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], validation_share=0.1, shard_tokens=400, on_progress=slowly)
"""


def start(*arguments):
    return subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def finished_shards(folder):
    try:
        return len(json.loads((folder / "progress.json").read_text())["splits"]["train"])
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_preparation_is_resumed(how, bpe, tmp_path, request):
    lines = write_lines(tmp_path / "a.jsonl", texts(80))
    prepare(lines, tmp_path / "whole", tokenizer=bpe, validation_share=0.1, shard_tokens=400)
    folder, shards = tmp_path / "d", 0
    for more in (1, 2):
        process = start(lines, folder, bpe, 0.5)
        request.addfinalizer(lambda process=process: (process.kill(), process.wait()))
        deadline = time.monotonic() + 60
        while finished_shards(folder) < shards + more:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(how)
        process.wait()
        process.stderr.close()
        shards = finished_shards(folder)
        with pytest.raises(ValueError, match="the data is incomplete; run the same `hqlt data prepare` command again"):
            TokenFiles(folder)
        if how == signal.SIGINT:
            assert not list(folder.glob("*.unfinished"))
    progress = []
    prepare(lines, folder, tokenizer=bpe, validation_share=0.1, shard_tokens=400, on_progress=progress.append)
    assert progress[0].kept == progress[0].tokens > 400 * (shards - 1)
    assert progress[-1].done == 1
    assert contents(folder) == contents(tmp_path / "whole")


def test_an_interrupted_hub_dataset_is_resumed(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    for i in range(3):
        write_lines(tmp_path / "hub" / f"train-{i:05d}-of-00003.jsonl", texts(80)[27 * i : 27 * i + 27])
    how = {"shard_tokens": 400, "validation_share": 0.1}

    def stop(progress):
        if progress.kept > 1500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Hub(str(tmp_path / "hub")), tmp_path / "d", on_progress=stop, **how)
    progress = []
    prepare(Hub(str(tmp_path / "hub")), tmp_path / "d", on_progress=progress.append, **how)
    assert progress[0].kept > 1500
    prepare(Hub(str(tmp_path / "hub")), tmp_path / "whole", **how)
    assert {**contents(tmp_path / "d"), "manifest.json": 0} == {**contents(tmp_path / "whole"), "manifest.json": 0}
    files = [TokenFiles(tmp_path / name) for name in ("d", "whole")]
    assert files[0].digest == files[1].digest
    assert files[0].manifest.documents("train") == 71


def test_a_preparation_killed_at_once_is_started_again(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", texts(9))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "progress.json.unfinished").write_text("{")
    prepare(lines, tmp_path / "d")
    assert not list((tmp_path / "d").glob("*.unfinished"))


def test_a_second_process_is_refused(tmp_path, request, bpe):
    if os.name != "posix":
        pytest.skip("no locks")
    lines = write_lines(tmp_path / "a.jsonl", texts(80))
    process = start(lines, tmp_path / "d", "bytes", 30)
    request.addfinalizer(lambda: (process.kill(), process.wait(), process.stderr.close()))
    deadline = time.monotonic() + 60
    while not (tmp_path / "d" / "progress.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ValueError, match="another process is using this folder"):
        prepare(lines, tmp_path / "d")


def test_a_full_disk_is_reported_and_leaves_no_partial_shard(tmp_path):
    """A limit on the file size simulates a full disk: writing fails in the same way."""
    lines = write_lines(tmp_path / "a.jsonl", ["short\n"] * 300 + ["long " * 20_000, "a", "b", "c"] + texts(30))
    how = {"validation_share": 0, "test_share": 0, "shard_tokens": 600}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"d/train-\d+\.tokens could not be written: File too large\. Everything finished"
        ):
            prepare(lines, tmp_path / "d", **how)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert finished_shards(tmp_path / "d") > 0
    assert not list((tmp_path / "d").glob("*.unfinished"))
    prepare(lines, tmp_path / "d", **how)
    prepare(lines, tmp_path / "whole", **how)
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to count open files")
def test_many_shards_do_not_stay_open(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", texts(80))
    manifest = prepare(lines, tmp_path / "d", shard_tokens=1)
    assert len(manifest.splits["train"]) > 70
    before = len(os.listdir("/proc/self/fd"))
    files = TokenFiles(tmp_path / "d")
    assert len(documents_of(files)) == 78
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def folder(tmp_path, bpe):
    lines = write_lines(tmp_path / "a.jsonl", texts(80))
    prepare(lines, tmp_path / "d", tokenizer=bpe, shard_tokens=400)
    return tmp_path / "d"


def test_a_missing_or_truncated_file_is_reported(folder):
    for name, change, message in (
        ("train-00001.tokens", lambda data: data[:-1], r"train-00001\.tokens: expected \d+ bytes, found \d+; restore"),
        ("train-00002.starts", lambda data: data + b"0", r"train-00002\.starts: expected \d+ bytes, found \d+"),
        ("train-00000.tokens", None, r"train-00000\.tokens: expected a file of \d+ bytes, found none; restore"),
    ):
        path = folder / name
        data = path.read_bytes()
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(data))
        with pytest.raises(ValueError, match=message):
            TokenFiles(folder)
        assert [file for file, fault in check(folder) if fault] == [name]
        path.write_bytes(data)
    TokenFiles(folder)


def test_damage_that_keeps_the_size_is_found_by_the_checksum(folder):
    for name in ("train-00001.tokens", "train-00001.starts", "tokenizer/tokenizer_config.json"):
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(
            data.replace(b"<|endoftext|>", b"a") if name.endswith("json") else bytes([data[0] ^ 1]) + data[1:]
        )
        TokenFiles(folder)
        (fault,) = [fault for _, fault in check(folder) if fault]
        assert "expected the" in fault
        assert "found" in fault
        path.write_bytes(data)
    assert not [fault for _, fault in check(folder) if fault]


def test_an_invalid_manifest_is_refused(folder, tmp_path):
    manifest = folder / "manifest.json"
    whole = manifest.read_text()
    for wrong, message in (
        ("{", "expected a manifest written by `hqlt data prepare`, got JSONDecodeError"),
        ("{}", "expected a manifest .* got KeyError: 'format'"),
        (whole.replace("hqlt-tokens-1", "hqlt-tokens-9"), "expected format 'hqlt-tokens-1', got 'hqlt-tokens-9'"),
    ):
        manifest.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            TokenFiles(folder)
    with pytest.raises(ValueError, match="got no such folder"):
        TokenFiles(tmp_path / "nothing")
    with pytest.raises(ValueError, match="got an empty folder or one with other files"):
        TokenFiles(tmp_path)
    manifest.write_text(whole)
    with pytest.raises(ValueError, match=r"split: expected train or validation or test, the splits of .*, got 'tset'"):
        TokenFiles(folder, "tset")


def test_a_folder_can_be_moved_and_has_its_tokenizer(folder, bpe, tmp_path):
    before = TokenFiles(folder)
    moved = TokenFiles(folder.rename(tmp_path / "moved"))
    assert moved.digest == before.digest
    assert moved.tokenizer.digest == before.manifest.tokenizer["digest"]
    assert documents_of(moved)[0] in texts(80)


def test_digests_identify_the_data(tmp_path, bpe):
    lines = write_lines(tmp_path / "a.jsonl", texts(30))
    digests = set()
    for i, (documents, options) in enumerate(
        [(30, {}), (29, {}), (30, {"tokenizer": bpe}), (30, {"validation_share": 0.2})]
    ):
        write_lines(lines, texts(documents))
        prepare(lines, tmp_path / str(i), **options)
        digests.add(TokenFiles(tmp_path / str(i)).digest)
    assert len(digests) == 4


@pytest.mark.skipif(not DATA.is_dir(), reason="needs real data")
def test_real_text_survives_a_round_trip(tmp_path, bpe):
    prepare(DATA / "tinyshakespeare.txt", tmp_path / "s", separator="")
    files = TokenFiles(tmp_path / "s")
    assert 0.98 < files.bytes / (DATA / "tinyshakespeare.txt").stat().st_size < 0.99  # without held-out and blank
    assert documents_of(files)[0] == "First Citizen:\nBefore we proceed any further, hear me speak.\n"
    held = {"validation": DATA / "wikitext2_valid.txt", "test": DATA / "wikitext2_test.txt"}
    prepare(
        DATA / "lambada_test.jsonl", tmp_path / "l", tokenizer=bpe, **{k: write(tmp_path, v) for k, v in held.items()}
    )
    assert TokenFiles(tmp_path / "l").documents == 5153
    for split, file in held.items():
        files = TokenFiles(tmp_path / "l", split)
        assert files.bytes == file.stat().st_size
        assert documents_of(files) == [file.read_text()]


def write(folder, file):
    """Write a text as JSON Lines."""
    return write_lines(folder / f"{file.stem}.jsonl", [file.read_text()])
