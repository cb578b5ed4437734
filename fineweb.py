"""Downloads and tokenises FineWeb-Edu into ./fineweb: `python fineweb.py --help`.

The command is `gpt2 prepare`; see gpt2/prepare/run.py.
"""

import sys

from gpt2.cli import main

if __name__ == "__main__":  # worker processes import this file again on Windows and macOS
    sys.exit(main(["prepare", *sys.argv[1:]]))
