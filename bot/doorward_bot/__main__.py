"""`doorward-bot`: starts the command line, or says which extra is missing."""

import os
import sys


def main() -> None:
    """The console script."""
    # gRPC prints its own lines about what is logged in a sentence here, such as a server that is away.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from doorward_bot.cli import run  # noqa: PLC0415 - a missing extra shows here
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("doorward"):
            raise
        sys.exit(f'doorward-bot: {error.name} is not installed: install the extra, `pip install "doorward[bot]"`')
    run()


if __name__ == "__main__":
    main()
