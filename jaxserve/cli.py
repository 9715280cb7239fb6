"""The `jaxserve` command: finds the subcommand, parses its flags, turns errors into one line.

Each subcommand lives in a module with `add_arguments(parser)` and `run(args) -> exit code`. Only
the chosen module is imported: `jaxserve --help` must not wait for JAX.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from jaxserve.config import LOG_LEVELS
from jaxserve.log import OUR_PACKAGES, configure_logging
from jaxserve.version import __version__

USAGE_ERROR = 2  # argparse's own exit code for a wrong command line


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives, and the names of its two functions there."""

    module: str
    help: str
    add_arguments: str = "add_arguments"
    run: str = "run"


COMMANDS = types.MappingProxyType(
    {
        "serve": Command("jaxserve.server.command", "serve a model over HTTP"),
        "convert": Command("converters.commands.convert", "write a checkpoint in another format"),
        "plan": Command("converters.commands.plan", "show where each tensor of a checkpoint goes"),
        "verify": Command("jaxserve.verify", "compare logits and text with a reference"),
        "bench": Command(
            "jaxserve.bench.command", "measure latency, throughput, a server, a step or the host"
        ),
        "show": Command("jaxserve.show", "print a model's layers as a table"),
        "roofline": Command("jaxserve.roofline", "the least time a step can take on TPUs"),
        "models": Command(
            "jaxserve.show",
            "list the architectures that can be served",
            add_arguments="add_models_arguments",
            run="run_models",
        ),
    }
)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and a guess at what a mistyped flag meant."""

    @property
    def subparsers(self) -> list[argparse.ArgumentParser]:
        """The parsers of the command's own commands, if it has any."""
        groups = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return [parser for group in groups for parser in group.choices.values()]

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(USAGE_ERROR)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit over arguments nobody asked for; a flag is never accepted and then ignored."""
        helps = " ".join(parser.format_help() for parser in (self, *self.subparsers))
        known = sorted(set(re.findall(r"--[a-z][a-z0-9-]*", helps)))
        named = []
        for text in unknown:
            flag = text.split("=")[0]
            if not flag.startswith("-"):
                continue
            close = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
            named.append(f"{flag} (did you mean {close[0]}?)" if close else flag)
        if named:
            self.error(f"{self.prog} has no flag {', '.join(named)}")
        self.error(f"unexpected argument: {' '.join(unknown)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _top_parser()
    if not arguments:
        parser.print_help()
        return USAGE_ERROR
    name = arguments[0]
    if name.startswith("-"):  # --help and --version end here, anything else is refused
        _, unknown = parser.parse_known_args(arguments)
        parser.refuse(unknown)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
        parser.error(f"there is no command {name!r}; {hint}")
    return run_command(name, arguments[1:], prog=f"jaxserve {name}")


def run_command(name: str, arguments: Sequence[str], *, prog: str) -> int:
    """Parse a subcommand's arguments, run it, and return its exit code.

    Errors that a user can cause (ValueError subclasses of our packages) become one line and exit
    code 1; with `--log-level debug` the traceback comes first.
    """
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = Parser(prog=prog, description=command.help, allow_abbrev=False)
    getattr(module, command.add_arguments)(parser)
    if parser.get_default("log_level") is None:
        parser.add_argument("--log-level", choices=LOG_LEVELS, default="info")
        for inner in parser.subparsers:  # without a default, which would undo what stands before
            inner.add_argument("--log-level", choices=LOG_LEVELS, default=argparse.SUPPRESS)
    args = parse(parser, arguments)
    try:
        configure_logging(args.log_level)
        return getattr(module, command.run)(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        if not is_user_error(error):
            raise
        if args.log_level == "debug":
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse strictly; a positional may come before, between or after the flags."""
    try:
        args, unknown = parser.parse_known_intermixed_args(list(arguments))
    except TypeError:  # argparse's answer where the parser has subcommands of its own
        args, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        parser.refuse(unknown)
    return args


def is_user_error(error: ValueError) -> bool:
    """Return whether a user caused it: it is an error class of ours, not a bare ValueError."""
    return type(error).__module__.split(".")[0] in OUR_PACKAGES


def _top_parser() -> Parser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="jaxserve",
        usage="jaxserve COMMAND ...",
        description="Serve language models with JAX.",
        epilog=f"commands:\n{listing}\n\n'jaxserve COMMAND --help' lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxserve {__version__}")
    return parser
