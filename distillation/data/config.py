"""Settings of the audio data: what is read, and how it is batched and disturbed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distillation.data.manifest import MAX_FRAMES
from distillation.data.noise import NoiseConfig
from distillation.errors import UserError, require
from distillation.recognition.letters import Case
from wav2vec2.feature_extractor import SAMPLE_RATE

# The convolutions of wav2vec 2.0 turn this many samples into their first frame.
MIN_INPUT_FRAMES = 400


@dataclass
class TranscriptsConfig:
    """Transcribed utterances in place of the lists of audio. LibriSpeech and Kaldi folders, Common Voice's .tsv, JSON
    lines as NeMo writes them, or lines of path<TAB>text."""

    train: Path | None = None
    """To train on; null for the JSON lines beside the training list, which prepare_data.py --transcripts writes."""
    valid: Path | None = None
    """To validate on; null for those beside the validation list."""
    audio: Path | None = None
    """Folder of prepare_data.py --convert, whose copies are taken for the files that lists and folders name; of another
    folder, what relative paths start from, NAME.mp3.flac or NAME.flac for a NAME.mp3 that it does not hold."""
    case: Literal["auto"] | Case = "auto"
    """Capitals (upper), small letters (lower) or letters as they are (keep), composed (NFC) in any case; auto for the
    case of the output layer's letters, capitals where there are none yet."""


@dataclass
class DataConfig:
    """Audio data and how it is batched. The defaults are the published ones of DPHuBERT."""

    tsv_dir: Path = Path("data")
    """Folder of the utterance lists that prepare_data.py writes."""
    train: str = "train960.tsv"
    """Training list, relative to tsv_dir."""
    valid: str = "valid.tsv"
    """Validation list, relative to tsv_dir."""
    sample_rate: int = SAMPLE_RATE
    """Samples per second of every file; another rate is an error, nothing is resampled."""
    min_frames: int = 32000
    """Shortest utterance used, in samples; shorter ones are dropped."""
    max_frames: int = 250000
    """Longest utterance used as it is, in samples."""
    long: Literal["drop", "split", "crop"] = "drop"
    """What happens to utterances over max_frames: dropped as published, split into equal pieces, or cropped to
    max_frames at a random place in every epoch (DistilHuBERT)."""
    num_buckets: int = 1000
    """Utterances are sorted into this many equally wide ranges of length and shuffled inside each."""
    seconds_per_batch: float = 160.0
    """Most seconds of audio in one micro-batch of one process, padding included."""
    utterances_per_batch: int | None = None
    """Fixed number of utterances in a micro-batch; seconds_per_batch is then not used."""
    crop: bool = True
    """Crop a micro-batch at random offsets to its shortest utterance; if false, pad it to its longest."""
    reshuffle: Literal["every_epoch", "once"] = "every_epoch"
    """A new order and new crops every epoch, or those of the first epoch again and again as in the released system."""
    num_workers: int | Literal["auto"] = "auto"
    """Processes per rank that read the training audio; 0 reads in the training process; auto asks the machine."""
    transcripts: TranscriptsConfig | None = None
    """What is said, for objective.ctc; null for audio alone."""
    noise: NoiseConfig | None = None
    """What disturbs the training audio that the student hears, and the teacher does not; null for nothing."""
    valid_seconds_per_batch: float = 160.0
    """Most seconds of audio in one validation batch, padding included."""
    max_bad_share: float = 0.001
    """Share of the files of a list that may turn out unreadable; they are left out, more of them end the run."""

    @property
    def max_seconds(self) -> float:
        """Length of the longest utterances that are kept."""
        return self.max_frames / self.sample_rate

    def transcribed(self, kind: Literal["train", "valid"]) -> Path:
        """Where transcripts of a list are; only with ``transcripts``."""
        named = getattr(self.transcripts, kind)
        return named or (self.tsv_dir / getattr(self, kind)).with_suffix(".jsonl")

    def __post_init__(self) -> None:
        least, most = self.min_frames, MAX_FRAMES / self.sample_rate if self.sample_rate else 0
        require(self, "data.", "be at least 1", lambda value: value >= 1, "sample_rate", "num_buckets")
        require(self, "data.", "be at least 1, or null", lambda value: value >= 1, "utterances_per_batch")
        require(self, "data.", "be 'auto' or at least 0", lambda value: value == "auto" or value >= 0, "num_workers")
        seconds = ("seconds_per_batch", "valid_seconds_per_batch")
        require(self, "data.", "be a positive number of seconds", lambda value: 0 < value <= most, *seconds)
        require(self, "data.", "lie in [0, 1]", lambda value: 0 <= value <= 1, "max_bad_share")
        must = f"be at least {MIN_INPUT_FRAMES}, the samples that the models need"
        require(self, "data.", must, lambda value: value >= MIN_INPUT_FRAMES, "min_frames")
        must = f"be at least min_frames, {least}"
        require(self, "data.", must, lambda value: least <= value <= MAX_FRAMES, "max_frames")
        if self.long == "split":
            must = f"be at least twice min_frames, {least}, with data.long=split, or halves would be too short"
            require(self, "data.", must, lambda value: value >= 2 * least, "max_frames")
        if self.transcripts is not None and (self.crop or self.long != "drop"):
            raise UserError(
                "data.transcripts are of whole utterances: set data.crop false and leave data.long at drop "
                f"(they are {str(self.crop).lower()} and {self.long})"
            )
