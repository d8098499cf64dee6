"""mini-SUPERB: what a compressed model still knows, on synthetic speech, without a network, in minutes on a CPU.

    scripts/demo.sh demo_out
    python -m benchmarks.compare_methods --demo demo_out --seeds 5
    python -m benchmarks.minisuperb.evaluate --demo demo_out                     # all runs of the comparison
    python -m benchmarks.minisuperb.evaluate --demo demo_out --models my.pth     # or any model, beside the controls

Linear probes on a learnt weighted sum of frozen layers, fitted on 40 speakers, tested on 30 others and on sentences
that neither the teacher's nor the students' training contains:

- words: the word said in each frame. The headline: it needs context, so depth shows;
- phones: the phone of each frame;
- keywords: one isolated word, from the mean over its frames;
- ABX: words across speakers, nothing trained (abx.py); an error, in the layer best on other speakers;
- speakers: from the mean over frames; only as a share of the teacher's accuracy, since filter banks solve it.

Controls, always shown: filter banks, the teacher's shape with random weights, the teacher's layer 0, and the uniform
slices among the compared methods. Intervals: 95 %, bootstrap over test speakers and over seeds. What is measured is
kept, of a model beside it, of the controls in OUT/controls.jsonl: run again, it goes on.
"""

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.minisuperb.abx import abx_right, draw_triples
from benchmarks.minisuperb.score_plot import draw
from benchmarks.plots import write
from benchmarks.runs import finals_in, used_params
from demo.corpus import DEV, TRAIN, CorpusSettings, make_corpus, read_marker, training_sentences
from demo.frame_probe import linear_probe
from demo.labels import HOP, IGNORE, FrameLabels, Utterance, read_split
from distillation.commandline import command_of
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.stopping import keeping
from evaluation.tables import markdown_table
from wav2vec2 import load_model, wav2vec2_model
from wav2vec2.checkpoint import fingerprint, write_text
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)

# another seed than the training corpora: other voices, other recordings, other sentences
CORPUS = CorpusSettings(train_utterances=20, dev_speakers=30, dev_utterances=20, seed=1)
MIN_COUNT = {"words": 8, "phones": 30}  # rarer labels of the training part are not asked for
STRENGTHS = (1e-4, 0.1, 1.0)
NUM_CHOOSING = 6  # training speakers that choose the strength of the regularisation and the layer of ABX
NUM_TRIPLES = 2000
BATCH_SECONDS = 60.0
TASKS = ("words", "phones", "keywords", "ABX", "speakers")
Counts = dict[str, dict[str, list[float]]]
"""Per task and test speaker: how many were right, of how many."""


@dataclass
class Data:
    """The corpus in memory: utterances that fit probes (``train``) and test them (``test``), and isolated words."""

    train: list[Utterance]
    test: list[Utterance]
    keywords: list[Utterance]
    labels: dict[str, FrameLabels]

    @property
    def choosing(self) -> set[int]:
        """Training speakers that choose and do not fit."""
        return set(sorted({u.speaker for u in self.train})[-NUM_CHOOSING:])


class Features:
    """Frozen features of utterances, float16 [T, K, D] each.

    Args:
        extract: ``extract_features`` of a model, or what has its signature; None for filter banks.
        num_layers: of its layers; None for all, 0 for the Transformer's input alone.
    """

    def __init__(self, extract: Callable[..., Any] | None, num_layers: int | None = None) -> None:
        self.extract, self.num_layers = extract, num_layers

    def __call__(self, utterances: list[Utterance]) -> list[Tensor]:
        """In the order of the utterances."""
        if self.extract is None:
            return [filter_banks(u) for u in utterances]
        found: dict[int, Tensor] = {}
        batch: list[int] = []
        order = sorted(range(len(utterances)), key=lambda i: len(utterances[i].audio))
        for i in order:
            batch.append(i)
            longest = len(utterances[i].audio)
            if i == order[-1] or longest * (len(batch) + 1) > BATCH_SECONDS * SAMPLE_RATE:
                found.update(zip(batch, self._batch([utterances[j] for j in batch])))
                batch = []
        return [found[i] for i in range(len(utterances))]

    @torch.inference_mode()
    def _batch(self, utterances: list[Utterance]) -> list[Tensor]:
        assert self.extract is not None
        lengths = torch.tensor([len(u.audio) for u in utterances])
        waveforms = torch.zeros(len(utterances), int(lengths.max()))
        for row, utterance in zip(waveforms, utterances):
            row[: len(utterance.audio)] = utterance.waveform
        states, frames = self.extract(waveforms, lengths, num_layers=self.num_layers)
        stacked = torch.stack(states, dim=2).half()
        assert frames is not None
        for utterance, num in zip(utterances, frames.tolist()):
            if num != utterance.num_frames:
                raise UserError(f"the model makes {num} frames of {len(utterance.audio)} samples: not 50 per second")
        return [row[:num].clone() for row, num in zip(stacked, frames.tolist())]


