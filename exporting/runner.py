"""``runner.py KIND MODEL IN.npz OUT.npz``: run an exported model in a process with only what its format needs."""

import sys
from typing import Any

import numpy as np


def onnx(path):
    """ONNX Runtime and numpy."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda w, n: dict(zip(names, session.run(None, {"waveforms": w, "lengths": n})))


def onnx_asr(path, quantization=None):
    """The package onnx-asr: what its model gives, what it writes down, and when each character begins."""
    sys.path.append(path)
    sys.dont_write_bytecode = True  # nothing more in the folder
    import onnx_asr as package
    import wav2vec2_ctc  # noqa: F401

    model = package.load_model("wav2vec2-ctc", path, quantization=quantization)
    asr: Any = model.asr
    encode, kept = asr._encode, {}

    def keep(*inputs):
        kept["logprobs"], frames = encode(*inputs)
        return kept["logprobs"], frames

    asr._encode = keep
    recogniser = model.with_timestamps()

    def run(waveforms, lengths):
        results = recogniser.recognize([row[:length] for row, length in zip(waveforms, lengths)])
        times = np.concatenate([result.timestamps for result in results])
        return {"logprobs": kept["logprobs"], "texts": np.array([r.text for r in results]), "times": times}

    return run


def onnx_asr_int8(path):
    """The same with 8 bits."""
    return onnx_asr(path, "int8")


def torch_export(path):
    """Plain torch."""
    import torch

    model = torch.export.load(path).module()

    def run(waveforms, lengths):
        with torch.no_grad():
            outputs = model(torch.from_numpy(waveforms), torch.from_numpy(lengths))
        return dict(zip(("hidden_states", "frames", "logits"), (x.numpy() for x in outputs)))

    return run


def executorch(path):
    """ExecuTorch's runtime, which imports torch for its tensors; each waveform alone."""
    import torch
    from executorch.runtime import Runtime

    forward = Runtime.get().load_program(path).load_method("forward")

    def run(waveforms, lengths):
        outputs = forward.execute([torch.from_numpy(waveforms)])
        return {name: x.numpy() for name, x in zip(("hidden_states", "logits"), outputs)}

    return run


def transformers(path):
    """Transformers with the code in the folder, its feature extractor included."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    extract = _extractor(path)

    def run(waveforms, lengths):
        with torch.no_grad():
            states = model(**extract(waveforms, lengths), output_hidden_states=True).hidden_states
        return {"hidden_states": torch.stack(states).numpy()}

    return run


def transformers_native(path):
    """Transformers' own class, with its head: the layers from 1 on, the last through the final layer norm."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCTC

    has_head = AutoConfig.from_pretrained(path).architectures[0].endswith("ForCTC")
    model = (AutoModelForCTC if has_head else AutoModel).from_pretrained(path).eval()
    extract = _extractor(path)

    def run(waveforms, lengths):
        with torch.no_grad():
            outputs = model.base_model(**extract(waveforms, lengths), output_hidden_states=True)
            last = outputs.last_hidden_state
            results = {"hidden_states": torch.stack([*outputs.hidden_states[1:-1], last])}
            if has_head:
                results["logits"] = model.lm_head(last)
        return {name: result.numpy() for name, result in results.items()}

    return run


def _extractor(path):
    """Makes a folder's inputs of waveforms [B, N] and lengths [B]."""
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(path)

    def extract(waveforms, lengths):
        rows = [row[:length] for row, length in zip(waveforms, lengths)]
        return extractor(rows, sampling_rate=16000, padding=True, return_tensors="pt")

    return extract


# what runs a kind of model, and what that must do without
KINDS = {
    "onnx": (onnx, {"torch", "transformers"}),
    "onnx_asr": (onnx_asr, {"torch", "transformers"}),
    "onnx_asr_int8": (onnx_asr_int8, {"torch", "transformers"}),
    "torch_export": (torch_export, {"transformers"}),
    "executorch": (executorch, {"transformers"}),
    "transformers": (transformers, set()),
    "transformers_native": (transformers_native, set()),
}


def main():
    """Run every batch of the input file."""
    kind, model, given, made = sys.argv[1:]
    make, foreign = KINDS[kind]
    run = make(model)
    batches = np.load(given)
    outputs = {}
    for i in range(int(batches["num_batches"])):
        for name, array in run(batches[f"waveforms{i}"], batches[f"lengths{i}"]).items():
            outputs[f"{name}/{i}"] = array
    if found := (foreign | {"wav2vec2", "distillation"}) & sys.modules.keys():
        raise SystemExit(f"needs {', '.join(sorted(found))}, which the format should not")
    np.savez(made, **outputs)


if __name__ == "__main__":
    main()
