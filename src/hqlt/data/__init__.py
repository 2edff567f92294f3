"""Data for language models: tokenizers, folders of token files, and batches read from them.

>>> prepare("python-library", "runs/data/python")           # once; on the command line: `hqlt data prepare`
>>> data = Windows(TokenFiles("runs/data/python"), length=256)
>>> data.batch(0, rows=8)                                     # the first batch; batches can be read in any order
"""

from hqlt.data.bpe import train_tokenizer
from hqlt.data.files import TokenFiles, check
from hqlt.data.manifest import Manifest
from hqlt.data.parts import parts_of, training_texts
from hqlt.data.prepare import PrepareProgress, prepare
from hqlt.data.tokenizer import Tokenizer, load_tokenizer
from hqlt.data.windows import Stream, Windows

__all__ = [
    "Manifest",
    "PrepareProgress",
    "Stream",
    "TokenFiles",
    "Tokenizer",
    "Windows",
    "check",
    "load_tokenizer",
    "parts_of",
    "prepare",
    "train_tokenizer",
    "training_texts",
]
