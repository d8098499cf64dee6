"""Convert a teacher: HuBERT, wav2vec 2.0 or WavLM of transformers (any size), or a torchaudio pipeline."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from exporting.verify import TOLERANCE, relative_difference
from wav2vec2.checkpoint import CheckpointError, model_from_state, read_torch_file, save_model
from wav2vec2.importers import ImportedModel, import_huggingface, import_torchaudio, naming
from wav2vec2.importers.huggingface import check_model_type
from wav2vec2.model import Wav2Vec2Model

logger = logging.getLogger("convert")

DEFAULT_MODEL = "facebook/hubert-base-ls960"
SAMPLE_RATE = 16_000
PROBE_SAMPLES = (64_000, 41_000)  # over 160 frames, so that WavLM's logarithmic position buckets are reached
TORCHAUDIO = "torchaudio:"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PREPROCESSOR = "preprocessor_config.json"

Normalize = Literal["auto", "yes", "no"]
# Hidden states of one utterance: feature projection, layers 1..L and the model's output, each [T, D].
States = list[Tensor]


@dataclass
class Teacher:
    """A foreign model, read and run.

    Attributes:
        imported: its tensors and config in our terms.
        converted: the model made of them.
        alone: its hidden states for each probe waveform run alone.
        batched: the same from one padded batch, where the original is known to mask padding; else ``alone``.
    """

    imported: ImportedModel
    converted: Wav2Vec2Model
    alone: list[States]
    batched: list[States]


def convert(model: str = DEFAULT_MODEL, out: Path | None = None, normalize: Normalize = "auto") -> None:
    """Convert a teacher to a .pth file and prove that it computes the same as the original.

    Random waveforms go through both, alone and as a padded batch. Nothing is saved when any layer differs by more than
    1e-4 (times the layer's largest value where that exceeds 1).

    Args:
        model: hub id or local folder of a transformers model (hubert, wav2vec2, wavlm; fine-tuned ones lose their
            head), or torchaudio:NAME for a bundle of torchaudio.pipelines such as torchaudio:WAVLM_BASE_PLUS.
        out: the file; by default pretrained/NAME.hf.pth, pretrained/NAME.torchaudio.pth for a bundle.
        normalize: give the waveform zero mean and unit variance; auto does what the model was trained with: yes for
            models with a layer-norm extractor (Large), no for those with a group norm (Base).
    """
    bundle = model.startswith(TORCHAUDIO)
    name = Path(model.removeprefix(TORCHAUDIO)).resolve().name
    out = out or Path("pretrained") / f"{name}.{'torchaudio' if bundle else 'hf'}.pth"
    teacher = read_torchaudio(name, normalize) if bundle else read_huggingface(model, normalize)
    imported, converted = teacher.imported, teacher.converted
    if imported.dropped:
        logger.info("dropped the head of %s: %s", model, ", ".join(sorted(imported.dropped)))
    compare(teacher, model)
    extra: dict[str, Any] = {} if imported.mask_embedding is None else {"mask_embedding": imported.mask_embedding}
    save_model(out, converted, **extra)
    num_params = sum(parameter.numel() for parameter in converted.parameters())
    logger.info("%s: %s parameters, %d layers", out, f"{num_params:,}", converted.num_layers)


def read_huggingface(model: str, normalize: Normalize) -> Teacher:
    """Read a transformers model and run it on the probe waveforms."""
    folder = locate(model)
    check_model_type_of(folder)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logger.info("reading %s", folder)
    weights = read_weights(folder)
    with naming(folder):
        with refusing("its config.json is not valid"):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
        normalize_waveform = choose_normalization(normalize, config, folder)
        imported = import_huggingface(config, weights, normalize_waveform)
    converted = model_from_state(imported.config, imported.state_dict, source=folder)
    with naming(folder):
        with refusing("transformers cannot load it"):
            original, report = transformers.AutoModel.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
        missing = set(report["missing_keys"]) - {"masked_spec_embed"}
        if missing:
            raise CheckpointError(f"transformers finds no weights for {', '.join(sorted(missing)[:3])}")
    original.eval()
    original.adapter = None  # wav2vec 2.0 models for speech translation end in one; dropped with the heads
    # The peer's own preprocessing; its constant differs from that of torch's layer norm.
    prepare = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize_waveform, return_attention_mask=True)
    modules = [original.feature_projection, *original.encoder.layers]

    def run(waveforms: list[Tensor]) -> list[States]:
        inputs = prepare([w.numpy() for w in waveforms], sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
        mask = inputs.attention_mask if len(waveforms) > 1 else None
        states = capture(modules, lambda: original(inputs.input_values, attention_mask=mask).last_hidden_state)
        lengths = converted.output_length(inputs.attention_mask.sum(-1)).tolist()
        return [[state[row, :length] for state in states] for row, length in enumerate(lengths)]

    logger.info("running the original on %d random waveforms", len(PROBE_SAMPLES))
    with naming(folder), refusing("transformers cannot run it"):
        alone = [run([waveform])[0] for waveform in probe()]
        # With a group norm, transformers lets padding into the statistics of every frame; ours does not.
        batched = run(probe()) if config["feat_extract_norm"] == "layer" else alone
    return Teacher(imported, converted, alone, batched)


def read_torchaudio(name: str, normalize: Normalize) -> Teacher:
    """Read a pre-trained bundle of torchaudio and run it on the probe waveforms."""
    import torchaudio

    bundles = {key: value for key, value in vars(torchaudio.pipelines).items() if hasattr(value, "_normalize_waveform")}
    if name not in bundles:
        raise UserError(f"{TORCHAUDIO}{name}: no such bundle in torchaudio.pipelines; valid: {', '.join(bundles)}")
    bundle = bundles[name]
    if bundle.sample_rate != SAMPLE_RATE:
        raise UserError(f"{TORCHAUDIO}{name} wants audio at {bundle.sample_rate} Hz; only {SAMPLE_RATE} is supported")
    try:
        original = bundle.get_model(dl_kwargs={"weights_only": True})
    except OSError as error:
        raise UserError(f"{TORCHAUDIO}{name} could not be fetched: {error}") from error
    original = getattr(original, "model", original)  # without the wrapper that normalises the waveform
    normalize_waveform = bundle._normalize_waveform if normalize == "auto" else normalize == "yes"
    with naming(f"{TORCHAUDIO}{name}"):
        imported = import_torchaudio(bundle._params, original.state_dict(), normalize_waveform)
    converted = model_from_state(imported.config, imported.state_dict, source=f"{TORCHAUDIO}{name}")
    original.aux = None
    modules = [original.encoder.feature_projection, *original.encoder.transformer.layers]

    def run(waveform: Tensor) -> States:
        if normalize_waveform:
            waveform = nn.functional.layer_norm(waveform, waveform.shape)
        return [state[0] for state in capture(modules, lambda: original(waveform[None])[0])]

    alone = [run(waveform) for waveform in probe()]
    return Teacher(imported, converted, alone, alone)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever transformers raises over a file with strange values becomes one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise CheckpointError(f"{what}: {reason}") from error


def locate(model: str) -> Path:
    """Local folder of a transformers model; a hub id is fetched to the hub's cache first."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model} is a file; give the folder of config.json (fairseq .pt: convert_from_fairseq.py)")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise UserError(f"{model}: no such folder")
    from huggingface_hub import hf_hub_download
    from huggingface_hub import logging as hub_logging
    from huggingface_hub.errors import EntryNotFoundError

    hub_logging.set_verbosity_error()  # it reports every retry

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(model, name))
        except EntryNotFoundError:
            return None

    try:
        config = Path(hf_hub_download(model, "config.json"))
        fetch(PREPROCESSOR)
        weights = next((file for file in map(fetch, WEIGHTS) if file is not None), None)
        if weights is not None and weights.suffix == ".json":
            for shard in shards(weights):
                hf_hub_download(model, shard)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{model} is no local folder and could not be fetched from the hub: {reason}") from error
    return config.parent


