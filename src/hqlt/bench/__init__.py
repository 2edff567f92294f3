"""The benchmarks of `hqlt bench`: this package and other implementations in one run, checked for equality first."""
