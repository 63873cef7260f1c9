"""The command `quantization-mlx`: converts models to MLX checkpoints, runs, measures and describes them.

Flags have the names that users of mlx_lm know. Results go to the standard output, figures about the run and errors to
the standard error; the exit code is 1 for what failed and 2 for arguments that make no sense.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from . import benchmark, convert, generate, info, perplexity
from .arguments import COMMANDS_NOT_HERE, PROGRAM, Commands, UsageError, parser_of

# name -> (what it does, one line of help)
COMMANDS: Commands = {
    "convert": (convert.run, "write a model as an MLX checkpoint, quantized or not"),
    "generate": (generate.run, "answer a prompt"),
    "perplexity": (perplexity.run, "measure how well a model predicts a text"),
    "benchmark": (benchmark.run, "time prompts and generation"),
    "info": (info.run, "describe a checkpoint without loading it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, those of the process if None, and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and (advice := COMMANDS_NOT_HERE.get(argv[0])):
        return _fail(argv[0], UsageError(f"mlx_lm's command is not here: {advice}"), 2)
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as exit:  # argparse has printed the error
        return exit.code if isinstance(exit.code, int) else 2
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        return _fail(arguments.command, error, 2)
    except Exception as error:
        if arguments.debug:
            raise
        return _fail(arguments.command, error, 1)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, with one subparser for each of COMMANDS."""
    return parser_of(COMMANDS)


# Errors whose text is only the offending value.
_BARE = (KeyError, IndexError, AttributeError, AssertionError)


def _fail(command: str, error: Exception, code: int) -> int:
    message = " ".join(str(error).split())
    if not message or isinstance(error, _BARE):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    print(f"{PROGRAM} {command}: error: {message}", file=sys.stderr)
    return code
