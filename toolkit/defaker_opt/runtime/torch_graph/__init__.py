"""ONNX stages as lists of torch calls: read, rewrite into larger operators, specialize for sizes, run.

graph.py       values: Node and Graph; the file of a stage → Graph
operators.py   ONNX operators as plain functions of tensors
products.py    products of codes and attention, as fast as the device has them
fused.py       norm, activation and quantization in one step
kernels.py     the same as Triton kernels, imported on CUDA only
linear.py      patterns of linear layers
fusion.py      patterns of attention, norms and activations
program.py     a graph on a device: specialized for sizes when they are first seen, then run step by step
capture.py     a specialized program as a CUDA graph
array.py       arrays that stay on the device between stages

Nothing here is imported before a stage is opened with the backend `torch_cuda`, as torch is not there without it.
"""
