"""`hqlt bench ops` as a script, with the same options: python benchmarks/ops.py [--rounds=7] [--quick]"""

import sys

from hqlt.cli import main

if __name__ == "__main__":
    main(["bench", "ops", *sys.argv[1:]])
