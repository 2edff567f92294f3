import bz2
import gzip
import json
import lzma
import os
import sys

import pytest

from hqlt.data import load_tokenizer
from hqlt.data.holdout import EXACT_BELOW, Holdout
from hqlt.data.hub import Hub
from hqlt.data.local import JsonLines, LocalFormat, TextFiles
from hqlt.data.parts import parts_of, training_texts
from hqlt.task.text import files_of, library_files
from tests.data.conftest import texts, write_lines


def write_parquet(file, documents):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": documents, "n": list(range(len(documents)))}), file, row_group_size=7)
    return file


def write_gzip(file, documents):
    lines = "".join(json.dumps({"text": text}) + "\n\n" for text in documents)
    file.write_bytes(gzip.compress(lines.encode()))
    return file


def write_text(file, documents):
    file.write_text("\n".join(documents))  # documents end with a newline, so blank lines separate them
    return file


def write_compressed(file, documents):
    """Compressed according to its suffix, as two concatenated streams (as after `cat`)."""
    plain = WRITERS[file.with_suffix("").name.lower()](file.with_suffix(""), documents)
    data, half = plain.read_bytes(), plain.stat().st_size // 2
    plain.unlink()
    file.write_bytes(b"".join(COMPRESS[file.suffix.lower()](part) for part in (data[:half], data[half:])))
    return file


def zstandard(data):
    codec = pytest.importorskip("pyarrow").Codec("zstd")
    return codec.compress(data, asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}