def filter_banks(utterance: Utterance) -> Tensor:
    """40 log Mel filter banks of each frame and its five neighbours on both sides: float16 [T, 1, 440]."""
    mel = torchaudio.compliance.kaldi.fbank(
        utterance.waveform[None], num_mel_bins=40, frame_shift=1000 * HOP / SAMPLE_RATE, window_type="hanning"
    )
    num = utterance.num_frames
    mel = F.pad(mel.T, (0, max(0, num - len(mel))), mode="replicate").T[:num]
    padded = F.pad(mel.T, (5, 5), mode="replicate").T
    return torch.cat([padded[i : i + num] for i in range(11)], dim=1)[:, None].half()


def load_data(corpus: Path, students: CorpusSettings) -> Data:
    """Read the corpus; test sentences that the shipped teacher or the students were trained on are left out.

    Args:
        corpus: made with ``CORPUS``.
        students: settings of the corpus that the students were trained on.
    """
    train, test, keywords = (read_split(corpus, part) for part in (TRAIN, DEV, "keywords"))
    seen = {*training_sentences(CorpusSettings()), *training_sentences(students)}
    kept = [u for u in test if u.text not in seen]
    logger.info("%d of %d test sentences are new", len(kept), len(test))
    return Data(train, kept, keywords, {kind: FrameLabels(train, kind, num) for kind, num in MIN_COUNT.items()})


def start(demo: Path, out: Path | None, *needed: str) -> tuple[Path, Data]:
    """The folder for results, DEMO/minisuperb by default, and the corpus of the probes, made there.

    Raises:
        UserError: the demo's folder lacks one of the ``needed`` files.
    """
    for name in needed:
        if not (demo / name).is_file():
            raise UserError(f"{demo}: no {name} in it; run scripts/demo.sh {demo} first")
    students = CorpusSettings(**read_marker(demo / "corpus")["settings"])
    out = out or demo / "minisuperb"
    out.mkdir(parents=True, exist_ok=True)
    make_corpus(out / "corpus", CORPUS)
    return out, load_data(out / "corpus", students)


def count(right: Tensor, speakers: list[int], weight: Tensor | None = None) -> dict[str, list[float]]:
    """Right and counted items per speaker; ``weight`` is False for items that do not count."""
    result: dict[str, list[float]] = {}
    counted = torch.ones(len(right)) if weight is None else weight.float()
    speaker = torch.tensor(speakers)
    for one in sorted(set(speakers)):
        mine = speaker == one
        result[str(one)] = [float((right.float() * counted)[mine].sum()), float(counted[mine].sum())]
    return result


