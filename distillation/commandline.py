"""Command lines: help that keeps the lines of a script's docstring, and mistakes in one line."""

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

import jsonargparse

from distillation.errors import UserError, command

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's types and defaults under a description as it was written."""


def make_parser(description: str | None, **settings: Any) -> jsonargparse.ArgumentParser:
    """Parser for :func:`parse_arguments`.

    Args:
        description: docstring of the script.
        settings: of ``jsonargparse.ArgumentParser``.
    """
    return jsonargparse.ArgumentParser(
        description=description, formatter_class=_HelpFormatter, exit_on_error=False, **settings
    )


def add_continue_flag(parser: jsonargparse.ArgumentParser) -> None:
    """The flag of all commands that train."""
    text = "Go on with a run although its length or rates, or the recipe that made its student, are others now."
    parser.add_argument("--continue_with_changes", action="store_true", help=text)


def parse_arguments(parser: jsonargparse.ArgumentParser, argv: list[str] | None = None) -> jsonargparse.Namespace:
    """Parse a command line.

    Args:
        parser: of :func:`make_parser`.
        argv: the words after the program's name; by default those that it was started with.

    Raises:
        UserError: an unknown flag or key, or a value that does not fit.
    """
    try:
        return parser.parse_args(sys.argv[1:] if argv is None else argv)
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise UserError(one_line(error)) from None


def command_of(function: Callable[..., object], description: str | None) -> Callable[[], None]:
    """The ``main`` of a command whose flags are the arguments of a function.

    Args:
        function: its signature and docstring say all of the flags.
        description: docstring of the script.
    """

    @command
    def main() -> None:
        parser = make_parser(description)
        parser.add_function_arguments(function, as_group=False, as_positional=False)
        function(**vars(parse_arguments(parser)))

    return main


def one_line(error: BaseException) -> str:
    """What an error of the parser or of a file says, without line breaks."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    message = " ".join(str(error).split())
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))  # of a section, and of the setting in it
    choices = re.search(r"Expected an? typing\.Literal\[([^]]+)\]", message)
    given = re.search(r"(?:Got|Given) value: (\S+)", message)
    if key and choices and given:
        valid = choices[1].replace("'", "")
        null = ", null" if "Subtypes: [typing.Literal" in message.rpartition("Parser key")[2] else ""
        return f"{key} is {given[1]}: it must be one of {valid}{null}"
    # an optional section fails as a union of types: keep the key and the reason
    reason = re.search(r"Option '[^']+' is not accepted|Expected an? <class '[^']+'>[^-]*", message)
    return f"{key}: {reason[0].strip()}" if key and reason else message
