"""What `hqlt bench` measures: ours and its peers side by side, in one run, equal before they are timed."""
