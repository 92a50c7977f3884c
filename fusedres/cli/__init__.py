"""The command line: one file per command, each with ``add_parser`` and ``run``.

Every failure that a user can act on is one line on stderr, ``fusedres: error: ...``, and a status
other than 0: 2 for a command line that can't be right, 1 for a run that failed, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from fusedres import __version__, ops, plan
from fusedres.cli import autotune, bench, eval, experiment, info, predict, quantize, report, train
from fusedres.cli.errors import USAGE, CommandError

COMMANDS = (autotune, bench, eval, experiment, info, predict, quantize, report, train)
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"fusedres: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fusedres",
        description="Fused kernels for ResNets: measure, report, inspect, predict, quantise, train.",
    )
    parser.add_argument("--version", action="version", version=f"fusedres {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(arguments)
    args.command_line = shlex.join(["fusedres", *arguments])
    try:
        if ops.forced_backend() not in plan.BACKENDS:
            allowed = ", ".join(plan.BACKENDS)
            raise CommandError(
                f"FUSEDRES_BACKEND must be one of {allowed}, got {ops.forced_backend()!r}", USAGE
            )
        return int(args.run(args))
    except CommandError as error:
        print(f"fusedres: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt as error:  # its text, if any, says how to go on
        print(f"fusedres: interrupted{error}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output went away (`| head`): nothing left to say, and no traceback at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
