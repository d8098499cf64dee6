"""What s3prl 0.4.18 needs of libraries that have since moved on. ``install()`` comes before any import of s3prl.

Each entry was found by running it beside torch 2.11, torchaudio 2.11, huggingface_hub 1.x, pandas 2 and Python 3.11:

- torchaudio 2.9 and later: no ``set_audio_backend``, ``info``, ``sox_effects``; ``load`` and ``save`` want torchcodec.
- huggingface_hub 1.0: no ``HfFolder``, no ``Repository``.
- catalyst does not import on Python 3.10 and later; s3prl wants one sampler of it.
- pandas 2: no ``Series.iteritems``.
- torch 2.6: ``torch.load`` refuses the ``argparse.Namespace`` in s3prl's own checkpoints.
- joblib starts fresh processes, in which none of this would be installed: threads instead.
- The package on PyPI lacks ``downstream/ctc/corpus``, from which phone recognition reads its data.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
import torch
import torchaudio
from torch import Tensor
from torch.utils.data import DistributedSampler, Sampler

Effect = Sequence[str]
ENCODINGS = {"PCM_S8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": 32, "DOUBLE": 64}


class AudioMetaData(NamedTuple):
    """What ``torchaudio.info`` returned."""

    sample_rate: int
    num_frames: int
    num_channels: int
    bits_per_sample: int
    encoding: str


def info(path: str | Path, *args: Any, **kwargs: Any) -> AudioMetaData:
    """Header of an audio file."""
    found = soundfile.info(str(path))
    bits = ENCODINGS.get(found.subtype, 0)
    return AudioMetaData(found.samplerate, found.frames, found.channels, bits, found.subtype)


def load(
    path: str | Path, frame_offset: int = 0, num_frames: int = -1, *args: Any, **kwargs: Any
) -> tuple[Tensor, int]:
    """Samples float32 [channels, N] and their rate."""
    samples, rate = soundfile.read(str(path), num_frames, frame_offset, dtype="float32", always_2d=True)
    return torch.from_numpy(samples).t().contiguous(), rate


def save(path: str | Path, src: Tensor, sample_rate: int, *args: Any, **kwargs: Any) -> None:
    """Write [channels, N] as 16-bit samples."""
    soundfile.write(str(path), src.detach().cpu().t().numpy(), sample_rate)


def apply_effects_tensor(
    tensor: Tensor, sample_rate: int, effects: Sequence[Effect], channels_first: bool = True
) -> tuple[Tensor, int]:
    """Effects of sox in their order: channels, rate, gain and norm here, others by the program ``sox``.

    Args:
        tensor: float32 [channels, N], or [N, channels] if not ``channels_first``.
        sample_rate: in Hz.
        effects: names with their arguments.
        channels_first: the layout, also of the result.

    Raises:
        RuntimeError: an effect needs the program, and it is missing or fails.
    """
    wave = tensor if channels_first else tensor.t()
    for name, *arguments in ([str(word) for word in effect] for effect in effects):
        if name == "channels":
            count = int(arguments[0])
            if count != wave.shape[0]:
                wave = wave.mean(0, keepdim=True).repeat(count, 1)
        elif name == "rate" and len(arguments) == 1:
            rate = round(float(arguments[0]))
            wave, sample_rate = torchaudio.functional.resample(wave, sample_rate, rate), rate
        elif name == "gain" and len(arguments) == 1 and not arguments[0].startswith("-n"):
            wave = (wave * 10 ** (float(arguments[0]) / 20)).clamp(-1, 1)
        elif name == "norm" or (name == "gain" and arguments[:1] == ["-n"]):
            level = float(arguments[-1]) if arguments and arguments[-1] != "-n" else 0.0
            wave = wave / wave.abs().max().clamp(min=1e-12) * 10 ** (level / 20)
        else:
            wave, sample_rate = _sox(wave, sample_rate, [name, *arguments])
    return (wave if channels_first else wave.t()), sample_rate


def apply_effects_file(
    path: str | Path, effects: Sequence[Effect], normalize: bool = True, channels_first: bool = True, format: Any = None
) -> tuple[Tensor, int]:
    """The same on a file."""
    wave, rate = load(path)
    return apply_effects_tensor(wave if channels_first else wave.t(), rate, effects, channels_first)


def _sox(wave: Tensor, rate: int, effect: list[str]) -> tuple[Tensor, int]:
    program = shutil.which("sox")
    if program is None:
        raise RuntimeError(f"the effect {' '.join(effect)!r} needs the program sox, which is not installed")
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.wav", Path(folder) / "after.wav"
        soundfile.write(before, wave.t().numpy(), rate, subtype="FLOAT")
        command = [program, str(before), "-e", "floating-point", "-b", "32", str(after), *effect]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"sox {' '.join(effect)}: {result.stderr.strip()}")
        return load(after)


class DistributedSamplerWrapper(DistributedSampler):
    """Share what another sampler draws among the processes; stands in for catalyst's class of this name."""

    def __init__(
        self, sampler: Sampler, num_replicas: int | None = None, rank: int | None = None, shuffle: bool = True
    ) -> None:
        super().__init__(sampler, num_replicas=num_replicas, rank=rank, shuffle=shuffle)  # type: ignore[arg-type]
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        drawn = list(self.sampler)
        return (drawn[i] for i in super().__iter__())


