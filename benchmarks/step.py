"""`hqlt bench step` as a script, with the same options: python benchmarks/step.py [--rounds=7] [--quick]"""

import sys

from hqlt.cli import main

if __name__ == "__main__":
    main(["bench", "step", *sys.argv[1:]])
