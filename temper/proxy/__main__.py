"""``python -m temper.proxy``: the same as ``temper proxy``."""

import sys

from temper.cli.verbs.proxy import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
