"""YAML files of users and of other projects, read without running or unfolding what they hold."""

from pathlib import Path
from typing import Any

import yaml

from distillation.errors import UserError


def read_yaml(path: Path, max_bytes: int, what: str, aliases: bool = True) -> Any:
    """Content of a YAML file in plain types.

    Args:
        path: the file, in UTF-8.
        max_bytes: the most that it may have.
        what: a file of that size is not, for the message.
        aliases: whether it may have aliases, which can make a small file unfold to any size; released students' have
            none.

    Raises:
        UserError: no such file, too large a file, not YAML, or YAML with objects or unwanted aliases in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > max_bytes:
        raise UserError(f"{path}: over {max_bytes} bytes, not {what}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
        refused = not aliases and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
        content = None if refused else yaml.safe_load(text)
    except Exception as error:  # PyYAML's constructors fail in many ways
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if refused:
        raise UserError(f"{path}: has YAML aliases, which the released files have not; refused")
    return content
