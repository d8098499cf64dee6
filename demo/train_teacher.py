"""Train the tiny HuBERT teacher that is shipped in ``demo/teacher``.

    python -m demo.train_teacher --corpus DIR --work_dir WORK

1. ``mfcc``: masked prediction of clusters of cepstra, as the first iteration of HuBERT (arXiv 2106.07447).
2. ``hidden``: the same with clusters of a middle layer of stage 1, as its second iteration, on from the same weights.
3. ``supervised``: words and phones per frame. At this size self-supervision alone gives a model whose lower layers
   are as good as its upper ones, with which compression methods cannot be told apart; this makes depth matter.
4. ``probe``: words and phones per frame from every layer, on speakers and sentences not trained on.

An update takes 0.19 s on 2 idle cores that multiply bfloat16, so that all of it is a matter of a quarter of an hour; on
a busy machine it took an hour. A finished training stage leaves ``WORK/<stage>.pt`` and is not run again; one that was
stopped goes on from ``WORK/<stage>.ckpt``, bit for bit.
Shapes: B batch, T frames, L layers, D width.
"""

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm, trange
from transformers import HubertConfig, HubertModel

from demo.corpus import DEV, TRAIN, read_marker
from demo.frame_probe import accuracy, linear_probe
from demo.labels import HOP, IGNORE, WINDOW, FrameLabels, Utterance, read_split
from demo.targets import NUM_CLUSTERS, cepstra, cluster, normalise, phone_information
from demo.teacher_folder import save_teacher
from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from distillation.stopping import Signalled, StopRequest, keeping
from wav2vec2.checkpoint import read_torch_file, write_torch_file

logger = logging.getLogger(__name__)

STAGES = ("mfcc", "hidden", "supervised")
ARCHITECTURE: dict[str, Any] = {
    "conv_dim": [40] * 7,
    "hidden_size": 144,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 576,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 8,
    "initializer_range": 0.04,  # about 0.5 / sqrt(144): HuBERT's 0.02 suits its 768
}
# Of HuBERT Base, for whoever trains on. In this short training only the heads' input is dropped.
DROPOUTS = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "feat_proj_dropout": 0.1, "layerdrop": 0.05}
CHECKPOINT_EVERY = 100  # updates
MASK_SPAN = 10  # frames, as HuBERT
MIDDLE_LAYER = 4
MIN_COUNT = {"words": 40, "phones": 150}  # rarer labels of the training part are not learnt
PROBE_UTTERANCES = 15  # per training speaker


