"""`hqlt retrofit`: give a converted model a bounded memory, in stages."""