WRITERS = {
    "a.txt": write_text,
    "a.jsonl": write_lines,
    "a.ndjson": write_lines,
    "a.jsonl.gz": write_gzip,
    "a.parquet": write_parquet,
    "A.TXT": write_text,
    "A.JSONL": write_lines,
    "A.PARQUET": write_parquet,
    "a.txt.gz": write_compressed,
    "a.jsonl.bz2": write_compressed,
    "a.ndjson.xz": write_compressed,
    "a.jsonl.zst": write_compressed,
    "a.JSONL.ZST": write_compressed,
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_formats_are_read_and_resumed_anywhere(name, tmp_path):
    documents = texts(30)
    WRITERS[name](tmp_path / name, documents)
    how = LocalFormat(separator="")
    source = how.source_in(tmp_path / name)
    assert list(source) == documents
    assert source.passed == source.size > 0
    for done in (0, 1, 13, 30):
        first = how.source_in(tmp_path)
        read = [text for text, _ in zip(first, range(done), strict=False)]
        second = how.source_in(tmp_path)
        second.load_state_dict({"seen": len(read)})
        assert [*read, *second] == documents


def test_documents_of_a_text_file(tmp_path):
    (tmp_path / "b.txt").write_text("b\r\n\n")
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\nlines\n  \nthree")
    (tmp_path / "c.other").write_text("c")
    assert list(LocalFormat().source_in(tmp_path)) == ["one\n\n\ntwo\nlines\n  \nthree", "b\r\n\n"]
    assert list(LocalFormat(separator="").source_in(tmp_path)) == ["one\n", "two\nlines\n", "three", "b\r\n"]
    assert list(LocalFormat(separator="lines").source_in(tmp_path)) == ["one\n\n\ntwo\n", "  \nthree", "b\r\n\n"]
    assert list(LocalFormat(pattern="c.*").source_in(tmp_path)) == ["c"]


def test_a_json_file_given_by_name_is_read_as_json_lines(tmp_path):
    file = tmp_path / "c4.00000-of-01024.json.gz"
    file.write_bytes(gzip.compress(write_lines(tmp_path / "a.jsonl", texts(9)).read_bytes()))
    (tmp_path / "a.jsonl").unlink()
    assert list(LocalFormat().source_in(file)) == texts(9)
    assert list(LocalFormat(pattern="*.json.gz").source_in(tmp_path)) == texts(9)
    with pytest.raises(
        ValueError,
        match=r"found none \(skipped because of an unknown format: c4\.00000-of-01024\.json\.gz\); choose with",
    ):
        LocalFormat().source_in(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_byte_order_mark_is_removed(name, tmp_path):
    data = b'{"text": "one\\n"}\r\n{"text": "two\\n"}' if name == "a.jsonl" else b"---\r\none\n---\r\n\r\n---\ntwo\n"
    mark = b"\xef\xbb\xbf"
    (tmp_path / name).write_bytes(gzip.compress(mark + data) if name.endswith("gz") else mark + data)
    documents = list(LocalFormat(separator="---").source_in(tmp_path / name))
    assert [text for text in documents if text.strip()] == ["one\n", "two\n"]
    if name == "a.txt":
        assert list(LocalFormat().source_in(tmp_path / name)) == [data.decode()]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a_missing_package_is_reported_before_reading(name, tmp_path, monkeypatch):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="expected the package pyarrow"):
        parts_of(tmp_path)


class TestFolders:
    def test_links_are_followed_and_nothing_is_read_twice(self, tmp_path):
        folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
        (folder / "deep").mkdir(parents=True)
        elsewhere.mkdir()
        (elsewhere / "there.txt").write_text("there")
        (folder / "deep" / "here.txt").write_text("here")
        (folder / "deep" / "up").symlink_to(folder)
        (folder / "twice").symlink_to(folder / "deep")
        (folder / "linked").symlink_to(elsewhere)
        (elsewhere / "back").symlink_to(folder)
        (folder / "again.txt").symlink_to(elsewhere / "there.txt")
        (folder / "nowhere.txt").symlink_to(tmp_path / "nothing")
        source = LocalFormat().source_in(folder)
        assert sorted(source) == ["here", "there"]
        assert source.skipped == ["nowhere.txt"]
        assert sorted(LocalFormat(pattern="deep/*.txt").source_in(folder)) == ["here"]
        assert list(LocalFormat().source_in(folder / "linked"))[:1] == ["there"]

    def test_skipped_files_are_listed(self, tmp_path):
        for name in ("a.jsonl", "B.JSONL"):
            write_lines(tmp_path / name, [name])
        (tmp_path / ".git").mkdir()
        for name in ("b.csv", "c.json", "d.parquet.gz", ".hidden", ".git/config"):
            (tmp_path / name).touch()
        source = LocalFormat().source_in(tmp_path)
        assert sorted(source) == ["B.JSONL", "a.jsonl"]
        assert source.skipped == ["b.csv", "c.json", "d.parquet.gz"]
        assert LocalFormat(pattern="*.jsonl").source_in(tmp_path).skipped == []

    @pytest.mark.parametrize("pattern", ["", "/a/*.txt"])
    def test_an_invalid_pattern_is_refused(self, pattern, tmp_path):
        with pytest.raises(ValueError, match=r'pattern: expected one such as "\*\.txt", got '):
            LocalFormat(pattern=pattern).source_in(tmp_path)

    def test_a_special_file_is_refused(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="pipe: expected a file or a folder, got neither"):
            LocalFormat().source_in(tmp_path / "pipe")


def test_the_library_is_split_like_the_task():
    parts = parts_of("python-library")
    for part, split in zip(parts, ("train", "validation", "test"), strict=True):
        assert part.split == split
        assert isinstance(part.source, TextFiles)
        assert part.source.files == library_files(split)
    assert "".join(parts[1].source).encode() == bytes(files_of("validation")[0].numpy())
    with pytest.raises(ValueError, match="expected no validation or test options"):
        parts_of("python-library", test_share=0.1)


def test_given_files_are_held_out_and_excluded_from_training(tmp_path):
    for name in ("a", "b", "c", "held"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.txt").write_text("d")
    parts = parts_of(tmp_path, validation=tmp_path / "held.txt", test=tmp_path / "more")
    assert [list(part.source) for part in parts] == [["a", "b", "c"], ["held"], ["d"]]
    assert [part.split for part in parts] == [(0.0, 0.0), "validation", "test"]
    with pytest.raises(ValueError, match=r"validation: expected a file or a folder, found none at .*nothing"):
        parts_of(tmp_path, validation=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"test_share: expected none, because --test gives the documents, got 0\.1"):
        parts_of(tmp_path, test=tmp_path / "held.txt", test_share=0.1)


def test_documents_are_held_out_by_a_hash_of_their_text():
    documents = texts(50)
    holdout = Holdout.of(documents, 0.1, 0.04)
    splits = [holdout.split_of(text) for text in documents]
    assert [splits.count(split) for split in ("train", "validation", "test")] == [43, 5, 2]
    assert Holdout.of(reversed(documents * 2), 0.1, 0.04) == holdout
    of_many = Holdout.of((str(i) for i in range(10 * EXACT_BELOW)), 0.1, 0.05)
    splits = [of_many.split_of(str(i)) for i in range(10 * EXACT_BELOW)]
    assert 0.09 < splits.count("validation") / len(splits) < 0.11
    assert 0.04 < splits.count("test") / len(splits) < 0.06
    least = Holdout.of("abc", 0.005, 0.005)
    assert sorted(map(least.split_of, "abc")) == ["test", "train", "validation"]
    assert {Holdout.of("ab", 0, 0).split_of(text) for text in "ab"} == {"train"}
    with pytest.raises(ValueError, match=r"expected at least 3 different documents, .* found 2; split a long text"):
        Holdout.of("abab", 0.1, 0.1)
    with pytest.raises(ValueError, match=r"expected shares that sum to less than 1, got 0\.5, 0\.5"):
        Holdout.of("ab", 0.5, 0.5)


def test_a_tokenizer_is_trained_on_training_documents_only(tmp_path):
    documents = texts(40)
    parts = parts_of(write_lines(tmp_path / "a.jsonl", documents), validation_share=0.2, test_share=0.2)
    assert len(list(training_texts(parts))) == 24
    assert list(training_texts(parts)) == list(training_texts(parts))


def test_a_lone_surrogate_in_json_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    assert list(JsonLines([tmp_path / "a.jsonl"], tmp_path)) == ["a\N{REPLACEMENT CHARACTER}", "🙂"]


def test_null_is_read_as_an_empty_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    assert list(JsonLines([tmp_path / "a.jsonl"], tmp_path)) == ["", "a"]


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("python-library", {"text_field": "text"}),
        ("a.txt", {"text_field": "body"}),
        ("a.txt", {"pattern": "*.txt"}),
        ("a.jsonl", {"separator": ""}),
        ("", {"split": "validation"}),
        ("owner/name", {"separator": ""}),
    ],
)
def test_an_option_that_the_source_does_not_use_is_refused(source, options, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    write_lines(tmp_path / "a.jsonl", ["a"])
    local = source in ("", "a.txt", "a.jsonl")
    if not source:
        (tmp_path / "a.jsonl").unlink()
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: expected none, because .* does not use it"):
        parts_of(tmp_path / source if local else source, **options)


def test_an_option_may_apply_to_the_held_out_files_only(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"body": "b"}\n')
    _, held_out = parts_of(tmp_path / "a.txt", text_field="body", validation=lines, test_share=0)
    assert list(held_out.source) == ["b"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl, line 2: expected a field 'text', got 'txt'; name"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: expected a JSON object, got Expecting value"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: expected a string in 'text', got int"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: expected a field 'text', got 'list'"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: expected a JSON object, got 'utf-8' codec"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9],
            r"gz: expected a complete gzip file, got .* after \d+ b",
        ),
        ("a.txt.bz2", bz2.compress(b"a" * 999)[:-9], r"a\.txt\.bz2: expected a complete bzip2 file, got"),
        ("a.txt.xz", lzma.compress(b"a" * 999)[:-9], r"a\.txt\.xz: expected a complete xz file, got"),
        ("a.jsonl.zst", b"no Zstandard at all", r"a\.jsonl\.zst: expected a complete Zstandard file, got"),
        ("a.jsonl.gz", b"no gzip at all", r"a\.jsonl\.gz: expected a complete gzip file, got"),
        ("a.txt", b"caf\xe9", r"a\.txt: expected text in UTF-8, got .* convert it first"),
        ("a.txt", b"\xff\xfea\0", r"a\.txt: expected text in UTF-8, got UTF-16 .* iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", b"\xfe\xff\0{", r"a\.jsonl: expected text in UTF-8, got UTF-16"),
        (
            "a.json",
            b'[\n{"text": "a"}]',
            r"a\.json, line 1: expected a JSON object, got .* \(`jq -c '\.\[\]'` turns an array into lines",
        ),
        ("a.csv.gz", b"", r"a\.csv\.gz: expected text or one of \.txt.*got \.csv\.gz; convert it to JSON Lines"),
        ("a.parquet.gz", b"", r"a\.parquet\.gz: expected text or one of \.txt.*got \.parquet\.gz"),
        ("a.parquet", b"PAR1 or not", r"a\.parquet: expected a valid Parquet file, got"),
    ],
)
def test_a_damaged_file_is_reported_with_the_position(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        list(LocalFormat().source_in(tmp_path / name))


def test_errors_for_wrong_columns_folders_and_names(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ValueError, match=r"a\.parquet: expected a field 'body', got 'text', 'n'; name"):
        list(LocalFormat(text_field="body").source_in(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"files of one format .* found Parquet and TextFiles; choose with --pattern"):
        LocalFormat().source_in(tmp_path)
    with pytest.raises(ValueError, match=r"files of one format .* found none"):
        LocalFormat(pattern="*.xyz").source_in(tmp_path)
    for name in ("./nothing", "corpus.jsonl", str(tmp_path / "x")):
        with pytest.raises(ValueError, match="expected a file or a folder, found none"):
            parts_of(name)
    (part,) = parts_of("HuggingFaceFW/fineweb-edu", subset="sample-100BT")
    assert isinstance(part.source, Hub)
    assert part.source.identity() == {
        "kind": "Hub",
        "name": "HuggingFaceFW/fineweb-edu",
        "subset": "sample-100BT",
        "split": "train",
        "text_field": "text",
    }


@pytest.fixture
def hub(tmp_path):
    """A dataset of several files, as on the hub."""
    pytest.importorskip("datasets")
    folder = tmp_path / "hub"
    folder.mkdir()
    documents = texts(60)
    for i in range(3):
        write_parquet(folder / f"train-{i:05d}-of-00003.parquet", documents[20 * i : 20 * i + 20])
    write_parquet(folder / "test-00000-of-00001.parquet", ["held out"])
    return str(folder), documents


@pytest.mark.parametrize("done", [0, 1, 20, 33, 60])
def test_a_hub_dataset_resumes_anywhere(hub, done):
    name, documents = hub
    first = Hub(name)
    rows = iter(first)
    read = [next(rows) for _ in range(done)]
    second = Hub(name)
    if done:
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [*read, *second] == documents
    assert list(Hub(name, split="test")) == ["held out"]


def test_errors_for_what_the_hub_does_not_have(hub, monkeypatch):
    name, _ = hub
    with pytest.raises(ValueError, match=r"which could not be loaded \(ValueError: Bad split: tset"):
        list(Hub(name, split="tset"))
    with pytest.raises(ValueError, match=r"hub, row 1: expected a field 'body', got 'text', 'n'"):
        list(Hub(name, text_field="body"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no/such: expected a file, .* could not be loaded .* check the name"):
        list(Hub("no/such"))


def test_an_unreachable_hub_is_checked_once(monkeypatch):
    """Libraries do not retry for a minute each; settings are restored afterwards."""
    constants = pytest.importorskip("huggingface_hub.constants")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked = []
    monkeypatch.setattr("hqlt.data.network.hub_answers", lambda: asked.append(1))
    with pytest.raises(ValueError, match=r"could not be loaded \(https://huggingface\.co does not answer; "):
        list(Hub("no/such"))
    with pytest.raises(
        ValueError, match=r"'no/such', which could not be loaded: https://huggingface\.co does not answer"
    ):
        load_tokenizer("no/such")
    assert len(asked) == 2
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_a_network_failure_while_reading_is_reported(hub, monkeypatch):
    class Failing:
        def __iter__(self):
            yield {"text": "a"}
            raise TimeoutError("no answer")

    source = Hub(hub[0])
    monkeypatch.setattr(source, "_load", Failing)
    with pytest.raises(OSError, match=r"reading stopped after row 1 \(TimeoutError: no answer\); the same command"):
        list(source)
