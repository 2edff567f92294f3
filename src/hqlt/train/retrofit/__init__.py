"""`hqlt retrofit`: a converted model gains a bounded memory, in stages."""
