"""Packages of other formats: whether they are there, and silence while they work."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from distillation.errors import UserError


def require_packages(to: str, *names: str, requirements: str = "requirements/export.txt") -> None:
    """Refuse what cannot be written here.

    Args:
        to: the format.
        names: of the modules that it needs.
        requirements: the list that installs them.

    Raises:
        UserError: one cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"--to {to} needs the package {name.partition('.')[0]}: pip install -r {requirements}"
            ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what exporters log of their own doings: what a user must know is logged here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
