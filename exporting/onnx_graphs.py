"""Changes to a converted ONNX graph: what is constant, what is slow in ONNX Runtime, what it must refuse, its names."""

import re

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript import optimizer

from wav2vec2.feature_extractor import FeatureExtractor

NO_LIMIT = 2**40  # of the size of constants
EXACT = {"precision": "float32"}  # metadata of operators that are not for 8 bits


def tidy(model: ir.Model) -> None:
    """Compute what depends on weights alone, and keep sums apart from the layer norms of them, in place.

    Of where in our code an operator comes from, nothing stays but :data:`EXACT` at those of the feature extractor.
    """
    optimizer.fold_constants(model, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT)
    RemoveUnusedNodesPass()(model)
    exact = [
        node for node in model.graph if f".{FeatureExtractor.__name__}/" in node.metadata_props.get("namespace", "")
    ]
    ClearMetadataAndDocStringPass()(model)
    for node in exact:
        node.metadata_props.update(EXACT)
    for node in model.graph:
        above = node.inputs[0].producer() if node.op_type == "LayerNormalization" and node.inputs[0] else None
        if above is not None and above.op_type == "Add":
            above.op_type = "Sum"  # ONNX Runtime fuses an Add with the norm, into what takes five times as long


def check_inputs(model: ir.Model, shortest: int) -> None:
    """Let ``lengths`` below 0 or above the number of samples fail, and waveforms of less than ``shortest``, in place.

    ONNX has no assertion. So a number is looked up in a list of a single 0, at the place 1 where something is wrong,
    and added to the lengths; the name of the operator, which the error tells, says what is. A ``shortest`` of 0 lets
    any waveforms pass.
    """
    graph = model.graph
    waveforms, lengths = graph.inputs
    tape = ir.tape.Tape()
    zero = tape.initializer(ir.tensor(0), "checked_zero")
    zeros = tape.initializer(ir.tensor([0]), "checked_zeros")

    def refuse(checked: ir.Value, wrong: ir.Value, rule: str) -> ir.Value:
        place = tape.op("ReduceMax", [tape.op("Cast", [wrong], {"to": ir.DataType.INT64})], {"keepdims": 0})
        return tape.op("Add", [checked, tape.op("Gather", [zeros, place], name=rule)])

    samples = tape.op("Shape", [waveforms], {"start": 1, "end": 2})
    outside = tape.op("Or", [tape.op("Less", [samples, lengths]), tape.op("Less", [lengths, zero])])
    checked = refuse(lengths, outside, "lengths_must_be_0_to_the_number_of_samples")
    if shortest:
        short = tape.op("Less", [samples, tape.initializer(ir.tensor(shortest), "checked_least")])
        checked = refuse(checked, short, f"waveforms_must_have_{shortest}_samples_at_least")
    users = [(use.node, use.idx) for use in lengths.uses() if use.node not in tape.nodes]
    for value in tape.initializers:
        graph.register_initializer(value)
    checked.type, checked.shape = lengths.type, lengths.shape
    graph.insert_before(graph[0], tape.nodes)
    for node, i in users:
        node.replace_input_with(i, checked)


def name_sizes(model: ir.Model) -> None:
    """Call what varies batch, samples and frames, instead of the symbols of the trace and formulas of them, in place.

    Sizes between the layers of the feature extractor stay formulas, of samples.
    """
    graph = model.graph
    waveforms, states = graph.inputs[0].shape, graph.outputs[0].shape
    assert waveforms is not None and states is not None
    symbols = dict(zip(map(str, waveforms), ("batch", "samples")))
    frames = str(states[-2])
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        for i, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                named = re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), size.value)
                value.shape[i] = "frames" if size.value == frames else named  # type: ignore[index]
