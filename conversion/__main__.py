# SPDX-License-Identifier: Apache-2.0
"""`python -m conversion SOURCE TARGET`: the plain form of `opt-zoo convert`, without progress."""

from __future__ import annotations

import argparse
import sys

from conversion.convert import convert
from opt_core.dtypes import MODEL_DTYPES
from opt_core.errors import OPTError


def main() -> int:
    """Converts as the arguments say; returns 2 after an error, whose message goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m conversion", description=_summary())
    parser.add_argument("source", help="directory, file of weights, or hub name")
    parser.add_argument("target", help="directory to write into")
    parser.add_argument("--dtype", choices=[*MODEL_DTYPES], help="default: as stored")
    parser.add_argument("--max-shard-size", default="5GB", help="of each file (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the target")
    options = vars(parser.parse_args())
    try:
        done = convert(options.pop("source"), options.pop("target"), **options)
    except (OPTError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{done.target}: {done.tensors} tensors, {done.nbytes} bytes")
    return 0


def _summary() -> str:
    """The first line of `convert`'s docstring, plain."""
    return (convert.__doc__ or "").partition("\n")[0].replace("`", "")


if __name__ == "__main__":
    sys.exit(main())
