"""`hqlt bench train` as a script, with the same options: python benchmarks/train.py [--rounds=7] [--quick]"""

import sys

from hqlt.cli import main

if __name__ == "__main__":
    main(["bench", "train", *sys.argv[1:]])
