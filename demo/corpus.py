"""Synthesise a miniature corpus in the shape of LibriSpeech, with phone and word alignments.

    python -m demo.corpus --out DIR

makes, with espeak-ng and without a network,

    DIR/LibriSpeech/{train-clean-100,dev-clean}/<speaker>/<chapter>/*.flac and .trans.txt    16 kHz mono
    DIR/keywords/{train,dev}/<word>/<speaker>.flac                                           one word each
    DIR/align/{train-clean-100,dev-clean,keywords}.jsonl                                     one line per utterance
    DIR/corpus.json                                                                          settings; written last

A line of ``align`` holds ``id``, ``speaker``, ``text``, ``path`` (from DIR), ``num_samples``, ``phones`` and ``words``,
the last two as ``[start, end, label]`` with times in seconds. Speakers and sentences of dev-clean do not occur in
training. The same settings and the same espeak-ng give the same bytes, also when it is stopped and run again: until all
speakers are finished, those that are wait in the folder .NAME.partial beside DIR.
"""

import json
import logging
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jsonargparse import ActionYesNo
from tqdm import tqdm

from demo.espeak import Espeak, load_espeak
from demo.sentences import KEYWORDS, draw_sentences
from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from distillation.journal import Journal
from distillation.stopping import keeping, listening
from distillation.training.lock import run_lock
from wav2vec2.checkpoint import write_text
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)

TRAIN, DEV = "train-clean-100", "dev-clean"
MARKER = "corpus.json"
Span = tuple[float, float, str]
"""Start and end in seconds, and what is said there."""
FIRST_SPEAKER, FIRST_CHAPTER = 100, 1000
# espeak-ng carries hidden state from one utterance to the next. A fixed number of fresh processes, whatever the number
# of cores, makes the corpus depend on its settings alone.
NUM_SHARDS = 4
# Voices of espeak-ng without breath noise, which would come from random numbers that nobody seeds.
_VARIANTS = """
    f1 f4 Annie adam benjamin m1 m2 m3 m4 m5 m6 m7 m8 klatt klatt2 klatt3 klatt4 Andrea Alex Andy linda steph
    Michael belinda ed boris rob caleb paul shelby anika Reed
""".split()  # noqa: SIM905 (a list of names reads better so)


