"""What s3prl is given: states, heads, padding, short clips; and the stand-ins for what its libraries have dropped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import HubertConfig, HubertModel

from distillation.errors import UserError
from evaluation import s3prl_compat as compat
from evaluation.s3prl_libriphone import LibriPhoneDataset
from evaluation.s3prl_upstream import UpstreamExpert, entry
from tests.configs import TINY
from tests.helpers import HF_BASE, HF_LARGE, ROOT, tiny_hf
from tests.released_students import TINY as TINY_STUDENTS
from tests.released_students import lightning, released_heads, released_states, settings_file, student_state
from wav2vec2 import load_model, save_model, wav2vec2_model
from wav2vec2.checkpoint import model_from_state
from wav2vec2.importers import import_huggingface, import_student

KINDS = {
    "plain": {},
    "time reduction": {"encoder_time_reduction": 2},
    "map reuse": {"encoder_reuse_attention": [False, True] * 2, "encoder_layer_drop": 0.0},
    "second softmax": {
        "encoder_reuse_attention": [False, True] * 2,
        "encoder_reuse_softmax": True,
        "encoder_layer_drop": 0.0,
    },
    "no norm": {"encoder_projection_layer_norm": False},
    "masked": {"encoder_prune_attention_heads": True, "encoder_prune_feed_forward_intermediate": True},
}


def expert(tmp_path: Path, **changes) -> UpstreamExpert:
    torch.manual_seed(0)
    model = wav2vec2_model(**{**TINY, **changes})
    for mask in model.masks().values():
        torch.nn.init.normal_(mask.log_alpha, 0.0, 2.0)
    save_model(tmp_path / "final.pth", model)
    return entry("dphubert", str(tmp_path / "final.pth"), model_config=None, refresh=False)


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_every_kind(kind, tmp_path):
    upstream = expert(tmp_path, **KINDS[kind])
    wavs = [torch.randn(n) for n in (16_000, 7_000, 800)]
    with torch.no_grad():
        states = upstream(wavs)["hidden_states"]
    assert len(states) == 5 and {tuple(state.shape) for state in states} == {(3, 49, 24)}
    assert upstream.get_downsample_rates("hidden_states") == 320
    reference = load_model(tmp_path / "final.pth")
    for row, wav in enumerate(wavs):  # each row alone, and its last frame again after its end
        expected, _ = reference.extract_features(wav[None])
        for state, alone in zip(states, expected, strict=True):
            torch.testing.assert_close(state[row, : alone.shape[1]], alone[0], atol=2e-5, rtol=1e-4)
            assert torch.equal(
                state[row, alone.shape[1] :], state[row, alone.shape[1] - 1].expand(49 - alone.shape[1], -1)
            )


def test_deterministic_in_eval_and_trainable(tmp_path):
    upstream = expert(tmp_path, **KINDS["masked"], encoder_dropout=0.1)
    wavs = [torch.randn(8000)]
    assert not upstream.training or not upstream.model.training
    upstream.eval()
    assert torch.equal(upstream(wavs)["last_hidden_state"], upstream(wavs)["last_hidden_state"])
    upstream.train()
    states = upstream(wavs)["hidden_states"]
    assert len(states) == 5
    states[-1].sum().backward()
    assert upstream.model.encoder.transformer.layers[0].attention.q_proj.weight.grad is not None
    assert not upstream.model.masks()  # the dense model is trained


def test_clips_shorter_than_the_receptive_field(tmp_path):
    states = expert(tmp_path)([torch.randn(50), torch.randn(300)])["hidden_states"]
    assert states[0].shape == (2, 1, 24) and states[-1].isfinite().all()


def released(name: str, tmp_path: Path) -> tuple[dict, dict]:
    """An imported student in ``final.pth``; its tensors and settings there."""
    settings = TINY_STUDENTS[name]
    tensors = student_state(settings)
    found = import_student(lightning(tensors), settings_file(settings))
    save_model(tmp_path / "final.pth", model_from_state(found.config, found.state_dict, name), found.heads)
    return {key: tensor.double() for key, tensor in tensors.items()}, settings


@pytest.mark.parametrize("num_frames", [12, 13])
@pytest.mark.parametrize(
    ("name", "upstream"),
    [("fithubert", "fithubert"), ("starhubert", "starhubert"), ("maskhubert", "maskhubert"), ("armhubert", "armhubert"),
     ("armwavlm", "armwavlm")],
)  # fmt: skip
def test_the_released_experts_states(name, upstream, num_frames, tmp_path):
    """As many as layers: these, or their heads where those were published; FitHuBERT's held at the full rate."""
    tensors, settings = released(name, tmp_path)
    wav = torch.randn(400 + 320 * (num_frames - 1))
    layers = released_states(tensors, settings, wav[None].double())[1:]
    heads = released_heads(tensors, layers) if name != "starhubert" else []
    with torch.no_grad():
        result = entry(upstream, str(tmp_path / "final.pth"))([wav])
    if name == "fithubert":
        layers = [layer.repeat_interleave(2, 1) for layer in layers]
    expected = layers if name in ("fithubert", "starhubert") else heads
    assert len(result["hidden_states"]) == len(expected) == settings["encoder_layers"]
    for states, reference in ((result["hidden_states"], expected), (result.get("heads", []), heads)):
        for ours, theirs in zip(states, reference, strict=True):
            covered = theirs.shape[1]  # an odd last frame is lost there, and the one before again here
            assert ours.shape[1] == num_frames and covered == num_frames - (num_frames % 2 and name == "fithubert")
            torch.testing.assert_close(ours[:, :covered].double(), theirs, atol=1e-4, rtol=1e-4)
            assert (ours[:, covered:] == ours[:, covered - 1 : covered]).all()
    assert result["last_hidden_state"] is result["hidden_states"][-1]


