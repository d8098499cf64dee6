"""Word and character error rates of recognisers."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from distillation.data.loaders import Batch
from distillation.errors import UserError
from distillation.recognition.decoding import Decoder, count_errors
from wav2vec2 import Wav2Vec2Model


@torch.no_grad()
def error_rates(
    model: Wav2Vec2Model, batches: DataLoader[Batch], decoders: Mapping[str, Decoder]
) -> tuple[dict[str, float], dict[str, str]]:
    """Measure a model on transcribed audio; what disturbs a batch is what it hears.

    Args:
        model: with an output layer; eval mode, on its device.
        batches: with labels.
        decoders: by what is put before the names of their rates.

    Returns:
        Rates in percent by name, wer and cer of each decoder; path and reason of each file that cannot be decoded,
        of noise too.

    Raises:
        UserError: none of the files can be decoded.
    """
    device = model.feature_extractor.dummy_weight.device
    counts: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, str] = {}
    seen = 0
    model.eval()
    for batch in tqdm(batches, "decoding", leave=False, disable=None):
        errors |= batch.errors | batch.noise_errors
        if not batch.files:
            continue
        assert batch.labels is not None
        seen += len(batch.files)
        texts, batch = batch.labels.texts, batch.to(device)
        logits, _ = model(batch.waveforms if batch.heard is None else batch.heard, batch.lengths)
        samples = batch.lengths if batch.lengths is not None else torch.full(logits.shape[:1], batch.waveforms.shape[1])
        log_probs, frames = logits.float().log_softmax(-1), model.output_length(samples)
        for prefix, decode in decoders.items():
            for name, (wrong, total) in count_errors(decode(log_probs, frames), texts).items():
                before = counts.get(f"{prefix}{name}", (0, 0))
                counts[f"{prefix}{name}"] = before[0] + wrong, before[1] + total
    if not seen:
        path, reason = next(iter(errors.items()))
        raise UserError(f"none of the {len(errors)} files can be decoded, e.g. {path}: {reason}")
    return {name: 100 * (wrong / total).item() for name, (wrong, total) in counts.items()}, errors
