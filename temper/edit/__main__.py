"""``python -m temper.edit``: the same as ``temper edit``."""

import sys

from temper.cli.verbs.edit import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
