"""Language models behind HTTP, in OpenAI's form: continuous batching, and turns that resume from stored states."""
