"""`hqlt bench gpu` as a script, with the same options: python benchmarks/gpu.py [--rounds=7] [--quick]"""

import sys

from hqlt.cli import main

if __name__ == "__main__":
    main(["bench", "gpu", *sys.argv[1:]])
