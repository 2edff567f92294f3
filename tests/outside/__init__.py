"""What somebody else's package would hold: a toy of each kind, registered by one line, known to `hqlt` by name."""
