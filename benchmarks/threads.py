"""`hqlt bench threads` as a script, with the same options: python benchmarks/threads.py [--rounds=7] [--quick]"""

import sys

from hqlt.cli import main

if __name__ == "__main__":
    main(["bench", "threads", *sys.argv[1:]])
