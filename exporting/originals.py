"""Reads a teacher, runs its original by transformers or torchaudio, and proves that the converted one does the same.

Shapes: B batch, N samples, T frames, D width, L layers.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillation.errors import UserError
from distillation.originals import find_bundle, import_bundle, read_settings, refusing
from exporting.verify import TOLERANCE, relative_difference
from wav2vec2.checkpoint import CheckpointError, model_from_state
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.importers import ImportedModel, Vocabulary, import_huggingface, keep_head, naming
from wav2vec2.importers.folder import read_weights
from wav2vec2.model import Wav2Vec2Model

logger = logging.getLogger(__name__)

PROBE_SAMPLES = (64_000, 41_000)  # over 160 frames, so that WavLM's logarithmic position buckets are reached
PROBE_LEVELS = (1.0, 1e-3)  # so quiet that the constant in a waveform's normalisation counts

# Hidden states: feature projection, layers 1..L and the model's output, each [B, T, D], or [T, D] of one utterance;
# and the logits [B, T, V], rows in the order of the converted model, where the output layer is kept.
States = list[Tensor]
Forward = Callable[[list[Tensor]], States]  # of waveforms [N], as one padded batch


def read_huggingface(
    folder: Path, normalize: bool | None, vocabulary: Vocabulary | None = None
) -> tuple[ImportedModel, Wav2Vec2Model]:
    """Convert a transformers model; what is returned computes the same as transformers.

    Args:
        folder: of the model, as :func:`wav2vec2.importers.folder.locate_folder` gives it.
        normalize: the waveform; None for what the model was trained with.
        vocabulary: of the output layer, which is kept then.

    Raises:
        CheckpointError: it is not of this family or does not load.
        UserError: the converted model differs.
    """
    settings, config = read_settings(folder)
    normalize_waveform = settings.normalizes(normalize)
    import transformers

    logger.info("reading %s", folder)
    weights = read_weights(folder)
    with naming(folder):
        imported = import_huggingface(config, weights, normalize_waveform)
        if vocabulary is not None:
            imported = keep_head(imported, weights, "lm_head", vocabulary)
    converted = model_from_state(imported.config, imported.state_dict, source=folder)
    with naming(folder):
        with refusing("transformers cannot load it"):
            kind = transformers.AutoModel if vocabulary is None else transformers.AutoModelForCTC
            original, report = kind.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
        if missing := sorted(key for key in report["missing_keys"] if not key.endswith("masked_spec_embed")):
            raise CheckpointError(f"transformers finds no weights for {', '.join(missing[:3])}")
    original.eval()
    base = original.base_model
    base.adapter = None  # wav2vec 2.0 models for speech translation end in one; dropped with the heads
    # the peer's own preprocessing
    prepare = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize_waveform, return_attention_mask=True)
    modules = [base.feature_projection, *base.encoder.layers]
    rows: slice | list[int] = slice(None)
    if vocabulary is not None:
        modules, rows = [*modules, base], vocabulary.order

    def run(waveforms: list[Tensor]) -> States:
        inputs = prepare([w.numpy() for w in waveforms], sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
        mask = inputs.attention_mask if len(waveforms) > 1 else None
        return capture(modules, lambda: original(inputs.input_values, attention_mask=mask)[0][..., rows])

    logger.info("running the original on %d random waveforms", len(PROBE_SAMPLES))
    with naming(folder), refusing("transformers cannot run it"):
        # With a group norm, transformers lets padding into the statistics of every frame; ours does not.
        expected = run_probe(run, converted, padded=config["feat_extract_norm"] == "layer")
    require_same(expected, converted, str(folder))
    return imported, converted


def read_torchaudio(
    source: str, normalize: bool | None, vocabulary: Vocabulary | None = None
) -> tuple[ImportedModel, Wav2Vec2Model]:
    """Convert a bundle of torchaudio; what is returned computes the same as torchaudio.

    Args:
        source: torchaudio:NAME.
        normalize: the waveform; None for what the model was trained with.
        vocabulary: of the output layer, which is kept then.

    Raises:
        UserError: no such bundle, one for another sample rate, it could not be fetched, or the converted model differs.
    """
    bundle = find_bundle(source)
    try:
        original = bundle.get_model(dl_kwargs={"weights_only": True})
    except OSError as error:
        raise UserError(f"{source} could not be fetched: {error}") from error
    original = getattr(original, "model", original)  # without the wrapper that normalises the waveform
    imported = import_bundle(source, bundle, original.state_dict(), normalize)
    modules = [original.encoder.feature_projection, *original.encoder.transformer.layers]
    rows: slice | list[int] = slice(None)
    if vocabulary is None:
        original.aux = None
    else:
        with naming(source):
            imported = keep_head(imported, original.state_dict(), "aux", vocabulary)
        modules, rows = [*modules, original.encoder], vocabulary.order
    converted = model_from_state(imported.config, imported.state_dict, source=source)

    def run(waveforms: list[Tensor]) -> States:
        (waveform,) = waveforms
        if converted.normalize_waveform:
            waveform = nn.functional.layer_norm(waveform, waveform.shape)
        return capture(modules, lambda: original(waveform[None])[0][..., rows])

    require_same(run_probe(run, converted, padded=False), converted, source)
    return imported, converted


def capture(modules: list[nn.Module], call: Callable[[], Tensor]) -> States:
    """What the modules return during ``call``, and then what ``call`` itself returns."""
    states: States = []

    def keep(module: nn.Module, args: object, output: Any) -> None:
        # Copied: transformers writes zeros over the padding of the feature projection.
        states.append((output if isinstance(output, Tensor) else output[0]).clone())

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        result = call()
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, result]


@torch.no_grad()
def run_probe(run: Forward, converted: Wav2Vec2Model, padded: bool = True) -> tuple[list[States], list[States]]:
    """Hidden states of random waveforms of different lengths run alone, and as one batch if ``padded``, else alone."""
    generator = torch.Generator().manual_seed(0)
    waveforms = [
        level * torch.randn(num_samples, generator=generator)
        for num_samples, level in zip(PROBE_SAMPLES, PROBE_LEVELS, strict=True)
    ]

    def valid(batch: list[Tensor]) -> list[States]:
        states, frames = run(batch), converted.output_length(torch.tensor([len(waveform) for waveform in batch]))
        return [[state[row, :length] for state in states] for row, length in enumerate(frames.tolist())]

    alone = [valid([waveform])[0] for waveform in waveforms]
    return alone, valid(waveforms) if padded else alone


def require_same(expected: tuple[list[States], list[States]], converted: Wav2Vec2Model, source: str) -> None:
    """Print the largest difference of every layer, alone and in a padded batch.

    Args:
        expected: what :func:`run_probe` gives for the original.
        converted: the model to compare.
        source: of the original, for the message.

    Raises:
        UserError: a difference above the limit, or one that is not a number.
    """

    def run(waveforms: list[Tensor]) -> States:
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        inputs = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        states, result = converted.extract_features(inputs, lengths)[0], converted(inputs, lengths)[0]
        if converted.aux is None:
            return [*states, result]
        transformer = converted.encoder.transformer
        return [*states, transformer.layer_norm(states[-1]) if transformer.layer_norm_first else states[-1], result]

    logger.info("running the converted model")
    alone, batched = (
        largest([[a - b for a, b in zip(*states, strict=True)] for states in zip(*utterances, strict=True)])
        for utterances in zip(expected, run_probe(run, converted), strict=True)
    )
    size = largest(expected[0])
    ends = ["output"] if converted.aux is None else ["output", "logits"]
    names = ["feature projection", *(f"layer {i}" for i in range(1, len(alone) - len(ends))), *ends]
    print(f"{'largest difference':<20}{'alone':>9}{'padded batch':>15}{'largest value':>16}")
    for name, *values in zip(names, alone.tolist(), batched.tolist(), size.tolist(), strict=True):
        print("{:<20}{:>9.1e}{:>15.1e}{:>16.1e}".format(name, *values))
    differences = torch.maximum(alone, batched)
    print(f"{'over all layers':<20}{differences.max():>9.1e}")
    wrong = ~(relative_difference(differences, size) <= TOLERANCE)  # also when it is not a number
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise UserError(
            f"{source}: original and converted differ by {differences[first]:.1e} at {names[first]}"
            f" (limit {TOLERANCE:.0e}); not saved"
        )


def largest(utterances: list[States]) -> Tensor:
    """Largest magnitude in each of the states over all utterances; NaN stays NaN."""
    return torch.stack([torch.stack([state.abs().max() for state in states]) for states in utterances]).amax(0)