def check_model_type_of(folder: Path) -> None:
    """Refuse another architecture or sample rate before anything large is read."""
    check_type = read_json(folder / "config.json")
    with naming(folder / "config.json"):
        check_model_type(check_type)
    preprocessor = folder / PREPROCESSOR
    if preprocessor.is_file():
        rate = read_json(preprocessor).get("sampling_rate", SAMPLE_RATE)
        if rate != SAMPLE_RATE:
            raise UserError(f"{preprocessor}: sampling_rate is {rate}; only models of {SAMPLE_RATE} Hz are supported")


def choose_normalization(normalize: Normalize, config: Mapping[str, Any], folder: Path) -> bool:
    """Whether to normalise the waveform, with a notice where the preprocessor file says otherwise."""
    decided = config.get("feat_extract_norm") == "layer" if normalize == "auto" else normalize == "yes"
    preprocessor = folder / PREPROCESSOR
    stated = read_json(preprocessor).get("do_normalize", True) if preprocessor.is_file() else decided
    if stated != decided:
        logger.warning(
            "%s says do_normalize=%s, the converted model has normalize_waveform=%s%s",
            preprocessor,
            str(stated).lower(),
            str(decided).lower(),
            " as models of this extractor were trained (--normalize overrides)" if normalize == "auto" else "",
        )
    return decided


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def shards(index: Path) -> list[str]:
    """Names of the files that the index of a sharded model lists."""
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index}: its weight_map does not name files of this folder")
    return names


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a transformers model folder, from one file or many."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: no weights; expected one of {', '.join(WEIGHTS)}")
    files = [folder / name for name in shards(path)] if path.suffix == ".json" else [path]
    weights: dict[str, Tensor] = {}
    for file in files:
        tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_torch_file(file)
        twice = weights.keys() & tensors.keys()
        if twice:
            raise UserError(f"{file}: tensor {min(twice)!r} is in another shard too")
        weights |= tensors
    return weights


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file; download it again ({error})") from error


