"""`python -m jaxserve.launch_server ...` is `jaxserve serve ...`, for SGLang command lines."""

import sys

from jaxserve.cli import run_command


def main() -> int:
    """Serve with this process's arguments and return the exit code."""
    return run_command("serve", sys.argv[1:], prog="python -m jaxserve.launch_server")


if __name__ == "__main__":
    sys.exit(main())
