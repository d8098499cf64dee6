"""Train the tiny HuBERT teacher that is shipped in ``benchmarks/minisuperb/teacher``.

    python -m benchmarks.minisuperb.train_teacher --corpus DIR --work_dir WORK [--out FOLDER]

1. ``mfcc``: masked prediction of k-means clusters of cepstra, as the first iteration of HuBERT (arXiv 2106.07447).
2. ``hidden``: the same with clusters of a middle layer of stage 1, the second iteration.
3. ``supervised``: words and phones per frame. At this size self-supervision alone gives a model whose lower layers
   are as good as its upper ones, with which compression methods cannot be told apart; fine-tuning makes depth matter.
4. ``probe``: words and phones per frame from every layer, by linear probes on speakers and sentences not trained on.

Every finished stage leaves ``WORK/<stage>.pt`` and is not run again. Shape legend: B batch, T frames, D width, C classes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torchaudio
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm, trange
from transformers import HubertConfig, HubertModel

from benchmarks.minisuperb.corpus import DEV, MARKER, SAMPLE_RATE, TRAIN
from benchmarks.minisuperb.frame_probe import accuracy, linear_probe
from benchmarks.minisuperb.labels import HOP, IGNORE, WINDOW, FrameLabels, Utterance, read_split
from distillation.errors import UserError, command

logger = logging.getLogger(__name__)

ARCHITECTURE = {
    "conv_dim": [40] * 7,
    "hidden_size": 144,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 576,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 8,
    "initializer_range": 0.04,  # about 0.5 / sqrt(144): HuBERT's 0.02 suits its 768
}
TRAINING_DROPOUT = 0.1
"""On the heads' input only: a small model in a short training has no use for dropout inside."""
MASK_SPAN = 10
NUM_CLUSTERS = 100
MIDDLE_LAYER = 4


@dataclass(frozen=True)
class TeacherTraining:
    """Settings of the training. Steps are updates of ``batch_size`` crops of ``crop`` frames."""

    mfcc_steps: int = 1500
    hidden_steps: int = 2000
    supervised_steps: int = 3000
    batch_size: int = 16
    crop: int = 128
    """Frames per crop: 2.56 s, the length of a short sentence."""
    learning_rate: float = 1e-3
    threads: int = 2
    seed: int = 0


@dataclass
class Stage:
    """One training stage: per head one list of labels [T] per utterance, and how the input is masked."""

    name: str
    steps: int
    targets: list[list[Tensor]]
    num_classes: list[int]
    mask_start_probability: float
    unmasked_weight: float
    """Weight in the loss of a frame that is not masked; masked ones have 1."""


def autocast() -> torch.autocast:
    """Bfloat16 where the CPU multiplies it in hardware (1.5 to 1.9 times faster), float32 elsewhere."""
    flags = Path("/proc/cpuinfo")
    enabled = flags.is_file() and "avx512_bf16" in flags.read_text()
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def cepstra(utterance: Utterance) -> Tensor:
    """13 cepstra with a noise floor, normalised per utterance, of the frame and its two neighbours: [T, 39].

    Without the floor and the normalisation the clusters describe speakers and background noise (measured: the
    mutual information with the phones is 0.315 without, 0.361 with).
    """
    mel = torchaudio.compliance.kaldi.fbank(
        utterance.waveform[None], num_mel_bins=40, frame_shift=1000 * HOP / SAMPLE_RATE, window_type="hanning"
    ).exp()
    floor = 4 * mel.quantile(0.1, dim=0)
    log_mel = torch.log((mel - 0.3 * floor).clamp_min(0) + floor)
    values = log_mel @ torchaudio.functional.create_dct(13, 40, norm=None)
    values = (values - values.mean(0)) / (values.std(0) + 1e-5)
    padded = F.pad(values.T, (1, 1), mode="replicate").T
    return torch.cat([padded[:-2], padded[1:-1], padded[2:]], dim=1)


@torch.no_grad()
def hidden_states(model: HubertModel, utterance: Utterance) -> Tensor:
    """Layers 0 to L of one utterance: float32 [L + 1, T, D]."""
    model.eval()
    with autocast():
        states = model(utterance.waveform[None], output_hidden_states=True).hidden_states
    return torch.cat(states).float()