@dataclass(frozen=True)
class CorpusSettings:
    """What decides the content of a corpus.

    Args:
        train_speakers: speakers of train-clean-100.
        train_utterances: sentences of each of them, 2.9 s on average, 97 % of them 2 s or longer.
        dev_speakers: other speakers, of dev-clean.
        dev_utterances: sentences of each of them.
        keywords: whether every speaker also says every keyword once.
        seed: of speakers, sentences and recording conditions.
    """

    train_speakers: int = 40
    train_utterances: int = 100
    dev_speakers: int = 10
    dev_utterances: int = 30
    keywords: bool = True
    seed: int = 0

    def __post_init__(self):
        for name in ("train_speakers", "train_utterances", "dev_speakers", "dev_utterances"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: it must not be negative")


@dataclass(frozen=True)
class Speaker:
    """A synthetic speaker: a voice of espeak-ng at its own vocal tract length, pitch and pace."""

    id: int
    split: str
    voice: str
    warp: float
    """Factor on all frequencies: below 1 for a longer vocal tract."""
    pitch: float
    pitch_range: float
    rate: float
    """Words per minute."""
    sentences: list[str] = field(repr=False)


@dataclass
class Rendered:
    """Finished speech at 16 kHz: ``samples`` [N] in [-1, 1], its alignments, and what espeak-ng was asked for."""

    samples: np.ndarray
    phones: list[Span]
    words: list[Span]
    asked: tuple[str, int, int, int]
    """Arguments of ``Espeak.set_voice``."""


class Stop(Exception):
    """The parent asks this process to end, or is gone."""


def is_silence(phone: str) -> bool:
    """Whether an espeak-ng phone name is a pause (``_``, ``_:``, ``;``, ...)."""
    return not phone.strip("_:;!")


def _draw_speakers(settings: CorpusSettings) -> list[Speaker]:
    rng = np.random.default_rng([settings.seed, 0])
    num_train, num_all = settings.train_speakers, settings.train_speakers + settings.dev_speakers
    num_train_sentences = num_train * settings.train_utterances
    sentences = draw_sentences(num_train_sentences + settings.dev_speakers * settings.dev_utterances, rng)
    variants = rng.permutation([_VARIANTS[i % len(_VARIANTS)] for i in range(num_all)])
    speakers = []
    for i in range(num_all):
        split, num = (TRAIN, settings.train_utterances) if i < num_train else (DEV, settings.dev_utterances)
        first = i * num if i < num_train else num_train_sentences + (i - num_train) * num
        warp, pitch, pitch_range, rate = (
            float(rng.uniform(*x)) for x in ((0.86, 1.16), (20, 80), (30, 70), (140, 200))
        )
        voice = f"en-us+{variants[i]}"
        own = sentences[first : first + num]
        speakers.append(Speaker(FIRST_SPEAKER + i, split, voice, warp, pitch, pitch_range, rate, own))
    return speakers


def training_sentences(settings: CorpusSettings) -> list[str]:
    """What the training speakers of such a corpus say, without making it."""
    return [text for speaker in _draw_speakers(settings) if speaker.split == TRAIN for text in speaker.sentences]


def _resample_and_colour(samples: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Resample [N] from ``rate`` Hz to 16 kHz through a smooth random channel, in one Fourier transform."""
    size = 1024 * (len(samples) // 1024 + 2)  # at least 1024 zeros at the end, so that the channel does not wrap around
    size_out = 2 * round(size * SAMPLE_RATE / rate / 2)
    spectrum = np.fft.rfft(samples, size)
    out = np.zeros(size_out // 2 + 1, np.complex128)
    num = min(len(spectrum), len(out))
    out[:num] = spectrum[:num]
    # cosines over log frequency, finer ones weaker: an overall tilt of some dB with gentle bumps
    position = np.log2(1 + 15 * np.linspace(0, 1, len(out))) / 4
    gain = sum(rng.normal(0, 3 / k) * np.cos(np.pi * (k * position + rng.uniform())) for k in (1, 2, 3))
    out *= 10 ** (gain / 20)
    coloured = np.fft.irfft(out, size_out) * (size_out / size)
    return coloured[: round(len(samples) * size_out / size)].astype(np.float32)


def _render(espeak: Espeak, speaker: Speaker, text: str, rng: np.random.Generator) -> Rendered:
    """Let ``speaker`` say ``text`` over a random channel, loudness and background noise."""
    rate = speaker.rate / speaker.warp * rng.uniform(0.9, 1.1)  # resampling by the warp speeds up: undo that
    pitch = np.clip(speaker.pitch + rng.uniform(-8, 8), 0, 99)
    asked = (speaker.voice, int(np.clip(rate, 90, 350)), int(pitch), int(speaker.pitch_range))
    espeak.set_voice(*asked)
    speech = espeak.say(text)
    source_rate = espeak.sample_rate * speaker.warp
    samples = _resample_and_colour(speech.samples, source_rate, rng)
    samples *= 10 ** (rng.uniform(-12, -2) / 20) / max(1e-4, np.abs(samples).max())
    voiced = samples[np.abs(samples) > 1e-3]
    white = rng.standard_normal(len(samples) + 1).astype(np.float32)
    noise = white[1:] + np.float32(rng.uniform(0, 0.95)) * white[:-1]
    snr_db = rng.uniform(10, 35)
    noise *= np.sqrt(np.mean(voiced**2) / np.mean(noise**2) / 10 ** (snr_db / 10))
    samples = np.clip(samples + noise, -1, 1)

    duration = len(samples) / SAMPLE_RATE
    starts = [min(start / source_rate, duration) for start, _ in speech.phones]
    phones: list[Span] = [
        (round(start, 4), round(end, 4), name.strip("',") or "_")
        for start, end, (_, name) in zip(starts, [*starts[1:], duration], speech.phones, strict=True)
    ]
    words: list[Span] = []
    word_starts = [min(start / source_rate, duration) for start, _ in speech.words]
    for start, limit, (_, word) in zip(word_starts, [*word_starts[1:], duration], speech.words, strict=True):
        ends = [end for begin, end, name in phones if start <= begin < limit and not is_silence(name)]
        words.append((round(start, 4), round(min(max(ends, default=limit), limit), 4), word))
    return Rendered(samples, phones, words, asked)


def _write_speaker(espeak: Espeak, out: Path, speaker: Speaker, settings: CorpusSettings) -> dict[str, Any]:
    """Write the audio and transcripts of one speaker.

    Returns:
        ``rows`` of its alignments by file name; ``said``, the text and voice of every utterance in their order.
    """
    rng = np.random.default_rng([settings.seed, speaker.id])
    chapter = FIRST_CHAPTER + speaker.id - FIRST_SPEAKER
    folder = out / "LibriSpeech" / speaker.split / str(speaker.id) / str(chapter)
    jobs = [(speaker.split, f"{speaker.id}-{chapter}-{i:04d}", folder, t) for i, t in enumerate(speaker.sentences)]
    folder.mkdir(parents=True, exist_ok=True)
    transcript = "".join(f"{name} {text.upper()}\n" for _, name, _, text in jobs)
    (folder / f"{speaker.id}-{chapter}.trans.txt").write_text(transcript)
    if settings.keywords:
        part = out / "keywords" / ("train" if speaker.split == TRAIN else "dev")
        jobs += [("keywords", str(speaker.id), part / word, word) for word in KEYWORDS]
    rows: dict[str, list[dict]] = {}
    said = []
    for kind, name, folder, text in jobs:
        parent = multiprocessing.parent_process()
        if parent is not None and (_stopped.is_set() or not parent.is_alive()):
            raise Stop
        rendered = _render(espeak, speaker, text, rng)
        said.append((text, rendered.asked))
        path = folder / f"{name}.flac"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rendered.samples, SAMPLE_RATE, subtype="PCM_16")
        row = {
            "id": name if kind != "keywords" else f"{text}-{name}",
            "speaker": speaker.id,
            "text": text,
            "path": path.relative_to(out).as_posix(),
            "num_samples": len(rendered.samples),
            "phones": rendered.phones,
            "words": rendered.words,
        }
        rows.setdefault(kind, []).append(row)
    return {"rows": rows, "said": said}


_speakers_done: Any = None  # a shared counter and an event, set in every worker process
_stopped: Any = None


def _start_worker(counter: Any, stopped: Any) -> None:
    global _speakers_done, _stopped
    _speakers_done, _stopped = counter, stopped


def _write_shard(out: Path, speakers: list[Speaker], settings: CorpusSettings, journal: Path) -> dict[str, list[dict]]:
    espeak = load_espeak()
    known = Journal(journal, {}, "speakers")
    rows: dict[str, list[dict]] = {}
    for speaker in speakers:
        key = str(speaker.id)
        if key in known:
            for text, asked in known[key]["said"]:  # again, for the state in which that leaves espeak-ng
                espeak.set_voice(*asked)
                espeak.say(text)
        else:
            known[key] = _write_speaker(espeak, out, speaker, settings)
        for kind, more in known[key]["rows"].items():
            rows.setdefault(kind, []).extend(more)
        with _speakers_done.get_lock():
            _speakers_done.value += 1
    return rows


def _synthesise(out: Path, settings: CorpusSettings, partial: Path) -> None:
    """Write a whole corpus into the folder ``out``, where what the journals in ``partial`` list is finished."""
    speakers = _draw_speakers(settings)
    context = multiprocessing.get_context("forkserver")
    # import once, not once per shard; not this module itself, which `python -m` would run a second time
    context.set_forkserver_preload(["demo.espeak", "demo.sentences", "jsonargparse"])
    # What is started while signals are ignored ignores them: Ctrl-C reaches all processes, and this one alone decides.
    with listening(signal.SIG_IGN):
        counter, stopped = context.Value("i", 0), context.Event()
        ensure_running()
    rows: dict[str, list[dict]] = {TRAIN: [], DEV: []}
    with (
        tqdm(total=len(speakers), desc="synthesis", unit="speaker") as bar,
        ProcessPoolExecutor(
            min(NUM_SHARDS, os.cpu_count() or 1), context, _start_worker, (counter, stopped), max_tasks_per_child=1
        ) as pool,
    ):
        parts = [part for i in range(NUM_SHARDS) if (part := speakers[i::NUM_SHARDS])]
        try:
            shards = [
                pool.submit(_write_shard, out, part, settings, partial / f"{i}.jsonl") for i, part in enumerate(parts)
            ]
            pending: set[Future] = set(shards)
            while pending:
                _, pending = wait(pending, timeout=0.3, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
        for shard in shards:
            for kind, more in shard.result().items():
                rows.setdefault(kind, []).extend(more)
    (out / "align").mkdir(exist_ok=True)
    for kind, some in rows.items():
        some.sort(key=lambda row: (row["speaker"], row["id"]))
        (out / "align" / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    num_samples = {kind: sum(row["num_samples"] for row in some) for kind, some in rows.items()}
    marker = {
        "settings": asdict(settings),
        "synthesiser": f"espeak-ng {load_espeak().version}",
        "utterances": {kind: len(some) for kind, some in rows.items()},
        "hours": {kind: round(num / SAMPLE_RATE / 3600, 4) for kind, num in num_samples.items()},
    }
    (out / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def read_marker(corpus: str | Path) -> dict:
    """Read ``corpus.json`` of a finished corpus: ``settings``, ``synthesiser``, ``utterances`` and ``hours``.

    Raises:
        UserError: there is none.
    """
    path = Path(corpus) / MARKER
    if not path.is_file():
        raise UserError(f"{path} is missing: make the corpus with python -m demo.corpus --out {corpus}")
    return json.loads(path.read_text())


def make_corpus(out: str | Path, settings: CorpusSettings | None = None) -> dict:
    """Make the corpus ``settings`` asks for in the folder ``out``, or find it there; return its marker ``corpus.json``.

    Raises:
        Stopped: a signal asked for it; the next call goes on after the speakers that are finished.
        UserError: ``out`` holds something else, or a corpus of other settings; or espeak-ng is missing.
    """
    out, settings = Path(out), settings or CorpusSettings()
    if (out / MARKER).is_file():
        marker = read_marker(out)
        for name, value in asdict(settings).items():
            if (there := marker["settings"].get(name)) != value:
                raise UserError(
                    f"{out} holds a corpus made with {name} {there}, not {value}: choose another --out or remove it"
                )
        logger.info("%s: the corpus is already there", out)
        return marker
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a corpus made here: choose another --out")
    of = json.dumps([asdict(settings), load_espeak().version])  # fails before anything is written
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    folder, owner = partial / "corpus", partial / "of.json"
    with run_lock(partial, owner=True), keeping(f"the finished speakers are in {partial}"):
        if not (folder.is_dir() and owner.is_file() and owner.read_text() == of):
            for journal in partial.glob("*.jsonl"):
                journal.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_text(owner, of)
        _synthesise(folder, settings, partial)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    shutil.rmtree(partial)
    marker = read_marker(out)
    logger.info("%s: %s utterances, %s hours", out, marker["utterances"], marker["hours"])
    return marker


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_class_arguments(CorpusSettings, skip={"keywords"})
    # By hand: from the signature it would not be a switch but want the word "false".
    parser.add_argument("--keywords", action=ActionYesNo(no_prefix="no-"), default=True, help="also isolated words")
    options = vars(parse_arguments(parser))
    make_corpus(options.pop("out"), CorpusSettings(**options))


if __name__ == "__main__":
    main()
