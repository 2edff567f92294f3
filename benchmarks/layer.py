"""`hqlt bench layer` as a script, with the same options: python benchmarks/layer.py [--rounds=7] [--quick]"""

import sys

from hqlt.cli import main

if __name__ == "__main__":
    main(["bench", "layer", *sys.argv[1:]])
