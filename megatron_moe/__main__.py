"""`python -m megatron_moe` is the command `megatron-moe`."""

import sys

from megatron_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
