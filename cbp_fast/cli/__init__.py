"""The command `cbp-fast`, also `python -m cbp_fast`: one module a subcommand, each with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .._version import __version__

COMMANDS = {
    "info": "versions, backends and instruction sets",
    "demo": "plain backprop and continual backprop side by side",
    "bench": "time one step of continual backprop on every backend",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status: 0, 1 if a part failed, 2 for a wrong argument, 130 for Ctrl-C.

    Args:
        argv: the arguments after the command's name; `sys.argv[1:]` if None.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="cbp-fast", description="Continual backpropagation for PyTorch.")
    parser.add_argument("--version", action="version", version=f"cbp_fast {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    try:
        for name, text in COMMANDS.items():
            command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
            # the others stay unimported: what one command needs may be missing where another runs
            if name in argv[:1]:
                module = importlib.import_module(f"cbp_fast.cli.{name}")
                module.add_arguments(command)
                command.set_defaults(run=module.run)
        args = parser.parse_args(argv)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("cbp-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # who read it has gone; nor can Python write the rest when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
