"""Run a module of any size in the memory of one of its blocks: weights come when a block begins and go when it ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

# Reads a parameter of the module by its name within it.
ReadParameter = Callable[[str], torch.Tensor]


def stream_weights_(module: nn.Module, read: ReadParameter) -> None:
    """Make a module on the "meta" device run: weights outside its blocks are read now, others as they run.

    A block is an entry of an `nn.ModuleList` that is in no other; its weights are read only by its own `forward`.
    """
    blocks = list(_blocks(module, ""))
    for name, block in blocks:
        block.register_forward_pre_hook(functools.partial(_fill_before, name, read))
        block.register_forward_hook(_empty_after)
    inside = tuple(f"{name}." for name, _ in blocks)
    for name, _ in list(module.named_parameters()):
        if not name.startswith(inside):
            set_parameter_(module, name, read(name))


def set_parameter_(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a value in the place of a parameter; no gradient will be asked of it."""
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{prefix}{name}.{index}", block) for index, block in enumerate(child))
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def fill_block_(block: nn.Module, name: str, read: ReadParameter) -> None:
    """Read all parameters of a block that is called `name` within its module."""
    for inner, _ in list(block.named_parameters()):
        set_parameter_(block, inner, read(f"{name}.{inner}"))


def empty_block_(block: nn.Module) -> None:
    """Give back the memory of a block's parameters."""
    for inner, parameter in list(block.named_parameters()):
        set_parameter_(block, inner, torch.empty_like(parameter, device="meta"))


def _fill_before(name: str, read: ReadParameter, block: nn.Module, arguments: object) -> None:
    fill_block_(block, name, read)


def _empty_after(block: nn.Module, arguments: object, result: object) -> None:
    empty_block_(block)
