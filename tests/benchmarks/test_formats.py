"""The table of formats: a whole run on tiny models, and the processes that time."""

from __future__ import annotations

import json
import signal
import sys
import xml.etree.ElementTree

import pytest
import torch

from benchmarks import formats
from benchmarks.format_runs import OPEN, real_time_factors
from distillation.errors import UserError
from distillation.stopping import Signalled, Stopped
from exporting import onnx, verify
from tests.configs import TINY, first_layers
from wav2vec2 import load_model, save_model, wav2vec2_model


@pytest.mark.slow
def test_a_run(trace_once, exported_here, small, tmp_path, monkeypatch, capsys, caplog):
    pytest.importorskip("onnxscript", reason="requirements/export.txt")
    model = wav2vec2_model(**first_layers(TINY, 1))
    save_model(small / "final.pth", model)
    monkeypatch.setattr(verify, "BATCHES", [[0.05, 0.4]])
    monkeypatch.setattr(formats, "save_published_size", lambda path: save_model(path, model))
    monkeypatch.delitem(formats.EXPORTED, "ONNX")  # which is made on the way to 8 bits
    monkeypatch.setitem(sys.modules, "executorch", None)  # not installed
    timed, probe, probed, write, exported = [], formats.probed, [], onnx.export, []

    def times(files, threads, seconds, rounds):
        timed.append([*files])
        return {name: [[0.25 * n / s for s in seconds] for n in threads] for name in files}

    def stop_at_second(*args):
        probed.append(True)
        if len(probed) == 2:
            raise Signalled(signal.SIGTERM)
        return probe(*args)

    def export(source, out, options):
        exported.append(out.name)
        return write(source, out, options)

    monkeypatch.setattr(formats, "real_time_factors", times)
    monkeypatch.setattr(formats, "probed", stop_at_second)
    monkeypatch.setattr(onnx, "export", export)
    journal = tmp_path / "out" / ".formats.jsonl"
    with pytest.raises(Stopped, match=rf"SIGTERM: what is finished is in {journal}; the same command goes on"):
        formats.run(small, tmp_path / "out", rounds=1, steps=4)
    formats.run(small, tmp_path / "out", rounds=1, steps=4)
    assert exported == ["published.int8.onnx", "final.int8.onnx"] and not journal.exists()
    assert timed == [["torch", "torch.export", "ONNX int8"]] * 2 and len(probed) == 2 + 1
    assert "executorch is left out: --to executorch needs the package executorch" in caplog.text

    rows = json.loads((tmp_path / "out" / "formats.json").read_text())
    assert [row["format"] for row in rows] == timed[0] * 2
    assert [bool(row["probes"]) for row in rows] == [False] * 3 + [True, False, True]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["real_time_factors"] == [[0.25, 0.025], [0.5, 0.05]]
        assert row["difference"] is None or (row["difference"] < 1e-4) == (row["format"] != "ONNX int8")
        assert f"| {row['format']} | {row['bytes'] / 1e6:.2f} | 0.25 | 0.025 | 0.5 | 0.05 |" in printed
        for rate, low, high in row["probes"].values():
            assert 0 <= low <= rate <= high <= 100
    xml.etree.ElementTree.fromstring((tmp_path / "out" / "formats.svg").read_text())
    with pytest.raises(UserError, match=r"no final\.pth"):
        (small / "final.pth").unlink()
        formats.run(small, tmp_path / "out")


@pytest.mark.slow
def test_each_process_times_with_its_own_threads(tmp_path):
    save_model(tmp_path / "model.pth", wav2vec2_model(**first_layers(TINY, 1)))
    found = real_time_factors({"torch": tmp_path / "model.pth"}, (1, 2), (0.1, 1.0), rounds=2)
    assert [len(of_threads) for of_threads in found["torch"]] == [2, 2]
    assert all(0 < factor < 5 for of_threads in found["torch"] for factor in of_threads)
    with pytest.raises(RuntimeError, match=r"ONNX, 1 threads: its process has ended"):
        real_time_factors({"ONNX": tmp_path / "model.pth"}, (1,), (0.1,), rounds=1)


def test_differences_are_shares_of_the_largest_value(tmp_path):
    save_model(tmp_path / "model.pth", wav2vec2_model(**first_layers(TINY, 1)))
    threads = torch.get_num_threads()
    reference = OPEN["torch"](tmp_path / "model.pth", threads)

    def off_by_a_tenth(waveforms: torch.Tensor, lengths: torch.Tensor) -> tuple[list[torch.Tensor], None]:
        first, last = load_model(tmp_path / "model.pth").extract_features(waveforms, lengths)[0]
        return [first, last + 0.1 * last.abs().max()], None

    waveforms = [torch.randn(800), torch.randn(1600)]
    assert formats.largest_difference(reference, reference, waveforms) == 0
    assert formats.largest_difference(off_by_a_tenth, reference, waveforms) == pytest.approx(0.1, rel=1e-4)
