"""Where a model comes from: a file, a folder in the layout of transformers, or either on the Hugging Face hub."""

from pathlib import Path, PurePosixPath

SUFFIXES = (".pth", ".safetensors")
FOLDER_FILES = ("config.json", "model.safetensors")


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The local file or folder of ``source``, downloaded if it is a hub id and not in the cache yet.

    Args:
        source: a path; or "owner/name", a repository with ``config.json`` and ``model.safetensors``; or
            "owner/name/file.pth" (``.safetensors`` as well), one file of a repository. What exists as a path is a path.
        revision: branch, tag or commit on the hub; None for its main branch.

    Raises:
        ValueError: neither a path nor a hub id, ``huggingface_hub`` is missing, or the download fails.
    """
    path = Path(source)
    if path.exists():
        return path
    parts = PurePosixPath(source).parts
    is_file = len(parts) > 2 and parts[-1].endswith(SUFFIXES)
    is_repository = len(parts) == 2 and not parts[-1].endswith(SUFFIXES)
    if isinstance(source, Path) or not (is_file or is_repository) or parts[0] in ("/", ".", "..", "~"):
        raise ValueError(f"{source}: no such file")
    names = ["/".join(parts[2:])] if is_file else list(FOLDER_FILES)
    try:
        files = [download("/".join(parts[:2]), name, revision) for name in names]
    except ImportError:
        raise ValueError(f"{source}: no such file; to load it from the hub, pip install huggingface_hub") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no such file, and the hub does not give it: {error}") from None
    return files[0] if is_file else files[0].parent


def download(repository: str, name: str, revision: str | None = None) -> Path:
    """One file of a repository on the hub, from the cache if it is there.

    Raises:
        ImportError: ``huggingface_hub`` is missing.
        FileNotFoundError: the repository has no such file; or the cache, where the hub cannot be asked.
        ValueError: any other reason, in one line.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except Exception as error:  # network, permissions, no such repository, an id that is none: many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise (FileNotFoundError if isinstance(error, EntryNotFoundError) else ValueError)(reason) from None