@pytest.mark.parametrize("name", ["fithubert", "maskhubert"])
def test_heads_of_a_padded_row_are_those_of_the_row_alone(name, tmp_path):
    released(name, tmp_path)
    upstream = entry("dphubert", str(tmp_path / "final.pth"))
    wavs = [torch.randn(n) for n in (8000, 400 + 320 * 12, 700, 400)]
    with torch.no_grad():
        padded = upstream(wavs)["heads"]
        for row, wav in enumerate(wavs):
            for ours, alone in zip(padded, upstream([wav])["heads"], strict=True):
                torch.testing.assert_close(ours[row, : alone.shape[1]], alone[0], atol=2e-5, rtol=1e-4)
                assert (ours[row, alone.shape[1] :] == ours[row, alone.shape[1] - 1]).all()


def test_files_without_the_heads_of_all_layers(tmp_path):
    save_model(tmp_path / "dp.pth", wav2vec2_model(**TINY), {"0.linear.weight": torch.randn(40, 24)})
    assert "heads" not in entry("dphubert", str(tmp_path / "dp.pth"))([torch.randn(4000)])
    with pytest.raises(UserError, match=r"dp.pth: holds no heads for all of its layers, .*: use -u dphubert"):
        entry("armhubert", str(tmp_path / "dp.pth"))


@torch.no_grad()
@pytest.mark.parametrize("large", [False, True])
def test_a_teachers_states_are_what_s3prl_gives_of_a_teacher(large, tmp_path):
    """The input of every layer, and the encoder's output: after the positional convolution, and the final norm."""
    torch.manual_seed(0)
    options = HF_LARGE if large else HF_BASE
    original = tiny_hf(HubertModel, HubertConfig, **options)
    found = import_huggingface(original.config.to_dict(), original.state_dict(), normalize_waveform=False)
    save_model(tmp_path / "teacher.pth", model_from_state(found.config, found.state_dict, "x"))
    states: list[torch.Tensor] = []
    for layer in original.encoder.layers:
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0].clone()))
    wav = torch.randn(5000)
    last = original(wav[None]).last_hidden_state
    ours = entry("teacher", str(tmp_path / "teacher.pth"))([wav])["hidden_states"]
    for state, expected in zip(ours, [*states, last], strict=True):
        torch.testing.assert_close(state, expected, atol=2e-5, rtol=1e-4)


# Stand-ins