class HfFolder:
    """Where a token is kept, as huggingface_hub before 1.0 named it."""

    @staticmethod
    def get_token() -> str | None:
        """The stored token."""
        import huggingface_hub

        return huggingface_hub.get_token()

    @staticmethod
    def save_token(token: str) -> None:
        """Store a token."""
        import huggingface_hub

        huggingface_hub.login(token=token)


class Repository:
    """Removed from huggingface_hub 1.0; s3prl uses it only for --push_to_hf_hub."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("--push_to_hf_hub needs huggingface_hub below 1.0: upload the folder by hand")


def install() -> None:
    """Put all of it in place; what a library still has stays."""
    torchaudio.set_audio_backend = lambda *args, **kwargs: None
    torchaudio.info, torchaudio.load, torchaudio.save = info, load, save
    effects = types.ModuleType("torchaudio.sox_effects")
    effects.apply_effects_tensor, effects.apply_effects_file = apply_effects_tensor, apply_effects_file  # type: ignore[attr-defined]
    sys.modules["torchaudio.sox_effects"] = torchaudio.sox_effects = effects

    import huggingface_hub

    for name, stand_in in (("HfFolder", HfFolder), ("Repository", Repository)):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, stand_in)

    catalyst, data, sampler = (types.ModuleType(f"catalyst{tail}") for tail in ("", ".data", ".data.sampler"))
    sampler.DistributedSamplerWrapper = DistributedSamplerWrapper  # type: ignore[attr-defined]
    catalyst.data, data.sampler = data, sampler  # type: ignore[attr-defined]
    for module in (catalyst, data, sampler):
        sys.modules[module.__name__] = module

    import pandas

    if not hasattr(pandas.Series, "iteritems"):
        pandas.Series.iteritems = pandas.Series.items

    torch.serialization.add_safe_globals([argparse.Namespace])

    import joblib

    joblib.parallel_config(backend="threading")

    # by path: looking the module up by name would import s3prl, which must see all of the above
    package = importlib.util.find_spec("s3prl")
    where = Path(package.origin).parent if package is not None and package.origin else None
    if where is not None and not (where / "downstream" / "ctc" / "corpus").is_dir():
        from evaluation import s3prl_libriphone

        corpus = types.ModuleType("s3prl.downstream.ctc.corpus")
        corpus.__path__ = []
        corpus.libriphone = s3prl_libriphone  # type: ignore[attr-defined]
        sys.modules["s3prl.downstream.ctc.corpus"] = corpus
        sys.modules["s3prl.downstream.ctc.corpus.libriphone"] = s3prl_libriphone