def probe() -> list[Tensor]:
    """Random waveforms [N] of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_samples, generator=generator) for num_samples in PROBE_SAMPLES]


@torch.no_grad()
def capture(modules: list[nn.Module], call: Callable[[], Tensor]) -> list[Tensor]:
    """What the modules return during ``call``, and then what ``call`` itself returns: each [B, T, D]."""
    states: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Any) -> None:
        # Copied: transformers writes zeros over the padding of the feature projection.
        states.append((output[0] if isinstance(output, tuple) else output).clone())

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        result = call()
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, result]


@torch.no_grad()
def compare(teacher: Teacher, source: str) -> None:
    """Print the largest difference of every layer, alone and in a padded batch.

    Raises:
        UserError: a difference above the limit, or one that is not a number.
    """

    def run(waveforms: list[Tensor]) -> list[States]:
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        padded = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        hidden, frames = teacher.converted.extract_features(padded, lengths)
        output, _ = teacher.converted(padded, lengths)
        assert frames is not None
        return [[s[row, :length] for s in [*hidden, output]] for row, length in enumerate(frames.tolist())]

    logger.info("running the converted model")
    alone = largest(difference(teacher.alone, [run([waveform])[0] for waveform in probe()]))
    batched = largest(difference(teacher.batched, run(probe())))
    size = largest(teacher.alone)
    names = ["feature projection", *(f"layer {i}" for i in range(1, len(alone) - 1)), "output"]
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


def difference(expected: list[States], found: list[States]) -> list[States]:
    """Element by element, for every utterance and hidden state."""
    return [[a - b for a, b in zip(*states, strict=True)] for states in zip(expected, found, strict=True)]


def largest(states: list[States]) -> Tensor:
    """Largest magnitude in each hidden state [L + 2] over all utterances; NaN stays NaN."""
    return torch.stack([torch.stack([state.abs().max() for state in row]) for row in states]).amax(0)


@command
def main(default_model: str = DEFAULT_MODEL) -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_function_arguments(convert, as_group=False, as_positional=False)
    parser.set_defaults(model=default_model)
    convert(**vars(parse_arguments(parser)))


if __name__ == "__main__":
    main()
