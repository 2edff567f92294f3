"""An OpenAI-compatible server for language models, with continuous batching and a store of states between turns."""
