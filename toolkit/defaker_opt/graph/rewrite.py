"""Make a freshly traced graph small without touching its weights."""

from __future__ import annotations

import ast

import onnx_ir as ir
from onnxscript import optimizer

# What the exporter notes of each node: the modules it came from, outermost first, and the operation, as a Python list.
_SCOPES = "pkg.torch.onnx.name_scopes"


def simplify_(model: ir.Model, stage: str, parameters: set[str]) -> None:
    """Fold constants, drop what is unused and what the tracer wrote for debugging.

    While it works, parameters are graph inputs: they have no values yet, so nothing may be computed from them.
    """
    graph = model.graph
    held = [graph.initializers.pop(name) for name in sorted(parameters)]
    placeholders = [value.const_value for value in held]
    for value in held:
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize(model)
    for value, placeholder in zip(held, placeholders):
        graph.inputs.remove(value)
        value.const_value = placeholder
        graph.initializers.add(value)
    _name_nodes_(model, stage)
    _strip_(model)


def _name_nodes_(model: ir.Model, stage: str) -> None:
    """Call each node `<module>/<operator>_<number>`, so that a runtime's profile says which module its time went to."""
    for number, node in enumerate(model.graph):
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        module = ".".join(filter(None, (stage, scopes[-2] if len(scopes) > 1 else "")))
        node.name = f"{module}/{node.op_type}_{number}"


def _strip_(model: ir.Model) -> None:
    """Drop stack traces and source locations: they bloat the graph and name paths of the building machine."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            # Shapes of intermediate values carry the tracer's own dimension names; runtimes infer them again.
            output.shape = None if output not in model.graph.outputs else output.shape
            output.type = None if output not in model.graph.outputs else output.type
