"""Documents of a Hugging Face dataset, streamed: only the tokens are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hqlt.data.local import text_of
from hqlt.data.network import offline_if_unreachable
from hqlt.data.source import Source
from hqlt.errors import first_line


class Hub(Source):
    """One field of each row of `datasets.load_dataset(name, subset, split=split, streaming=True)`.

    Reading resumes from the state of the dataset; only the file that was being read is read again.
    """

    options = frozenset({"text_field", "subset", "split"})

    def __init__(self, name: str, subset: str | None = None, split: str = "train", text_field: str = "text") -> None:
        super().__init__()
        self.name, self.subset, self.split, self.text_field = name, subset, split, text_field
        self.state: dict[str, Any] | None = None
        self.dataset: Any = None
        self.rows = 1

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "name": self.name}

    def __iter__(self) -> Iterator[str]:
        self.dataset = self._load()
        if self.state is not None:
            self.dataset.load_state_dict(self.state)
        rows = iter(self.dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # datasets raises errors of many libraries (network, hub, file formats)
                raise OSError(
                    f"{self.name}: reading stopped after row {self.seen} ({type(error).__name__}: {error}); the same "
                    f"command resumes from the last finished shards"
                ) from error
            self.seen += 1
            self.passed = self.size * self.seen // self.rows if self.size is not None else 0
            yield text_of(row, self.text_field, f"{self.name}, row {self.seen}")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "dataset": self.dataset.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.state = state["seen"], state["dataset"]

    def _load(self) -> Any:
        from datasets import load_dataset

        with offline_if_unreachable(self.name) as offline:
            try:
                dataset = load_dataset(self.name, name=self.subset, split=self.split, streaming=True)
            except Exception as error:  # datasets raises errors of many libraries (network, hub, file formats)
                why = f"{offline}{type(error).__name__}: {first_line(error)}"
                raise ValueError(
                    f"{self.name}: expected a file, a folder, python-library, or a dataset on the Hugging Face hub, "
                    f"which could not be loaded ({why}); check the name, --subset, --split and the network"
                ) from error
        about = (dataset.info.splits or {}).get(self.split)
        if about is not None and about.num_examples:
            self.size, self.rows = about.num_bytes, about.num_examples
        return dataset