def test_effects():
    wave = torch.randn(2, 8000) * 0.1
    mono, rate = compat.apply_effects_tensor(wave, 8000, [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]])
    assert mono.shape == (1, 16_000) and rate == 16_000
    torch.testing.assert_close(
        mono.pow(2).mean().sqrt(), wave.mean(0).pow(2).mean().sqrt() * 10 ** (-3 / 20), rtol=0.1, atol=0
    )
    loud, _ = compat.apply_effects_tensor(wave, 8000, [["norm", "-6"]])
    assert loud.abs().max().item() == pytest.approx(10 ** (-6 / 20), rel=1e-5)
    clipped, _ = compat.apply_effects_tensor(wave.t(), 8000, [["gain", "60"]], channels_first=False)
    assert clipped.shape == (8000, 2) and clipped.abs().max() == 1


def test_other_effects_need_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(compat.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"'silence 1 0\.1 1%' needs the program sox"):
        compat.apply_effects_tensor(torch.zeros(1, 100), 16_000, [["silence", "1", "0.1", "1%"]])
    program = tmp_path / "sox"  # reverses, as sox would
    program.write_text(
        f"#!{sys.executable}\nimport soundfile, sys\nassert sys.argv[-1] == 'reverse'\n"
        "x, r = soundfile.read(sys.argv[1], dtype='float32')\n"
        "soundfile.write(sys.argv[6], x[::-1], r, subtype='FLOAT')\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(compat.shutil, "which", lambda name: str(program))
    wave = torch.linspace(-0.5, 0.5, 100)[None]
    found, rate = compat.apply_effects_tensor(wave, 16_000, [["reverse"]])
    torch.testing.assert_close(found, wave.flip(1))
    assert rate == 16_000


def test_audio_files(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (400, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    assert compat.info(tmp_path / "a.wav") == (8000, 400, 2, 32, "FLOAT")
    wave, rate = compat.load(tmp_path / "a.wav", 100, 50)
    assert rate == 8000 and torch.equal(wave, torch.from_numpy(samples[100:150]).t())
    compat.save(tmp_path / "b.wav", wave, 8000)
    torch.testing.assert_close(compat.load(tmp_path / "b.wav")[0], wave, atol=1e-4, rtol=0)


def test_distributed_sampler_shares_what_another_draws():
    parts = [list(compat.DistributedSamplerWrapper([5, 6, 7, 8], 2, rank, shuffle=False)) for rank in (0, 1)]
    assert parts == [[5, 7], [6, 8]]


def test_libriphone(tmp_path, noise):
    folder = tmp_path / "dev-clean" / "1" / "2"
    for i in range(3):
        noise(folder / f"1-2-{i:04d}.flac", 0.5 + 0.1 * i, i)
    (folder / "1-2.trans.txt").write_text("1-2-0000 A CAB\n1-2-0001 CAB\n1-2-0002 A\n")
    (tmp_path / "lexicon").write_text("A AH\nA EY\nCAB K AE B\n")

    class Tokenizer:
        def encode(self, text: str) -> str:
            return text

    def make(bucket: int, lexicon: str = "lexicon") -> LibriPhoneDataset:
        return LibriPhoneDataset(["dev-clean"], Tokenizer(), bucket, str(tmp_path), [str(tmp_path / lexicon)])

    single = make(1)
    assert [phones for _, phones in (single[i] for i in range(len(single)))] == ["AH", "K AE B", "AH K AE B"]
    assert Path(single[0][0]).name == "1-2-0002.flac"
    assert [len(make(2)[i]) for i in range(len(make(2)))] == [2, 2]
    (tmp_path / "small").write_text("A AH\n")
    with pytest.raises(ValueError, match="CAB is in none of the lexicon files"):
        make(1, "small")


@pytest.mark.slow
def test_without_s3prl_one_line():
    code = "import sys; sys.modules['pandas'] = None; from evaluation.s3prl_upstream import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "s3prl.main"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].endswith("pip install -r requirements/s3prl.txt")
    usage = subprocess.run(
        [sys.executable, "-m", "evaluation.s3prl_upstream", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert usage.returncode == 0 and "s3prl.run_downstream -u dphubert" in usage.stdout
