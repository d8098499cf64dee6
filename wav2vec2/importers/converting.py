"""What converters do around an importer: recognise the kind of a file; check, save and sum up the model."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wav2vec2.checkpoint import CheckpointError, save_model
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.vocabulary import VOCABULARY

from .distiller import DISTILLER, import_distiller
from .fairseq import import_fairseq
from .mapping import MASK_EMBEDDING, ImportedModel
from .source import SOURCE, Source
from .students import STUDENT, import_student

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint."""

    name: str  # as users know it
    suffix: str  # of the name of the converted file, before .pth
    fits: Callable[[Mapping[Any, Any]], bool]  # whether the content of a file is of this kind
    read: Callable[[Any, Any, bool | None], ImportedModel]  # content, settings, waveform normalisation; None: its own
    has_settings: bool = False  # in a file beside it


def _part(content: Mapping[Any, Any], key: str) -> Iterable[str]:
    """Names in a mapping of the content; none where it is no mapping."""
    return map(str, part) if isinstance(part := content.get(key), Mapping) else ()


def _is_fairseq(content: Mapping[Any, Any], key: str) -> bool:
    return content.get(key) is not None and any(_part(content, "model"))


def _is_unilm(content: Mapping[Any, Any]) -> bool:
    return _is_fairseq(content, "cfg") and "encoder_layers" in _part(content, "cfg")


def _is_distiller(content: Mapping[Any, Any]) -> bool:
    return any(_part(content, DISTILLER)) and "distiller" in _part(content, "Config")


def _read_distiller(content: Any, settings: Any, normalize_waveform: bool | None) -> ImportedModel:
    return import_distiller(content, normalize_waveform)


def _read_fairseq(content: Any, settings: Any, normalize_waveform: bool | None) -> ImportedModel:
    return import_fairseq(content, normalize_waveform)


LAYOUTS = [
    Layout("WavLM of unilm", "fairseq", _is_unilm, _read_fairseq),
    Layout("a model of fairseq, cfg layout", "fairseq", lambda c: _is_fairseq(c, "cfg"), _read_fairseq),
    Layout("a model of fairseq, args layout", "fairseq", lambda c: _is_fairseq(c, "args"), _read_fairseq),
    Layout(
        "a released student (FitHuBERT, ARMHuBERT, MaskHuBERT, STaRHuBERT)", "student",
        lambda c: any(name.startswith(STUDENT) for name in _part(c, "state_dict")), import_student, has_settings=True,
    ),
    Layout("DistilHuBERT of s3prl", "student", _is_distiller, _read_distiller),
]  # fmt: skip


def recognise(content: Any) -> Layout:
    """The kind of a checkpoint that :func:`wav2vec2.importers.load_pickled` read.

    Raises:
        CheckpointError: a model of this toolkit, which needs no conversion, or a kind that is not in ``LAYOUTS``.
    """
    if isinstance(content, Mapping):
        if any(_part(content, "config")) and any(_part(content, "state_dict")):
            raise CheckpointError("a model of this toolkit, it needs no conversion")
        for layout in LAYOUTS:
            if layout.fits(content):
                return layout
    raise CheckpointError(
        f"holds no model of a known kind; accepted are {'; '.join(layout.name for layout in LAYOUTS)}"
    )


def save_imported(out: Path, imported: ImportedModel, model: Wav2Vec2Model, source: Source) -> None:
    """Write a ``.pth`` file that names its source, with mask embedding, vocabulary and distillation heads if any.

    Args:
        out: the file.
        imported: what the source holds.
        model: made of it.
        source: what it was read from.

    Raises:
        CheckpointError: values that are not finite.
    """
    tensors, heads = imported.state_dict.values(), imported.heads.values()
    with torch.no_grad():
        output, _ = model(torch.randn(1, SAMPLE_RATE))
    if not all(tensor.isfinite().all() for tensor in (output, *heads)):
        raise CheckpointError(f"{source}: the converted model gives values that are not finite; nothing saved")
    extra: dict[str, Any] = {} if imported.mask_embedding is None else {MASK_EMBEDDING: imported.mask_embedding}
    texts = {} if imported.vocabulary is None else {VOCABULARY: imported.vocabulary}
    save_model(out, model, imported.heads, **extra, **texts, **{SOURCE: source.entry()})
    num_params, num_head_params = (sum(tensor.numel() for tensor in group) for group in (tensors, heads))
    logger.info(
        "%s: %s parameters and %s in heads, %d layers; %d tensors saved, %d dropped",
        out, f"{num_params:,}", f"{num_head_params:,}", model.num_layers,
        len(tensors) + len(heads) + len(extra), len(imported.dropped),
    )  # fmt: skip
