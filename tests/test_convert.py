"""The conversion commands on tiny models saved by transformers: outputs, parity check and every wrong turn."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchaudio
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    PreTrainedModel,
    UniSpeechConfig,
    UniSpeechForCTC,
    UniSpeechForPreTraining,
    UniSpeechForSequenceClassification,
    UniSpeechModel,
    UniSpeechSatConfig,
    UniSpeechSatForPreTraining,
    UniSpeechSatForXVector,
    UniSpeechSatModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    Wav2Vec2Processor,
    WavLMConfig,
    WavLMModel,
)

import convert_from_checkpoint
import convert_hubert_from_hf
from distillation.errors import UserError
from distillation.originals import describe_original
from exporting import originals
from tests.helpers import HF_BASE, HF_LARGE, TORCHAUDIO_SIZE, tiny_hf
from wav2vec2 import CheckpointError, load_model, save_model, wav2vec2_model
from wav2vec2.checkpoint import load_checkpoint
from wav2vec2.importers import ImportedModel
from wav2vec2.importers.huggingface import NORMALIZE_EPS

Run = Callable[..., str]


# with long strides: fewer frames of the clip that is compared
tiny = functools.partial(tiny_hf, conv_kernel=(10, 8, 4), conv_stride=(5, 8, 4))


@pytest.fixture
def hubert(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-hubert"
    tiny(HubertModel, HubertConfig, **HF_BASE).save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command as from the shell; returns what it printed. With ``fails`` it must exit with 2 and one line."""

    def call(*arguments: object, script: object = convert_hubert_from_hf, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        if not fails:
            script.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as exit_:
            script.main()
        error = capsys.readouterr().err
        assert exit_.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return call


@pytest.mark.parametrize(
    ("model_class", "config_class", "options"),
    [
        (HubertModel, HubertConfig, HF_BASE),
        (Wav2Vec2Model, Wav2Vec2Config, HF_LARGE),
        (WavLMModel, WavLMConfig, HF_BASE),
        (WavLMModel, WavLMConfig, HF_LARGE),
        (HubertModel, HubertConfig, HF_BASE | {"feat_proj_layer_norm": False}),
        (UniSpeechModel, UniSpeechConfig, HF_LARGE),
        (UniSpeechSatModel, UniSpeechSatConfig, HF_BASE),
    ],
    ids=["hubert base", "wav2vec2 xls-r", "wavlm base", "wavlm large", "distilhubert", "unispeech", "unispeech-sat"],
)
def test_every_kind_converts_with_parity(run: Run, tmp_path: Path, model_class, config_class, options) -> None:
    original = tiny(model_class, config_class, **options)
    original.save_pretrained(tmp_path / "teacher")
    out = tmp_path / "new" / "teacher.pth"
    printed = run("--model", tmp_path / "teacher", "--out", out)
    assert [line.split()[0] for line in printed.splitlines()] == [
        *("largest", "feature", "layer", "layer", "output", "over")
    ]
    assert float(printed.split()[-1]) < 1e-4

    checkpoint = load_checkpoint(out)
    assert checkpoint.config["normalize_waveform"] == (NORMALIZE_EPS if options is HF_LARGE else False)
    assert not any(value for key, value in checkpoint.config.items() if "_prune_" in key)
    assert torch.equal(checkpoint.extra["mask_embedding"], original.masked_spec_embed)
    inputs = Wav2Vec2FeatureExtractor(do_normalize=options is HF_LARGE)
    waveform = torch.randn(20_000) * 1e-3
    values = inputs(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        expected = original(values).last_hidden_state
        torch.testing.assert_close(checkpoint.model(waveform[None])[0], expected, atol=1e-4, rtol=1e-4)
    assert os.listdir(out.parent) == ["teacher.pth"]  # noqa: PTH208


def test_default_name(run: Run, hubert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hubert.parent)
    run("--model", "tiny-hubert/")
    assert load_model("pretrained/tiny-hubert.hf.pth").num_layers == 2


def source(path: object) -> dict[str, object]:
    return load_checkpoint(path).extra["source"]


def test_a_file_names_its_source(run: Run, hubert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digests = [hashlib.sha256((hubert / name).read_bytes()).digest() for name in ("config.json", "model.safetensors")]
    content = {"revision": None, "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}
    relative = f"../{tmp_path.name}/tiny-hubert"
    for given, name in ((hubert, "tiny-hubert"), ("tiny-hubert/", "tiny-hubert"), (relative, relative)):
        run("--model", given, "--out", "out.pth")
        assert source("out.pth") == {"id": name, **content}
    save_model("out.safetensors", load_model("out.pth"), **load_checkpoint("out.pth").extra)
    assert source("out.safetensors") == source("out.pth")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a snapshot of a model into a cache of the hub, which cannot be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def put(name: str, commit: str, **options: object) -> Path:
        folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        tiny(HubertModel, HubertConfig, **HF_BASE, **options).save_pretrained(folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return folder / "snapshots" / commit

    return put


def test_two_models_of_one_name_on_the_hub(run: Run, hub: Callable[..., Path]) -> None:
    hub("one/tiny", "a" * 40)
    hub("two/tiny", "b" * 40, intermediate_size=40)
    run("--model", "one/tiny")
    out = Path("pretrained/tiny.hf.pth")
    assert (source(out)["id"], source(out)["revision"]) == ("one/tiny", "a" * 40)
    message = f"{out} was converted from one/tiny at aaaaaaa, not from two/tiny: give another file by --out, or remove"
    before = out.read_bytes()
    assert message in run("--model", "two/tiny", fails=True)
    assert "not from torchaudio:HUBERT_BASE" in run("--model", "torchaudio:HUBERT_BASE", "--out", out, fails=True)
    assert out.read_bytes() == before
    run("--model", "two/tiny", "--out", "pretrained/two.pth")
    hub("one/tiny", "c" * 40, num_hidden_layers=1)  # a later commit
    run("--model", "one/tiny")
    assert source(out)["revision"] == "c" * 40 and load_model(out).num_layers == 1


def test_what_a_conversion_may_replace(run: Run, hubert: Path, tmp_path: Path) -> None:
    """The same folder's own file, what names no source, what is damaged; not what the folder held before."""
    out = tmp_path / "out.pth"
    out.write_text("damaged")
    run("--model", hubert, "--out", out)
    run("--model", hubert, "--out", out, "--normalize", "yes")
    assert load_model(out).normalize_waveform
    tiny(HubertModel, HubertConfig, intermediate_size=40, **HF_BASE).save_pretrained(hubert)
    error = run("--model", hubert, "--out", out, fails=True)
    assert f"{out} was converted from tiny-hubert, which has changed since" in error
    save_model(out, load_model(out))
    run("--model", hubert, "--out", out)
    assert load_model(out).config["encoder_ff_interm_features"] == [40, 40]


def test_fine_tuned_half_precision_and_sharded(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = tiny(HubertForCTC, HubertConfig, **HF_LARGE).half()
    original.save_pretrained(tmp_path / "ctc", max_shard_size="20KB")
    assert len(list((tmp_path / "ctc").glob("*.safetensors"))) > 1
    with caplog.at_level("INFO"):
        run("--model", tmp_path / "ctc", "--out", tmp_path / "ctc.pth")
    assert "lm_head.bias, lm_head.weight" in caplog.text
    weight = load_model(tmp_path / "ctc.pth").encoder.feature_projection.projection.weight
    assert torch.equal(weight, original.hubert.feature_projection.projection.weight.float())


@pytest.mark.parametrize(
    ("model_class", "config_class", "options", "head"),
    [
        (UniSpeechForCTC, UniSpeechConfig, HF_LARGE, "lm_head.bias, lm_head.weight"),
        (UniSpeechForPreTraining, UniSpeechConfig, HF_BASE, "project_hid.bias"),
        (UniSpeechForSequenceClassification, UniSpeechConfig, HF_BASE, "classifier.bias, classifier.weight"),
        (
            UniSpeechSatForPreTraining,
            UniSpeechSatConfig,
            HF_LARGE,
            "label_embeddings_concat, layer_norm_for_extract.bias",
        ),
        (UniSpeechSatForXVector, UniSpeechSatConfig, HF_BASE, "feature_extractor.bias, feature_extractor.weight"),
    ],
)
def test_heads_of_unispeech_are_dropped_by_name(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, model_class: type[PreTrainedModel], config_class: type,
    options: dict[str, object], head: str,
) -> None:  # fmt: skip
    original = tiny(model_class, config_class, num_codevectors_per_group=4, codevector_dim=8, **options)
    original.save_pretrained(tmp_path / "teacher")
    with caplog.at_level("INFO"):
        printed = run("--model", tmp_path / "teacher", "--out", tmp_path / "out.pth")
    assert float(printed.split()[-1]) < 1e-4
    assert "dropped the head of" in caplog.text and head in caplog.text


def test_the_adapter_after_the_encoder_is_dropped(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny(Wav2Vec2Model, Wav2Vec2Config, add_adapter=True, num_adapter_layers=1, **HF_LARGE).save_pretrained(
        tmp_path / "st"
    )
    with caplog.at_level("INFO"):
        run("--model", tmp_path / "st", "--out", tmp_path / "st.pth")
    assert "adapter.layers.0.conv.weight" in caplog.text


def as_bin(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def test_bin_weights(run: Run, hubert: Path, tmp_path: Path) -> None:
    state = dict(HubertModel.from_pretrained(hubert).state_dict())
    stem = "encoder.pos_conv_embed.conv."
    state[stem + "weight_g"] = state.pop(stem + "parametrizations.weight.original0")
    state[stem + "weight_v"] = state.pop(stem + "parametrizations.weight.original1")
    as_bin(hubert, state)
    run("--model", hubert, "--out", tmp_path / "out.pth")
    load_model(tmp_path / "out.pth")


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.witness}",)


def test_code_in_the_weights_is_refused_and_not_run(run: Run, hubert: Path, tmp_path: Path) -> None:
    as_bin(hubert, {"encoder.layer_norm.weight": Evil(tmp_path / "witness")})
    error = run("--model", hubert, "--out", tmp_path / "out.pth", fails=True)
    assert "pytorch_model.bin" in error and "refused" in error
    torch.save({"cfg": {}, "model": Evil(tmp_path / "witness")}, tmp_path / "evil.pt")
    error = run("--checkpoint", tmp_path / "evil.pt", script=convert_from_checkpoint, fails=True)
    assert "evil.pt: refused, nothing was run: its pickle calls" in error and "system" in error
    assert not (tmp_path / "witness").exists() and not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_download(run: Run, hubert: Path, tmp_path: Path, name: str) -> None:
    if name.endswith(".bin"):
        as_bin(hubert, HubertModel.from_pretrained(hubert).state_dict())
    content = (hubert / name).read_bytes()
    (hubert / name).write_bytes(content[: len(content) // 2])
    error = run("--model", hubert, "--out", tmp_path / "out.pth", fails=True)
    assert name in error and "truncated" in error and not (tmp_path / "out.pth").exists()


def test_missing_shard_and_shard_outside_the_folder(run: Run, hubert: Path) -> None:
    (hubert / "model.safetensors").unlink()
    index = hubert / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "model-1.safetensors: no such file" in run("--model", hubert, fails=True)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "does not name files of this folder" in run("--model", hubert, fails=True)
    index.write_text(json.dumps({"weight_map": [["a"]]}))
    assert "does not name files of this folder" in run("--model", hubert, fails=True)
    index.unlink()
    assert "no weights; expected one of model.safetensors" in run("--model", hubert, fails=True)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dac"}, "config.json: model_type 'dac' is not supported; valid: hubert, unispeech"),
        (
            {"model_type": "whisper"},
            "config.json: model_type whisper: spectrograms as input, and a decoder; valid: hubert",
        ),
        ({"num_hidden_layers": 3}, "transformer.layers.2.attention"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"intermediate_size": 40}, "feed_forward"),
        ({"hidden_size": "wide"}, "config"),
    ],
)
def test_config_that_does_not_fit(run: Run, hubert: Path, tmp_path: Path, changes: dict, message: str) -> None:
    edit_config(hubert, **changes)
    error = run("--model", hubert, "--out", tmp_path / "out.pth", fails=True)
    assert message in error and str(hubert) in error and not (tmp_path / "out.pth").exists()


def test_preprocessor(run: Run, hubert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out.pth"
    preprocessor = hubert / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({"sampling_rate": 8000}))
    assert "sampling_rate is 8000; only models of 16000 Hz" in run("--model", hubert, "--out", out, fails=True)
    preprocessor.write_text("{")
    assert "not valid JSON" in run("--model", hubert, "--out", out, fails=True)
    preprocessor.write_text(json.dumps({"sampling_rate": 16000, "do_normalize": True}))
    run("--model", hubert, "--out", out)
    assert "do_normalize=true, the converted model has normalize_waveform=false" in caplog.text
    assert not load_model(out).normalize_waveform
    caplog.clear()
    run("--model", hubert, "--out", out, "--normalize", "yes")
    assert not caplog.text and load_model(out).normalize_waveform


def test_settings_that_a_processor_wrote(
    run: Run, hubert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Since transformers 5 they stand in another file, nested."""
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "<unk>": 2}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=True), tokenizer).save_pretrained(hubert)
    assert not (hubert / "preprocessor_config.json").exists()
    run("--model", hubert, "--out", tmp_path / "out.pth")
    assert f"{hubert / 'processor_config.json'} says do_normalize=true, the converted model has" in caplog.text
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(sampling_rate=8000), tokenizer).save_pretrained(hubert)
    error = run("--model", hubert, "--out", tmp_path / "out.pth", fails=True)
    assert f"{hubert / 'processor_config.json'}: sampling_rate is 8000; only models of 16000 Hz" in error


def test_a_teacher_is_described_before_it_is_converted(run: Run, hub: Callable[..., Path], tmp_path: Path) -> None:
    """As its conversion will be, from the settings alone."""
    folder = hub("one/tiny", "a" * 40)
    run("--model", "one/tiny", "--out", tmp_path / "out.pth")
    (folder / "model.safetensors").write_text("damaged")
    expected = load_checkpoint(tmp_path / "out.pth").config
    assert describe_original("one/tiny") == describe_original(str(folder)) == expected
    (folder / "model.safetensors").unlink()
    assert describe_original("one/tiny") == expected
    with pytest.raises(CheckpointError, match=f"^{folder}: no weights; expected one of model.safetensors"):
        describe_original(str(folder))


def test_every_bundle_can_be_described() -> None:
    """Nothing is fetched."""
    for name, bundle in vars(torchaudio.pipelines).items():
        if hasattr(bundle, "_normalize_waveform"):
            config = describe_original(f"torchaudio:{name}")
            assert config["normalize_waveform"] is bundle._normalize_waveform
            with torch.device("meta"):
                assert wav2vec2_model(**config).num_layers == bundle._params["encoder_num_layers"]
    with pytest.raises(UserError, match=r"^torchaudio:NONE: no such bundle in torchaudio\.pipelines; valid: "):
        describe_original("torchaudio:NONE")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "config.json",
            {"model_type": "sew-d"},
            "config.json: model_type sew-d: frames squeezed before the Transformer",
        ),
        ("config.json", {"hidden_act": "relu"}, "hidden_act='relu' in its config is not supported"),
        ("config.json", {"adapter_attn_dim": 16}, "adapter_attn_dim=16"),
        ("config.json", {"hidden_size": "wide"}, "its config.json is not valid: "),
        ("config.json", {"num_attention_heads": 5}, "5 attention heads do not divide the width 24"),
        (
            "config.json",
            {"num_conv_pos_embedding_groups": 5},
            "its config builds no model: no positional convolution of",
        ),
        ("config.json", {"layerdrop": 2.0}, "its config builds no model: encoder_layer_drop must lie between 0 and 1"),
        ("processor_config.json", {"feature_extractor": {"sampling_rate": 8000}}, "sampling_rate is 8000"),
        ("preprocessor_config.json", {"feature_extractor": []}, "its feature_extractor is no JSON object"),
        ("model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}}, "b.safetensors: no such file"),
    ],
)
def test_what_a_conversion_would_refuse_is_not_described(
    run: Run, hubert: Path, name: str, changes: dict[str, object], message: str
) -> None:
    path = hubert / name
    if "index" in name:
        (hubert / "model.safetensors").unlink()
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    with pytest.raises(CheckpointError) as error:
        describe_original(str(hubert))
    assert str(error.value).startswith(str(hubert)) and message in str(error.value) and "\n" not in str(error.value)
    assert run("--model", hubert, fails=True)


def test_no_such_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert f"{tmp_path / 'none'}: no such folder" in run("--model", tmp_path / "none", fails=True)
    assert "org/name is no local folder and could not be fetched" in run("--model", "org/name", fails=True)
    (tmp_path / "file.pt").touch()
    assert "convert_from_checkpoint.py" in run("--model", tmp_path / "file.pt", fails=True)
    assert "config.json: no such file" in run("--model", tmp_path, fails=True)
    for model in ("none", "org/name", "file.pt", ""):
        with pytest.raises(CheckpointError, match=r"no such folder|could not be fetched|is a file|no such file"):
            describe_original(str(tmp_path / model) if model != "org/name" else model)
    assert "none.pt: no such file" in run(
        "--checkpoint", tmp_path / "none.pt", script=convert_from_checkpoint, fails=True
    )


def test_another_constant_in_the_normalisation_is_seen(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(HubertModel, HubertConfig, **HF_LARGE).save_pretrained(tmp_path / "large")
    monkeypatch.setattr("wav2vec2.importers.huggingface.NORMALIZE_EPS", 1e-5)
    assert "original and converted differ by" in run("--model", tmp_path / "large", fails=True)


def test_a_head_of_unknown_name(run: Run, hubert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in ContentVec's folders, where it stands beside a backbone without prefix."""
    head = {"final_proj.weight": torch.zeros(16, 24), "final_proj.bias": torch.zeros(16), "final_proj.size": 16}
    as_bin(hubert, HubertModel.from_pretrained(hubert).state_dict() | head)
    with caplog.at_level("INFO"):
        run("--model", hubert, "--out", tmp_path / "out.pth")
    assert "final_proj.bias, final_proj.size, final_proj.weight" in caplog.text and load_model(tmp_path / "out.pth")


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_a_conversion_that_differs_is_not_saved(
    run: Run, hubert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    right = originals.import_huggingface

    def wrong(*args: object) -> ImportedModel:
        imported = right(*args)
        imported.state_dict["encoder.transformer.layers.1.attention.v_proj.bias"] += value
        return imported

    monkeypatch.setattr(originals, "import_huggingface", wrong)
    error = run("--model", hubert, "--out", tmp_path / "out.pth", fails=True)
    assert "original and converted differ by" in error and not (tmp_path / "out.pth").exists()


def test_large_activations_are_compared_relative_to_their_size(run: Run, tmp_path: Path) -> None:
    original = tiny(HubertModel, HubertConfig, **HF_LARGE)
    with torch.no_grad():
        original.encoder.layers[0].feed_forward.output_dense.weight *= 1e4
    original.save_pretrained(tmp_path / "teacher")
    printed = run("--model", tmp_path / "teacher", "--out", tmp_path / "out.pth")
    assert float(printed.split()[-1]) > 1e-4 and load_model(tmp_path / "out.pth")


@pytest.mark.parametrize("normalize", [False, True])
def test_torchaudio_bundle(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: bool) -> None:
    params = torchaudio.pipelines.WAVLM_BASE._params | TORCHAUDIO_SIZE
    bundle = torchaudio.pipelines.Wav2Vec2Bundle("tiny.pth", params, 16_000, normalize, "WavLM")
    state = torchaudio.models.wavlm_model(**params).state_dict()

    def fetched(dl_kwargs: dict) -> dict:
        assert dl_kwargs == {"weights_only": True}
        return state

    monkeypatch.setattr(bundle, "_get_state_dict", fetched)
    monkeypatch.setattr(torchaudio.pipelines, "TINY", bundle, raising=False)
    printed = run("--model", "torchaudio:TINY", "--out", tmp_path / "out.pth")
    assert float(printed.split()[-1]) < 1e-4
    assert load_model(tmp_path / "out.pth").normalize_waveform is normalize
    named = source(tmp_path / "out.pth")
    assert (named["id"], named["revision"], len(named["sha256"])) == ("torchaudio:TINY", None, 64)
    assert "HUBERT_BASE" in run("--model", "torchaudio:NONE", fails=True)


def test_fairseq_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The layouts themselves are tested with the importer; here, one file through the command."""
    channels, width, interm = 8, 16, 20
    shapes = {"mask_emb": (width,), "label_embs_concat": (4, 8)}
    shapes |= {
        "feature_extractor.conv_layers.0.0.weight": (channels, 1, 10),
        "post_extract_proj.weight": (width, channels),
    }
    shapes |= {f"feature_extractor.conv_layers.0.2.{kind}": (channels,) for kind in ("weight", "bias")}
    shapes |= {f"layer_norm.{kind}": (channels,) for kind in ("weight", "bias")}
    shapes |= {"encoder.pos_conv.0.weight_g": (1, 1, 4), "encoder.pos_conv.0.weight_v": (width, width // 2, 4)}
    layer = "encoder.layers.0."
    vectors = [
        "post_extract_proj.bias",
        "encoder.pos_conv.0.bias",
        "encoder.layer_norm.weight",
        "encoder.layer_norm.bias",
    ]
    vectors += [
        f"{layer}{norm}.{kind}" for norm in ("self_attn_layer_norm", "final_layer_norm") for kind in ("weight", "bias")
    ]
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"{layer}self_attn.{projection}.weight"] = (width, width)
        vectors.append(f"{layer}self_attn.{projection}.bias")
    shapes |= {
        f"{layer}fc1.weight": (interm, width),
        f"{layer}fc2.weight": (width, interm),
        f"{layer}fc1.bias": (interm,),
    }
    shapes |= {name: (width,) for name in [*vectors, f"{layer}fc2.bias"]}
    model = {"_name": "hubert", "extractor_mode": "default", "conv_feature_layers": "[(8, 10, 5)]", "conv_bias": False}
    model |= {"encoder_layers": 1, "encoder_embed_dim": width, "encoder_ffn_embed_dim": interm, "conv_pos": 4}
    model |= {"encoder_attention_heads": 2, "layer_norm_first": False, "conv_pos_groups": 2, "encoder_layerdrop": 0.1}
    model |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "dropout_input"), 0.1)
    content = {
        "cfg": {"model": model, "task": {"normalize": True}},
        "model": {k: torch.rand(s) for k, s in shapes.items()},
    }
    monkeypatch.chdir(tmp_path)
    torch.save(content, "tiny.pt")
    with caplog.at_level("INFO"):
        run("--checkpoint", "tiny.pt", script=convert_from_checkpoint)
    assert "tiny.pt is a model of fairseq, cfg layout" in caplog.text
    assert "dropped from tiny.pt: label_embs_concat\n" in caplog.text and "tensors saved, 1 dropped" in caplog.text
    checkpoint = load_checkpoint("pretrained/tiny.fairseq.pth")
    assert checkpoint.model.normalize_waveform
    assert torch.equal(checkpoint.extra["mask_embedding"], content["model"]["mask_emb"])
    digest = hashlib.sha256(hashlib.sha256(Path("tiny.pt").read_bytes()).digest()).hexdigest()
    assert checkpoint.extra["source"] == {"id": "tiny.pt", "revision": None, "sha256": digest}
    run("--checkpoint", "tiny.pt", script=convert_from_checkpoint)
    content["model"]["encoder.layer_norm.weight"][0] = 0.5
    Path("other").mkdir()
    torch.save(content, "other/tiny.pt")
    error = run("--checkpoint", "other/tiny.pt", script=convert_from_checkpoint, fails=True)
    assert "pretrained/tiny.fairseq.pth was converted from tiny.pt, not from other/tiny.pt: give another file" in error
    content["model"]["encoder.layer_norm.weight"][0] = float("nan")
    torch.save(content, "nan.pt")
    assert "not finite" in run("--checkpoint", "nan.pt", script=convert_from_checkpoint, fails=True)
    assert not Path("pretrained/nan.fairseq.pth").exists()
    error = run("--checkpoint", "tiny.pt", "--config", "tiny.yaml", script=convert_from_checkpoint, fails=True)
    assert "tiny.pt is a model of fairseq, cfg layout, which holds its own settings: leave --config out" in error
    error = run("--checkpoint", "pretrained/tiny.fairseq.pth", script=convert_from_checkpoint, fails=True)
    assert "pretrained/tiny.fairseq.pth: a model of this toolkit, it needs no conversion" in error
