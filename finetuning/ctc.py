"""CTC training of a compressed model with an output layer over characters.

Shapes: B batch, T frames, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.text import CharErrorRate, WordErrorRate
from tqdm import tqdm

from distillation.optimisation import lr_factor
from distillation.training.progress import SavingBar
from distillation.training.record import RUN
from distillation.training.standing import Standing
from distillation.training.step import seed_micro_batch
from finetuning.batches import Batch
from finetuning.config import FinetuneConfig
from finetuning.decoding import Decoder, greedy_decoder
from wav2vec2 import Wav2Vec2Model, wav2vec2_model

RATES = ("valid/wer", "valid/cer")


def with_output_layer(model: Wav2Vec2Model, vocabulary: list[str]) -> Wav2Vec2Model:
    """The same network, dense, with a new output layer."""
    result = wav2vec2_model(**{**model.config, "aux_num_out": len(vocabulary)})
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("aux.")}
    missing, unexpected = result.load_state_dict(state, strict=False)
    assert set(missing) == {"aux.weight", "aux.bias"} and not unexpected
    return result


def head_frames(model: Wav2Vec2Model, num_samples: Tensor) -> Tensor:
    """Frames [B] in which the output layer can write a character, from samples [B].

    A model that merges frames repeats its last state for all of them: they hold one character together.
    """
    frames, merged = model.output_length(num_samples), model.encoder.transformer.reduction
    return (frames // merged).maximum(frames.clamp(max=1))


class CTCModule(pl.LightningModule):
    """Trains the output layer, then everything above the convolutions.

    It is measured by error rates alone, over the whole validation set: what is said too fast to be written counts too.

    Args:
        model: what to fine-tune; its output layer, if any, is replaced.
        vocabulary: blank first.
        config: rates and lengths.
        run: where the run stands, and what it is.
        seed: of dropout, a function of it and the update: a resumed run repeats nothing.
    """

    def __init__(
        self, model: Wav2Vec2Model, vocabulary: list[str], config: FinetuneConfig, run: Standing, seed: int = 0
    ) -> None:
        super().__init__()
        self.seed, self.run = seed, run
        self.model, self.vocabulary, self.config = with_output_layer(model, vocabulary), vocabulary, config
        self.model.feature_extractor.requires_grad_(config.train_extractor)
        self.model.feature_extractor.dummy_weight.requires_grad_(False)
        self.decode = greedy_decoder(vocabulary)
        self.wer, self.cer = WordErrorRate(), CharErrorRate()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a batch."""
        return batch.to(device)

    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, T, V] in float32, and valid frames [B]."""
        logits, frames = self.model(batch.waveforms, batch.lengths)
        assert frames is not None
        return F.log_softmax(logits, -1, dtype=torch.float32), frames

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean CTC loss per utterance, each divided by its characters; infinite for what is not learnable.

        A batch of which nothing could be decoded makes an update without gradients, which changes nothing: a resumed
        run counts the batches by the updates.
        """
        if not batch.texts:
            return torch.zeros((), device=self.device, requires_grad=True)
        seed_micro_batch(self.seed, self.global_step)
        self.model.encoder.requires_grad_(self.global_step >= self.config.freeze_steps)  # AdamW skips what has none
        log_probs, frames = self.log_probs(batch)
        loss = F.ctc_loss(log_probs.transpose(0, 1), batch.labels, frames, batch.label_lengths, blank=0)
        self.log("train/loss", loss, batch_size=len(batch.texts))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Decode greedily."""
        if not batch.texts:
            return
        texts = self.decode(*self.log_probs(batch))
        self.wer.update(texts, batch.texts)
        self.cer.update(texts, batch.texts)

    def on_validation_epoch_end(self) -> None:
        """Log the error rates over the whole set in percent."""
        for name, metric in zip(RATES, (self.wer, self.cer)):
            self.log(name, 100 * metric.compute())
            metric.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the run is."""
        checkpoint[RUN] = self.run.entry(self.global_step)

    def configure_optimizers(self) -> Any:
        """AdamW with a rate for the Transformer, which rises after the freeze, and one for the output layer."""
        config, model = self.config, self.model
        assert model.aux is not None
        head = list(model.aux.parameters())
        ids = {id(parameter) for parameter in head}
        body = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
        groups = [{"params": body, "lr": config.lr}, {"params": head, "lr": config.head_lr}]
        left = config.max_steps - config.freeze_steps

        def body_factor(step: int) -> float:
            step -= config.freeze_steps
            return 0.0 if step < 0 else lr_factor(step, round(config.warmup_ratio * left), left, "linear")

        def head_factor(step: int) -> float:
            return lr_factor(step, 0, config.max_steps, "linear")

        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        scheduler = LambdaLR(optimizer, [body_factor, head_factor])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class RatesBar(SavingBar):
    """Progress over updates, with the error rates of the last validation beside it."""

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Show the error rates."""
        assert self.bar is not None
        rates = {name.removeprefix("valid/"): f"{trainer.callback_metrics[name]:.1f} %" for name in RATES}
        self.bar.set_postfix(rates)
        super().on_validation_end(trainer, module)


@torch.no_grad()
def error_rates(
    module: CTCModule, batches: Iterable[Batch], decode: Decoder, note: Callable[[Batch], None]
) -> tuple[float, float]:
    """Word and character error rate in percent; ``note`` sees every batch first."""
    module.eval()
    wer, cer = WordErrorRate(), CharErrorRate()
    for batch in tqdm(batches, "decoding", leave=False, disable=None):
        note(batch)
        if not batch.texts:
            continue
        texts = decode(*module.log_probs(batch.to(module.device)))
        wer.update(texts, batch.texts)
        cer.update(texts, batch.texts)
    return 100 * wer.compute().item(), 100 * cer.compute().item()
