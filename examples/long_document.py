"""A book is read once; then questions, forks and rollbacks start from its state, and none of them reads it again.

    python examples/long_document.py [MODEL] [BOOK]

MODEL is a folder that `hqlt train` or `hqlt convert` wrote; by default a small untrained model, whose words are noise
but whose times are those of a trained one. BOOK is a text file; by default some source code of Python's library.
"""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import hqlt
from hqlt.data import load_tokenizer
from hqlt.language.folder import load_model, tokenizer_of
from hqlt.model import HQLTCache
from hqlt.task.text import files_of


@contextmanager
def timed(what):
    began = time.perf_counter()
    yield
    print(f"{time.perf_counter() - began:8.3f} s   {what}")


given = dict(zip(("model", "book"), sys.argv[1:], strict=False))
model = load_model(given["model"]) if given else hqlt.HQLTForCausalLM(hqlt.preset("tiny")).eval()
tokenizer = tokenizer_of(given["model"], model.config.vocab_size) if given else load_tokenizer("bytes")
text = Path(given["book"]).read_text() if "book" in given else bytes(files_of("test")[0][:50_000].tolist()).decode()


def ids(text):
    return torch.tensor([tokenizer.encode(text)])


def answer(question, cache):
    """What follows the book and a question. The cache, which has read some or all of the book, stays as it is."""
    tokens = torch.cat([book, ids(f"\n\n{question}\n")], dim=1)
    made = model.generate(tokens, past_key_values=cache.fork(), max_new_tokens=20, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, tokens.shape[1] :].tolist())


# Read once, 1,024 tokens at a time. The state has one size, however long the book.
book, cache = ids(text), HQLTCache(rollback=64)
with timed(f"to read {book.shape[1]:,} tokens"), torch.no_grad():
    for chunk in book.split(1024, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
print(f"{sum(state.bytes_per_row() for state in cache.states):,} bytes of state")

# Ask often: every question starts from the same state.
for question in ("Who is it about?", "How does it begin?", "And how does it end?"):
    with timed(f"to ask {question!r} and to answer"):
        said = answer(question, cache)
    print(f"             {said!r}")

# Fork: what is read in one does not show in the other.
one, other = cache.fork(), cache.fork()
with timed("to fork, and to read on in both"), torch.no_grad():
    model(ids(" It was a dream."), past_key_values=one)
    model(ids(" It was true."), past_key_values=other)

# Roll back: the last tokens are taken back, as if they had not been read.
aside = ids(" (This is beside the point.)")
with torch.no_grad():
    model(aside, past_key_values=cache)
with timed(f"to take {aside.shape[1]} tokens back"):
    cache.crop(-aside.shape[1])
print(f"answers are those after reading it anew: {answer('So?', cache) == answer('So?', HQLTCache())}")
