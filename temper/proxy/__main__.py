"""``python -m temper.proxy --model models/smollm2-135m-instruct --out runs/proxy/data``: the files
of a proxy study.
"""

import argparse
import sys
from pathlib import Path

from temper.errors import TemperError
from temper.proxy.build import build_files, describe
from temper.proxy.topic import RECIPES, Topic


def main(args: list[str] | None = None) -> None:
    """Write the files and say how many rows they have; a user's mistake is one line on standard
    error and exit status 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m temper.proxy", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of an instruct model")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the files; it is replaced"
    )
    parser.add_argument(
        "--topic", type=Path, default=RECIPES, help="what is refused (default: cooking recipes)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=80, help="longest answer (default: 80)"
    )
    options = parser.parse_args(args)
    try:
        print(
            describe(
                build_files(
                    options.model, options.out, Topic(options.topic), options.max_new_tokens
                )
            )
        )
    except TemperError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