@dataclass(frozen=True)
class TeacherTraining:
    """Settings of the training; the defaults made the shipped teacher.

    Args:
        mfcc_steps: updates of stage mfcc.
        hidden_steps: updates of stage hidden, few because after so short a first stage its clusters are no better.
        supervised_steps: updates of stage supervised.
        batch_size: crops per update.
        crop: frames per crop, 50 per second.
        learning_rate: peak, after a warm-up over 6 % of the steps.
        threads: of torch.
        seed: of weights, clusters and batches.
        min_depth: points of word accuracy by which the best layer must beat layer 0; less is not saved.
    """

    mfcc_steps: int = 1500
    hidden_steps: int = 300
    supervised_steps: int = 2400
    batch_size: int = 16
    crop: int = 128
    learning_rate: float = 1e-3
    threads: int = 2
    seed: int = 0
    min_depth: float = 20.0

    def __post_init__(self):
        for name in (*(f"{stage}_steps" for stage in STAGES), "batch_size", "crop", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be at least 1")

    def recipe(self, stage: str) -> dict:
        """The settings that decide what ``stage`` does to the model it starts from."""
        names = (f"{stage}_steps", "batch_size", "crop", "learning_rate", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass
class Stage:
    """What one training stage predicts: per head one list of labels [T] per utterance, and how the input is masked."""

    targets: list[list[Tensor]]
    num_classes: list[int]
    mask_start_probability: float
    unmasked_weight: float
    """Weight in the loss of a frame that is not masked; masked ones have 1."""


@dataclass
class Batch:
    """Random crops: ``waveforms`` [B, samples], one tensor of ``labels`` [B, T] per head, bool ``mask`` [B, T]."""

    waveforms: Tensor
    labels: list[Tensor]
    mask: Tensor


def autocast() -> torch.autocast:
    """Bfloat16 where the CPU multiplies it in hardware (1.5 to 1.9 times faster), float32 elsewhere."""
    flags = Path("/proc/cpuinfo")
    return torch.autocast("cpu", torch.bfloat16, enabled=flags.is_file() and "avx512_bf16" in flags.read_text())


@torch.no_grad()
def hidden_states(model: HubertModel, utterance: Utterance) -> Tensor:
    """Layers 0 to L of one utterance in eval mode: float32 [L + 1, T, D]."""
    model.eval()
    with autocast():
        return torch.cat(model(utterance.waveform[None], output_hidden_states=True).hidden_states).float()


def draw_batch(utterances: list[Utterance], stage: Stage, settings: TeacherTraining, rng: np.random.Generator) -> Batch:
    """Draw crops at random places of random utterances; short ones are padded with zeros, labelled ``IGNORE``."""
    size, frames = settings.batch_size, settings.crop
    waveforms = torch.zeros(size, (frames - 1) * HOP + WINDOW)
    labels = [torch.full((size, frames), IGNORE) for _ in stage.targets]
    for row, i in enumerate(rng.integers(len(utterances), size=size)):
        first = int(rng.integers(max(1, utterances[i].num_frames - frames + 1)))
        crop = utterances[i].waveform[first * HOP :][: waveforms.shape[1]]
        waveforms[row, : len(crop)] = crop
        for label, target in zip(labels, stage.targets, strict=True):
            part = target[i][first : first + frames]
            label[row, : len(part)] = part
    starts = torch.from_numpy(rng.random((size, frames)) < stage.mask_start_probability)
    mask = starts.clone()
    for shift in range(1, MASK_SPAN):
        mask[:, shift:] |= starts[:, :-shift]
    return Batch(waveforms, labels, mask)


def read_saved(path: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """What a file of an earlier start holds, if there is one.

    Raises:
        UserError: it was made with another recipe.
    """
    if not path.is_file():
        return None
    saved = read_torch_file(path)
    if saved.get("recipe") != recipe:
        raise UserError(f"{path} was made with other settings or another corpus: choose another --work_dir")
    return saved


def kept_clusters(
    path: Path,
    recipe: dict[str, Any],
    features: Callable[[Utterance], Tensor],
    utterances: list[Utterance],
    phones: list[Tensor],
    seed: int,
) -> tuple[list[Tensor], float]:
    """Clusters [T] of every utterance and the information on the ``phones`` [T] in them; both are kept in a file."""
    if (saved := read_saved(path, recipe)) is None:
        clusters = cluster(features, utterances, seed)
        saved = {"recipe": recipe, "clusters": clusters, "information": phone_information(clusters, phones)}
        write_torch_file(path, saved)
    return saved["clusters"], saved["information"]


def train_stage(
    model: HubertModel,
    name: str,
    stage: Stage,
    utterances: list[Utterance],
    settings: TeacherTraining,
    checkpoint: Path,
    recipe: dict[str, Any],
) -> list[dict]:
    """Train ``model`` in place.

    Args:
        model: as the stage finds it; its state in the checkpoint takes its place.
        name: of the stage.
        stage: what is predicted.
        utterances: of the training part.
        settings: of the training.
        checkpoint: to go on from, and to write every so many updates and when a signal asks to stop.
        recipe: what the checkpoint must have been made with.

    Returns:
        Its curve, one row per 100 steps: mean loss, accuracy (%) per head.

    Raises:
        Signalled: a signal asked to stop, and the checkpoint is written.
        UserError: the checkpoint was made with another recipe.
    """
    rng = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    heads = nn.ModuleList(nn.Linear(model.config.hidden_size, num) for num in stage.num_classes)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    steps = settings.recipe(name)[f"{name}_steps"]
    warm_up = 0.06 * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(0.02, (steps - step) / (steps - warm_up)), 1)
    )
    model.train()
    trained = {"model": model, "heads": heads, "optimizer": optimizer, "schedule": schedule}
    first, start = 0, time.monotonic()
    curve: list[dict] = []
    recent: list[list[float]] = []
    if (saved := read_saved(checkpoint, recipe)) is not None:
        for key, part in trained.items():
            part.load_state_dict(saved[key])
        torch.set_rng_state(saved["torch_rng"])
        rng.bit_generator.state = saved["rng"]
        first, curve, recent, start = saved["step"], saved["curve"], saved["recent"], start - saved["seconds"]
    with StopRequest() as stop, trange(first, steps, desc=name, unit="step", initial=first, total=steps) as bar:
        stop.listen()
        for step in bar:
            batch = draw_batch(utterances, stage, settings, rng)
            with autocast():
                hidden = model(batch.waveforms, mask_time_indices=batch.mask).last_hidden_state
                hidden = F.dropout(hidden, 0.1)
                logits = [head(hidden).float() for head in heads]
            weight = torch.where(batch.mask, 1.0, stage.unmasked_weight)
            losses, accuracies = [], []
            for scores, label in zip(logits, batch.labels, strict=True):
                counted = weight * (label != IGNORE)
                each = F.cross_entropy(scores.transpose(1, 2), label, ignore_index=IGNORE, reduction="none")
                losses.append((each * counted).sum() / counted.sum())
                accuracies.append(float(100 * (counted * (scores.argmax(-1) == label)).sum() / counted.sum()))
            loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            recent.append([loss.item(), *accuracies])
            if (step + 1) % 100 == 0 or step + 1 == steps:
                mean_loss, *shares = np.mean(recent, axis=0).round(3).tolist()
                seconds = round(time.monotonic() - start)
                curve.append({"step": step + 1, "loss": mean_loss, "accuracy": shares, "seconds": seconds})
                bar.set_postfix_str(f"loss {mean_loss:.3f}, accuracy {shares}")
                recent.clear()
            if stop.signal or (step + 1) % CHECKPOINT_EVERY == 0:
                progress = {"step": step + 1, "curve": curve, "recent": recent, "seconds": time.monotonic() - start}
                states = {key: part.state_dict() for key, part in trained.items()}
                rngs = {"torch_rng": torch.get_rng_state(), "rng": rng.bit_generator.state}
                write_torch_file(checkpoint, {"recipe": recipe, **progress, **states, **rngs})
            if stop.signal:
                raise Signalled(signal.Signals[stop.signal])
    return curve


def probe_layers(
    model: HubertModel, train: list[Utterance], dev: list[Utterance], labels: dict[str, FrameLabels]
) -> dict[str, list[float]]:
    """Accuracy per frame (%) of linear probes on layers 0 to L, by kind of label, silence left out.

    The probes are fitted on ``train`` and tested on ``dev``.
    """
    of_train, of_dev = (
        torch.cat([hidden_states(model, u).half() for u in tqdm(some, desc="layers", unit="utt", leave=False)], dim=1)
        for some in (train, dev)
    )
    scores = {}
    for kind, label in labels.items():
        fitted, expected = (torch.cat([label(utterance) for utterance in some]) for some in (train, dev))
        silence = 0 if kind == "phones" else IGNORE
        predictions = (linear_probe(x, fitted, y, len(label)) for x, y in zip(of_train, of_dev, strict=True))
        scores[kind] = [round(accuracy(found, expected, without=silence), 1) for found in predictions]
    return scores


def train_teacher(corpus: Path, work_dir: Path, out: Path, settings: TeacherTraining) -> dict:
    """Run the stages that have left no file in ``work_dir``, write the teacher to ``out`` and return its log.

    Raises:
        Stopped: a signal asked for it.
        UserError: there is no corpus, ``work_dir`` comes from other settings, or the teacher lacks depth.
    """
    with keeping(f"the finished stages and the state of the one in training are in {work_dir}"):
        return _train_teacher(corpus, work_dir, out, settings)


def _train_teacher(corpus: Path, work_dir: Path, out: Path, settings: TeacherTraining) -> dict:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    marker = read_marker(corpus)
    train, dev = read_split(corpus, TRAIN), read_split(corpus, DEV)
    labels = {kind: FrameLabels(train, kind, min_count) for kind, min_count in MIN_COUNT.items()}
    for kind, label in labels.items():
        if len(label) < 2:
            raise UserError(
                f"{corpus} is too small: it needs {kind} that occur {MIN_COUNT[kind]} times; make a larger one"
            )
    targets = {kind: [label(utterance) for utterance in train] for kind, label in labels.items()}
    no_dropout: dict[str, Any] = dict.fromkeys((*DROPOUTS, "activation_dropout"), 0.0)
    model = HubertModel(HubertConfig(**ARCHITECTURE, **no_dropout))
    features: dict[str, Callable[[Utterance], Tensor]] = {
        "mfcc": cepstra,
        "hidden": lambda utterance: normalise(hidden_states(model, utterance)[MIDDLE_LAYER]),
    }

    stages = {}
    for name in STAGES:
        path, checkpoint, kept = (work_dir / f"{name}{end}" for end in (".pt", ".ckpt", ".clusters"))
        recipe = {**settings.recipe(name), "corpus": marker["settings"]}
        saved = read_saved(path, recipe)
        if saved is None:
            information = None
            if name in features:
                clusters, information = kept_clusters(
                    kept, recipe, features[name], train, targets["phones"], settings.seed
                )
                logger.info("%s: the clusters hold %.3f of the information on the phones", name, information)
                stage = Stage([clusters], [NUM_CLUSTERS], mask_start_probability=0.08, unmasked_weight=0.05)
            else:
                sizes = [len(label) for label in labels.values()]
                stage = Stage(list(targets.values()), sizes, mask_start_probability=0.03, unmasked_weight=1.0)
            curve = train_stage(model, name, stage, train, settings, checkpoint, recipe)
            log = {"phone_information": information, "curve": curve}
            saved = {"recipe": recipe, "model": model.state_dict(), "log": log}
            write_torch_file(path, saved)
        for leftover in (checkpoint, kept):
            leftover.unlink(missing_ok=True)
        model.load_state_dict(saved["model"])
        stages[name] = {**settings.recipe(name), **saved["log"]}
        logger.info("%s: %s", name, saved["log"]["curve"][-1])

    taken: dict[int, list[Utterance]] = {}
    for utterance in train:
        taken.setdefault(utterance.speaker, []).append(utterance)
    probed = [utterance for some in taken.values() for utterance in some[:PROBE_UTTERANCES]]
    scores = probe_layers(model, probed, dev, labels)
    classes = {kind: len(label) for kind, label in labels.items()}
    logger.info("words per layer %s, phones per layer %s", scores["words"], scores["phones"])
    depth = max(scores["words"]) - scores["words"][0]
    if depth < settings.min_depth:
        raise UserError(
            f"the best layer beats layer 0 by {depth:.1f} points of word accuracy, less than --min_depth"
            f" {settings.min_depth}: nothing saved; train longer, --supervised_steps above all"
        )
    for name, value in DROPOUTS.items():
        setattr(model.config, name, value)
    return save_teacher(model, out, {"corpus": marker, "stages": stages, "classes": classes, "accuracy": scores})


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by demo.corpus")
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the files of finished stages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "teacher", help="folder of the teacher")
    parser.add_class_arguments(TeacherTraining)
    options = vars(parse_arguments(parser))
    corpus, work_dir, out = (options.pop(name) for name in ("corpus", "work_dir", "out"))
    train_teacher(corpus, work_dir, out, TeacherTraining(**options))


if __name__ == "__main__":
    main()