def cluster(features: Callable[[Utterance], Tensor], utterances: list[Utterance], seed: int) -> list[Tensor]:
    """K-means clusters of the ``features`` [T, D] of every utterance: int64 [T] each."""
    values = [features(utterance) for utterance in tqdm(utterances, desc="features", unit="utt", leave=False)]
    stacked = torch.cat(values)
    stacked = ((stacked - stacked.mean(0)) / (stacked.std(0) + 1e-5)).numpy()
    some = np.random.default_rng(seed).permutation(len(stacked))[:150_000]
    kmeans = MiniBatchKMeans(NUM_CLUSTERS, batch_size=10_000, n_init=3, max_iter=60, random_state=seed)
    clusters = torch.from_numpy(kmeans.fit(stacked[some]).predict(stacked)).long()
    return list(clusters.split([len(value) for value in values]))


def phone_information(clusters: list[Tensor], phones: list[Tensor]) -> float:
    """Mutual information of clusters and phones over the entropy of the phones, 0 to 1."""
    cluster_of, phone_of = torch.cat(clusters), torch.cat(phones)
    known = phone_of != IGNORE
    joint = torch.zeros(NUM_CLUSTERS, int(phone_of.max()) + 1, dtype=torch.float64)
    joint.index_put_((cluster_of[known], phone_of[known]), torch.ones((), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    phone = joint.sum(0)
    independent = joint.sum(1, keepdim=True) * phone
    information = torch.where(joint > 0, joint * (joint / independent).log(), 0).nansum()
    return float(information / -(phone[phone > 0] * phone[phone > 0].log()).sum())


def draw_batch(utterances: list[Utterance], stage: Stage, settings: TeacherTraining, rng: np.random.Generator):
    """Random crops: waveforms [B, samples], one label tensor [B, T] per head, mask [B, T]; padding is unlabelled."""
    size, frames = settings.batch_size, settings.crop
    waveforms = torch.zeros(size, (frames - 1) * HOP + WINDOW)
    labels = [torch.full((size, frames), IGNORE) for _ in stage.targets]
    for row, i in enumerate(rng.integers(len(utterances), size=size)):
        first = int(rng.integers(max(1, utterances[i].num_frames - frames + 1)))
        audio = utterances[i].audio[first * HOP : first * HOP + waveforms.shape[1]]
        waveforms[row, : len(audio)] = audio.float() / 32768
        for label, target in zip(labels, stage.targets, strict=True):
            part = target[i][first : first + frames]
            label[row, : len(part)] = part
    starts = torch.from_numpy(rng.random((size, frames)) < stage.mask_start_probability)
    mask = starts.clone()
    for shift in range(1, MASK_SPAN):
        mask[:, shift:] |= starts[:, :-shift]
    return waveforms, labels, mask


def train_stage(model: HubertModel, utterances: list[Utterance], stage: Stage, settings: TeacherTraining) -> list[dict]:
    """Train ``model`` in place and return its log, one row per 100 steps: mean loss, accuracy (%) per head."""
    rng = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    heads = nn.ModuleList(nn.Linear(model.config.hidden_size, num) for num in stage.num_classes)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warm_up = 0.06 * stage.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(0.02, (stage.steps - step) / (stage.steps - warm_up)), 1)
    )
    model.train()
    log, window, start = [], [], time.monotonic()
    with trange(stage.steps, desc=stage.name, unit="step") as bar:
        for step in bar:
            waveforms, labels, mask = draw_batch(utterances, stage, settings, rng)
            with autocast():
                hidden = model(waveforms, mask_time_indices=mask).last_hidden_state
                hidden = F.dropout(hidden, TRAINING_DROPOUT)
                logits = [head(hidden).float() for head in heads]
            weight = torch.where(mask, 1.0, stage.unmasked_weight)
            losses, right = [], []
            for scores, label in zip(logits, labels, strict=True):
                each = F.cross_entropy(scores.transpose(1, 2), label, ignore_index=IGNORE, reduction="none")
                counted = weight * (label != IGNORE)
                losses.append((each * counted).sum() / counted.sum())
                right.append(100 * float((counted * (scores.argmax(-1) == label)).sum() / counted.sum()))
            loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            window.append([loss.item(), *right])
            if (step + 1) % 100 == 0 or step + 1 == stage.steps:
                mean, *shares = np.mean(window, axis=0).round(3).tolist()
                seconds = round(time.monotonic() - start)
                log.append({"step": step + 1, "loss": mean, "accuracy": shares, "seconds": seconds})
                bar.set_postfix_str(f"loss {mean:.3f}, accuracy {shares}")
                window.clear()
    return log


