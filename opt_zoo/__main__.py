# SPDX-License-Identifier: Apache-2.0
"""`python -m opt_zoo`."""

from opt_zoo.cli import main

if __name__ == "__main__":
    main()
