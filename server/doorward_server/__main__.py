"""`doorward`: starts the command line, or says which extra is missing."""

import os
import sys


def main() -> None:
    """The console script."""
    # gRPC prints its own lines about what is told in a sentence here, such as a port in use.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from doorward_server.cli import run  # noqa: PLC0415 - a missing extra shows here
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("doorward"):
            raise
        sys.exit(f'doorward: {error.name} is not installed: install the extra, `pip install "doorward[server]"`')
    run()


if __name__ == "__main__":
    main()