def evaluate(features: Features, data: Data, steps: int = 600, tasks: Collection[str] = TASKS) -> Counts:
    """Tasks on one model. ``steps`` are the updates of each probe."""
    train, test = features(data.train), features(data.test)
    result: Counts = {kind: frame_counts(kind, data, train, test, steps) for kind in data.labels if kind in tasks}
    if "keywords" in tasks:
        result["keywords"] = keyword_counts(data, features, steps // 2)
    if "ABX" in tasks:
        result["ABX"] = abx_counts(data, train, test)
    if "speakers" in tasks:
        result["speakers"] = speaker_counts(data, train, test, steps // 2)
    return result


def keyword_counts(data: Data, features: Features, steps: int) -> dict[str, list[float]]:
    """Name the word of an isolated one."""
    fitting = {u.speaker for u in data.train}
    pooled = torch.stack([x.float().mean(0) for x in features(data.keywords)])
    names = sorted({u.text for u in data.keywords})
    classes = torch.tensor([names.index(u.text) for u in data.keywords])
    is_train = torch.tensor([u.speaker in fitting for u in data.keywords])
    choose = torch.tensor([u.speaker in data.choosing for u in data.keywords])
    found = linear_probe(pooled[is_train], classes[is_train], pooled[~is_train], len(names), steps=steps,
                         strengths=STRENGTHS, choose=choose[is_train])  # fmt: skip
    speakers = [u.speaker for u in data.keywords if u.speaker not in fitting]
    return count(found == classes[~is_train], speakers)


def abx_counts(data: Data, train: list[Tensor], test: list[Tensor]) -> dict[str, list[float]]:
    """Tell words apart across speakers, in the layer that is best on the speakers that choose."""
    choosing = [i for i, u in enumerate(data.train) if u.speaker in data.choosing]
    triples, _ = draw_triples([data.train[i] for i in choosing], NUM_TRIPLES // 4)
    layers = range(train[0].shape[1])
    layer = max(layers, key=lambda k: abx_right([train[i][:, k] for i in choosing], triples).sum().item())
    triples, x_speakers = draw_triples(data.test, NUM_TRIPLES)
    return count(abx_right([x[:, layer] for x in test], triples), x_speakers)


def frame_counts(kind: str, data: Data, train: list[Tensor], test: list[Tensor], steps: int) -> dict[str, list[float]]:
    """Words or phones per frame; silence does not count."""
    label = data.labels[kind]
    known, expected = (torch.cat([label(u) for u in some]) for some in (data.train, data.test))
    choose = torch.tensor([u.speaker in data.choosing for u in data.train for _ in range(u.num_frames)])
    found = linear_probe(torch.cat(train), known, torch.cat(test), len(label), steps=steps, strengths=STRENGTHS,
                         choose=choose)  # fmt: skip
    speakers = [u.speaker for u in data.test for _ in range(u.num_frames)]
    return count(found == expected, speakers, (expected != IGNORE) & (expected != (0 if kind == "phones" else IGNORE)))


def speaker_counts(data: Data, train: list[Tensor], test: list[Tensor], steps: int) -> dict[str, list[float]]:
    """Name the test speakers among all: of every five sentences of one, two fit, one chooses, two test."""
    utterances = [*data.train, *data.test]
    pooled = torch.stack([x.float().mean(0) for x in (*train, *test)])
    names = sorted({u.speaker for u in utterances})
    classes = torch.tensor([names.index(u.speaker) for u in utterances])
    seen: dict[int, int] = {}
    turn = torch.tensor(
        [seen.update({u.speaker: seen.get(u.speaker, -1) + 1}) or seen[u.speaker] % 5 for u in utterances]
    )
    fit = turn < 3
    found = linear_probe(pooled[fit], classes[fit], pooled[~fit], len(names), steps=steps, strengths=STRENGTHS,
                         choose=(turn == 2)[fit])  # fmt: skip
    speakers = [u.speaker for u, fitted in zip(utterances, fit.tolist()) if not fitted]
    testing = {u.speaker for u in data.test}
    return count(found == classes[~fit], speakers, torch.tensor([s in testing for s in speakers]))


@dataclass
class Row:
    """One line of the table: a method with the counts of its seeds, or a control."""

    name: str
    num_params: int  # 0 for filter banks
    runs: list[Counts]


def rates(
    runs: list[Counts], task: str, rng: np.random.Generator | None, num: int, all_seeds: bool = False
) -> np.ndarray:
    """Shares of right items in per cent, [num] resamples of speakers and seeds; without ``rng`` the plain share, [1].

    A generator in the same state draws the same speakers for every model, which makes differences paired. With
    ``all_seeds`` speakers alone are drawn.
    """
    speakers = sorted(speaker for speaker, (_, total) in runs[0][task].items() if total)
    counts = np.array([[run[task][speaker] for speaker in speakers] for run in runs])  # [seeds, speakers, 2]
    if rng is None:
        total = counts.sum((0, 1))
        return np.array([100 * total[0] / total[1]])
    who = rng.integers(len(speakers), size=(num, len(speakers)))
    shape = num, len(runs)
    which = np.broadcast_to(np.arange(len(runs)), shape) if all_seeds else rng.integers(len(runs), size=shape)
    sums = np.stack([counts[seeds][:, chosen].sum((0, 1)) for seeds, chosen in zip(which, who)])
    return 100 * sums[:, 0] / sums[:, 1]


def scores(row: Row, teacher: Row, num: int = 2000) -> dict[str, list[float]]:
    """Per task: score, lower and upper end of its interval, in per cent; ABX as error, speakers of the teacher's."""
    result = {}
    for task in TASKS:
        point, drawn = (rates(row.runs, task, rng, num) for rng in (None, np.random.default_rng(0)))
        if task == "ABX":
            point, drawn = 100 - point, 100 - drawn
        if task == "speakers":
            base, base_drawn = (rates(teacher.runs, task, rng, num) for rng in (None, np.random.default_rng(0)))
            point, drawn = 100 * point / base, 100 * drawn / base_drawn
        result[task] = [float(point[0]), *np.percentile(drawn, [2.5, 97.5]).tolist()]
    return result


def table(rows: list[Row], teacher: Row) -> str:
    """Markdown, one line per row."""
    head = ["model", "parameters", "words", "phones", "keywords", "ABX error", "speakers, of the teacher's"]
    lines = []
    for row in rows:
        cells = [f"{a:.1f} [{b:.1f}, {c:.1f}]" for a, b, c in scores(row, teacher).values()]
        lines.append([row.name, f"{row.num_params:,}" if row.num_params else "", *cells])
    return markdown_table(head, lines)


def probe_settings(steps: int) -> dict[str, Any]:
    """What decides about the counts besides the model, in plain JSON types."""
    return {
        "steps": steps,
        "corpus": asdict(CORPUS),
        "min_count": MIN_COUNT,
        "strengths": list(STRENGTHS),
        "choosing": NUM_CHOOSING,
        "triples": NUM_TRIPLES,
    }


def measured(path: Path, data: Data, steps: int, tasks: Collection[str] = TASKS) -> tuple[int, Counts]:
    """Parameters and counts of a model file, kept beside it."""
    kept = path.with_suffix(".minisuperb.json")
    model = load_model(path)
    settings = {"model": fingerprint(model), **probe_settings(steps)}
    counts: Counts = {}
    if kept.is_file() and (saved := json.loads(kept.read_text())).get("settings") == settings:
        counts = saved["counts"]
    num_params = used_params(model)
    if not (missing := [task for task in tasks if task not in counts]):
        return num_params, counts
    counts |= evaluate(Features(model.extract_features), data, steps, missing)
    write_text(kept, json.dumps({"settings": settings, "num_params": num_params, "counts": counts}))
    return num_params, counts


def run(
    demo: Path = Path("demo_out"),
    compare: list[Path] | None = None,
    models: list[Path] | None = None,
    out: Path | None = None,
    steps: int = 600,
    threads: int = 2,
) -> None:
    """Evaluate, print and plot.

    Args:
        demo: folder that scripts/demo.sh has left: teacher.pth and its corpus.
        compare: folders of benchmarks.compare_methods; DEMO/compare by default, if it is there.
        models: more models, a row each.
        out: folder of the probes' corpus, minisuperb.json and minisuperb.svg; DEMO/minisuperb by default.
        steps: updates of each probe.
        threads: of torch.

    Raises:
        Stopped: a signal asked for it.
        UserError: a folder without what it should hold.
    """
    torch.set_num_threads(threads)
    compare = [demo / "compare"] if compare is None and (demo / "compare").is_dir() else compare or []
    finals: list[tuple[str, list[Path]]] = []
    for folder in compare:
        finals += finals_in(folder).items()
    for path in models or []:
        finals.append((path.stem if path.stem != "final" else path.parent.name, [path]))
    out, data = start(demo, out, "teacher.pth")

    teacher_model = load_model(demo / "teacher.pth")
    torch.manual_seed(0)
    blank = wav2vec2_model(**teacher_model.config).eval()
    controls = [
        ("filter banks, 11 frames", None, Features(None)),
        ("random weights", blank, Features(blank.extract_features)),
        ("teacher's layer 0", teacher_model, Features(teacher_model.extract_features, num_layers=0)),
    ]
    of = {"teacher": fingerprint(teacher_model), "torch": torch.__version__, **probe_settings(steps)}
    known = Journal(out / "controls.jsonl", of, "controls")
    rows = []
    with (
        keeping(f"what was measured of a model is beside it, of the controls in {known.path}"),
        tqdm(total=1 + len(controls) + sum(len(files) for _, files in finals), desc="probing", unit="model") as bar,
    ):
        num_params, counts = measured(demo / "teacher.pth", data, steps)
        teacher = Row("teacher", num_params, [counts])
        bar.update()
        for name, files in finals:
            sizes, runs = [], []
            for file in files:
                num_params, counts = measured(file, data, steps)
                sizes.append(num_params)
                runs.append(counts)
                bar.update()
            rows.append(Row(name, round(sum(sizes) / len(sizes)), runs))
        control_rows = []
        for name, model, features in controls:
            if name not in known:
                known[name] = evaluate(features, data, steps)
            control_rows.append(Row(name, used_params(model) if model else 0, [known[name]]))
            bar.update()
    rows = [teacher, *rows, *control_rows]
    result = [
        {"name": row.name, "num_params": row.num_params, "seeds": len(row.runs), "scores": scores(row, teacher)}
        for row in rows
    ]
    written = write(out, "minisuperb", result, draw(result))
    num_seeds = max(len(row.runs) for row in rows)
    print(f"Per cent, 95 % intervals over {len({u.speaker for u in data.test})} speakers and {num_seeds} seeds:\n")
    print(table(rows, teacher))
    print(f"\n-> {written}")


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
