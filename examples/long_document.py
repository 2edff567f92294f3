"""Read a book once, then ask questions, fork and roll back from its state without reading it again.

    python examples/long_document.py [MODEL] [BOOK]

MODEL is a folder written by `hqlt train` or `hqlt convert`; by default a small untrained model, whose answers are noise
but whose times are realistic. BOOK is a text file; by default some source code of Python's standard library.
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


arguments = dict(zip(("model", "book"), sys.argv[1:], strict=False))
model = load_model(arguments["model"]) if arguments else hqlt.HQLTForCausalLM(hqlt.preset("tiny")).eval()
tokenizer = tokenizer_of(arguments["model"], model.config.vocab_size) if arguments else load_tokenizer("bytes")
text = (
    Path(arguments["book"]).read_text()
    if "book" in arguments
    else bytes(files_of("test")[0][:50_000].tolist()).decode()
)


def ids(text):
    return torch.tensor([tokenizer.encode(text)])


def answer(question, cache):
    """Answer a question about the book. The cache, which has read some or all of the book, does not change."""
    tokens = torch.cat([book, ids(f"\n\n{question}\n")], dim=1)
    output = model.generate(tokens, past_key_values=cache.fork(), max_new_tokens=20, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, tokens.shape[1] :].tolist())


# Read once, 1,024 tokens at a time. The size of the state does not depend on the length of the book.
book, cache = ids(text), HQLTCache(rollback=64)
with timed(f"to read {book.shape[1]:,} tokens"), torch.no_grad():
    for chunk in book.split(1024, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
print(f"{sum(state.bytes_per_row() for state in cache.states):,} bytes of state")

# Ask several questions, each from the same state.
for question in ("Who is it about?", "How does it begin?", "And how does it end?"):
    with timed(f"to ask {question!r} and to answer"):
        reply = answer(question, cache)
    print(f"             {reply!r}")

# Fork: reading in one fork does not affect the other.
one, other = cache.fork(), cache.fork()
with timed("to fork and read in both"), torch.no_grad():
    model(ids(" It was a dream."), past_key_values=one)
    model(ids(" It was true."), past_key_values=other)

# Roll back: remove the last tokens, as if they had not been read.
aside = ids(" (This is beside the point.)")
with torch.no_grad():
    model(aside, past_key_values=cache)
with timed(f"to remove {aside.shape[1]} tokens"):
    cache.crop(-aside.shape[1])
print(f"the answer equals that after reading the book again: {answer('So?', cache) == answer('So?', HQLTCache())}")
