"""What is said in the files of lists, as JSON lines beside these: NAME.jsonl for NAME.tsv, as NeMo writes them."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillation.data.conversion import copies_of
from distillation.data.manifest import Manifest, write_lines
from distillation.errors import UserError
from distillation.recognition.manifests import KEYS, find_sources, read_rows

logger = logging.getLogger("prepare_data")


def write_transcripts(
    source: Path, lists: Mapping[str, Manifest], out: Path, convert: Path | None, sample_rate: int
) -> None:
    """Write JSON lines for every list.

    Args:
        source: file or folder that says what is spoken, as for ``find_sources``.
        lists: of audio, by the name of their files.
        out: folder of the lists.
        convert: folder of copies, where some were made.
        sample_rate: of the audio, in Hz.

    Raises:
        UserError: nothing is known about the files of a list.
    """
    audio = convert if convert is not None and copies_of(convert) is not None else None
    said: dict[str, dict[tuple[float, float | None], str]] = {}  # by file; some corpora list an utterance several times
    for each in find_sources(source):
        for row in read_rows(each, audio):
            if row.fault is None:
                said.setdefault(os.path.realpath(row.path), {}).setdefault((row.start, row.end), row.text)
    for name, manifest in lists.items():
        entries: list[dict[str, Any]] = []
        unknown = []
        for index, num_frames in enumerate(manifest.num_frames.tolist()):
            path = manifest.file(index)
            texts = said.get(os.path.realpath(path), {})
            unknown += [path] if not texts else []
            for (start, end), text in texts.items():
                duration = (num_frames / sample_rate if end is None else end) - start
                values = str(path), text, *([start] if start else []), duration
                keys = (*KEYS[:2], *(KEYS[2:] if start else KEYS[3:]))
                entries.append(dict(zip(keys, values, strict=True)))
        if not entries:
            raise UserError(f"{source}: says nothing about the {len(manifest)} files of {name}, e.g. {unknown[0]}")
        if unknown:
            of = source, len(unknown), len(manifest), name, unknown[0]
            logger.warning("%s: says nothing about %d of the %d files of %s, e.g. %s", *of)
        path = (out / name).with_suffix(".jsonl")
        write_lines(path, (json.dumps(entry, ensure_ascii=False) for entry in entries))
        logger.info("%s: %d transcribed utterances", path, len(entries))
