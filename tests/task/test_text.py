import itertools
import sysconfig
from pathlib import Path

import torch

from hqlt.task import StandardLibrary, generator_for
from hqlt.task.text import files_of


def test_the_next_byte_is_the_target_and_files_begin_segments():
    batch = StandardLibrary(length=2000).sample(generator_for("train", 0), 50, "train")
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.resets.any()
    assert not batch.resets.all()


def test_a_file_is_in_one_split_only():
    whole = {split: bytes(files_of(split)[0].numpy()) for split in ("train", "validation", "test")}
    source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes()
    assert sum(source in text for text in whole.values()) == 1
    assert min(map(len, whole.values())) > 100_000


def test_every_file_begins_a_segment():
    text, begins = files_of("test")
    starts = [*begins.nonzero()[:, 0].tolist(), len(text)]
    sizes = sorted(end - start for start, end in itertools.pairwise(starts))
    library = Path(sysconfig.get_paths()["stdlib"])
    first = bytes(text[: starts[1]].numpy())
    assert any(first == path.read_bytes() for path in library.rglob("*.py") if path.stat().st_size == len(first))
    assert sizes[0] > 0
