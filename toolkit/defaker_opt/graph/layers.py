"""Linear layers in a traced graph: found by their weights, and replaced."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


class Layer:
    """A linear layer in the graph: `weight` [out, in] multiplies `x`; `node` and `transpose` are to be replaced."""

    def __init__(self, name: str, node: ir.Node, transpose: ir.Node | None) -> None:
        self.name, self.node, self.transpose = name, node, transpose
        x = node.inputs[0]
        assert x is not None
        self.x = x
        # A Gemm carries its bias itself; after a MatMul the bias is an Add of its own, which stays.
        self.bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None


def layers_of(graph: ir.Graph, name: str) -> Iterator[Layer]:
    """Every layer that reads the weight of that name."""
    weight = graph.initializers[name]
    for node, _ in list(weight.uses()):
        if node.op_type == "Gemm":
            assert node.attributes["transB"].as_int() == 1, f"{name}: a Gemm that does not transpose its weight"
            yield Layer(name, node, None)
            continue
        assert node.op_type == "Transpose", f"{name}: read by a {node.op_type}, where a linear layer transposes it"
        for product, _ in list(node.outputs[0].uses()):
            assert product.op_type == "MatMul", f"{name}: its transpose is read by a {product.op_type}"
            yield Layer(name, product, node)


def replace_layer_(graph: ir.Graph, layer: Layer, nodes: list[ir.Node], result: ir.Value) -> None:
    """Put nodes in a layer's place; whoever read the layer reads `result`."""
    if layer.bias is not None:
        nodes.append(ir.node("Add", [result, layer.bias], name=f"{layer.name}.bias_add"))
        result = nodes[-1].outputs[0]
    replace_node_(graph, layer.node, nodes, result)
    if layer.transpose is not None and not list(layer.transpose.outputs[0].uses()):
        graph.remove(layer.transpose, safe=True)
    if not list(graph.initializers[layer.name].uses()):
        graph.initializers.pop(layer.name)


def replace_node_(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node], result: ir.Value) -> None:
    """Put nodes in another's place; whoever read its only output reads `result`."""
    old = node.outputs[0]
    result.name, old.name = old.name, f"{old.name}.replaced"
    # Readers other than onnxruntime want to be told what a graph's outputs are.
    result.shape, result.type = old.shape, old.type
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
