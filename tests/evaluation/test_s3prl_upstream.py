"""What s3prl is given: states, heads, padding, short clips; and the stand-ins for what its libraries have dropped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from evaluation import s3prl_compat as compat
from evaluation.s3prl_libriphone import LibriPhoneDataset
from evaluation.s3prl_upstream import UpstreamExpert, entry
from tests.configs import TINY
from tests.helpers import ROOT
from wav2vec2 import load_model, save_model, wav2vec2_model

KINDS = {
    "plain": {},
    "time reduction": {"encoder_time_reduction": 2},
    "map reuse": {"encoder_reuse_attention": [False, True] * 2, "encoder_layer_drop": 0.0},
    "masked": {"encoder_prune_attention_heads": True, "encoder_prune_feed_forward_intermediate": True},
}


def expert(tmp_path: Path, **changes) -> UpstreamExpert:
    torch.manual_seed(0)
    model = wav2vec2_model(**{**TINY, **changes})
    for mask in model.masks().values():
        torch.nn.init.normal_(mask.log_alpha, 0.0, 2.0)
    save_model(tmp_path / "final.pth", model)
    return entry(str(tmp_path / "final.pth"), model_config=None, refresh=False)


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


def test_heads_are_offered_where_there_is_one_per_layer(tmp_path):
    torch.manual_seed(0)
    heads = {}
    for i in range(4):
        heads |= {
            f"masking.heads.{i}.linear.weight": torch.randn(40, 24),
            f"masking.heads.{i}.linear.bias": torch.randn(40),
        }
    save_model(tmp_path / "arm.pth", wav2vec2_model(**TINY), heads)
    upstream = entry(str(tmp_path / "arm.pth"))
    with torch.no_grad():
        result = upstream([torch.randn(4000)])
    assert len(result["heads"]) == 4
    for i, found in enumerate(result["heads"]):
        expected = result["hidden_states"][i + 1] @ heads[f"masking.heads.{i}.linear.weight"].t()
        torch.testing.assert_close(found, expected + heads[f"masking.heads.{i}.linear.bias"])
    save_model(tmp_path / "dp.pth", wav2vec2_model(**TINY), dict(list(heads.items())[:4]))  # two heads, four layers
    assert "heads" not in entry(str(tmp_path / "dp.pth"))([torch.randn(4000)])


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