def probe_layers(
    model: HubertModel, train: list[Utterance], dev: list[Utterance], labels: dict[str, FrameLabels]
) -> dict[str, list[float]]:
    """Frame accuracy (%) of a linear probe per layer and label kind, fitted on ``train``, measured on ``dev``."""
    features = [
        torch.cat([hidden_states(model, u).half() for u in tqdm(some, desc="layers", unit="utt", leave=False)], dim=1)
        for some in (train, dev)
    ]
    result = {}
    for kind, label in labels.items():
        fitted, held_out = (torch.cat([label(u) for u in some]) for some in (train, dev))
        silence = 0 if kind == "phones" else IGNORE
        result[kind] = [
            round(accuracy(linear_probe(x, fitted, y, len(label)), held_out, without=silence), 1)
            for x, y in zip(*features, strict=True)
        ]
    return result


def probe_subset(utterances: list[Utterance], per_speaker: int) -> list[Utterance]:
    """The first ``per_speaker`` utterances of every speaker."""
    seen: dict[int, int] = {}
    return [u for u in utterances if seen.setdefault(u.speaker, 0) < per_speaker and not seen.update({u.speaker: seen[u.speaker] + 1})]


def train_teacher(corpus: Path, work_dir: Path, out: Path, settings: TeacherTraining) -> dict:
    """Run every stage that has not left its file in ``work_dir``, then write the teacher to ``out``; return its log."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    work_dir.mkdir(parents=True, exist_ok=True)
    train, dev = read_split(corpus, TRAIN), read_split(corpus, DEV)
    labels = {"words": FrameLabels(train, "words", 40), "phones": FrameLabels(train, "phones", 150)}
    phones = [labels["phones"](utterance) for utterance in train]
    dropouts = dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"), 0.0)
    model = HubertModel(HubertConfig(**ARCHITECTURE, **dropouts, activation_dropout=0.0))

    def mfcc() -> Stage:
        return self_supervised("mfcc", settings.mfcc_steps, cepstra)

    def hidden() -> Stage:
        return self_supervised("hidden", settings.hidden_steps, lambda u: normalise(hidden_states(model, u)[MIDDLE_LAYER]))

    def normalise(values: Tensor) -> Tensor:
        return (values - values.mean(0)) / (values.std(0) + 1e-5)

    def self_supervised(name: str, steps: int, features: Callable[[Utterance], Tensor]) -> Stage:
        clusters = cluster(features, train, settings.seed)
        logger.info("%s: clusters hold %.3f of the phones' information", name, phone_information(clusters, phones))
        return Stage(name, steps, [clusters], [NUM_CLUSTERS], 0.08, 0.05)

    def supervised() -> Stage:
        targets = [[label(utterance) for utterance in train] for label in labels.values()]
        sizes = [len(label) for label in labels.values()]
        return Stage("supervised", settings.supervised_steps, targets, sizes, 0.03, 1.0)

    logs = {}
    for make_stage in (mfcc, hidden, supervised):
        path = work_dir / f"{make_stage.__name__}.pt"
        if path.is_file():
            saved = torch.load(path, weights_only=True)
            model.load_state_dict(saved["model"])
        else:
            log = train_stage(model, train, make_stage(), settings)
            saved = {"settings": asdict(settings), "model": model.state_dict(), "log": log}
            torch.save(saved, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        logs[path.stem] = saved["log"]
        logger.info("%s: %s", path.stem, saved["log"][-1])
    scores = probe_layers(model, probe_subset(train, 15), dev, labels)
    return scores


@command
def main() -> None:
    """Command line of ``train_teacher``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by benchmarks.minisuperb.corpus")
    parser.add_argument("--work_dir", type=Path, required=True, help="files of finished stages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "teacher", help="folder of the teacher")
    for name, value in asdict(TeacherTraining()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    settings = vars(parser.parse_args())
    paths = [settings.pop(name) for name in ("corpus", "work_dir", "out")]
    print(train_teacher(*paths, TeacherTraining(**settings)))


if __name__ == "__main__":
    main()
