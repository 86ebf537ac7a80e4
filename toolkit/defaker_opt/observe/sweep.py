"""Through the joint model, stage after stage and block after block, with one block's weights and activations at a time.

A block runs twice on every picture: to see what its layers are given, and, once they are quantized, to find what the
next block is given. If a method asks for it, the detector as it was runs beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from defaker_opt.detector import Detector, empty_stage, linear_weights, parameter_shapes
from defaker_opt.methods import NOTHING_SEEN, Need, Statistics
from defaker_opt.observe import Collector, recorded
from defaker_opt.observe.inputs import Balance, StageInput, question_inputs, tile_inputs, whole_inputs
from defaker_opt.samples import Samples
from defaker_opt.stages import stage_file
from defaker_opt.streaming import empty_block_, fill_block_, set_parameter_

Needs = Mapping[str, Collection[Need]]
Group = dict[str, Statistics]
Outputs = list[tuple[torch.Tensor, ...]]


@dataclass
class _State:
    """Where one call of a stage stands: what the next block is given, and the call it belongs to."""

    hidden: torch.Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]
    call: StageInput


class _Entered(BaseException):
    """Raised when a stage reaches its first block, with what that is given; nothing but `_enter` sees it."""


def observe_layers(
    detector: Detector, samples: Samples, needs: Needs, balance: Balance | None = None
) -> Iterator[Group]:
    """Statistics of all linear layers, a group of layers at a time, in the order in which they run.

    needs: by full weight name; a layer that needs nothing, or has codes already, comes with nothing. Before asking for
    the next group, the caller puts the codes of the last one into the detector, which then stand for them.
    """
    with torch.inference_mode():
        looked_at = {name.partition(".")[0] for name, wanted in needs.items() if wanted}
        shifted = any("shift" in wanted for wanted in needs.values())
        # The detector as it is, and, if anyone asks, as it was.
        sweep = Sweep([detector, dataclasses.replace(detector, codes={})][: 1 + shifted], needs)
        to_decoder = "mask_decoder" in looked_at
        to_language = to_decoder or "language" in looked_at
        vision = yield from sweep.walk("vision_encoder", [tile_inputs(detector, samples)], to_language)
        questions = [question_inputs(detector, each, balance) for each in vision]
        language = yield from sweep.walk("language", questions, to_decoder)
        yield from sweep.walk("mask_encoder", [whole_inputs(detector, samples)], keep=False)
        yield from sweep.walk("mask_decoder", sweep.decoder_inputs(samples, language), keep=False)


@dataclass(frozen=True)
class Sweep:
    """detectors: as it is and, if needed, as it was; everything below has one entry for each of them."""

    detectors: list[Detector]
    needs: Needs

    def walk(
        self, stage: str, inputs: Sequence[Iterable[StageInput]], keep: bool
    ) -> Generator[Group, None, list[Outputs]]:
        """All groups of a stage; its outputs for each call, if they are to be kept. inputs: one entry serves both."""
        names = list(linear_weights(self.detectors[0].config, stage))
        if not inputs or not (keep or any(self.needs.get(name) for name in names)):
            yield dict.fromkeys(names, NOTHING_SEEN)
            return []
        module = empty_stage(self.detectors[0].config, stage).eval()
        path = stage_file(stage).BLOCKS
        blocks = list(module.get_submodule(path).children()) if path else []
        outside = [name for name in names if not path or not name.startswith(f"{stage}.{path}.")]
        self._fill_outside_(module, stage, path, self.detectors[-1], original=True)
        states = [[_enter(module, blocks, call) for call in each] for each in inputs]
        if len(states) < len(self.detectors):
            states.append([dataclasses.replace(state) for state in states[0]])
        for index, block in enumerate(blocks):
            yield from self._block(f"{stage}.{path}.{index}", block, states)
        yield from self._outside(stage, module, blocks, outside, states)
        if not keep:
            return []
        outputs = []
        for detector, each in zip(self.detectors, states):
            self._fill_outside_(module, stage, path, detector, original=False)
            outputs.append([_leave(module, blocks, state) for state in each])
        return outputs

    def _block(self, place: str, block: nn.Module, states: list[list[_State]]) -> Iterator[Group]:
        """Show the layers of a block, then move all states behind it."""
        stage, _, name = place.partition(".")
        layers = {f"{place}.{n}.weight": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        collector = self._collector(layers)
        now, original = self.detectors[0], dataclasses.replace(self.detectors[0], codes={})
        fill_block_(block, name, lambda inner: original.read(f"{stage}.{inner}"))
        watched = {layer: layers[layer] for layer in collector.needs}
        for index, state in enumerate(states[0]):
            if not watched and len(states) == 1:
                break
            before: dict[str, list[torch.Tensor]] = {}
            if len(states) == 2:
                with recorded(watched) as before:
                    moved = _run(block, states[1][index])
                states[1][index].hidden = moved
            if watched:
                with recorded(watched) as seen:
                    _run(block, state)
                collector.add_(seen, before, state.call.weights)
        empty_block_(block)
        yield self._group(layers, collector)
        fill_block_(block, name, lambda inner: now.read(f"{stage}.{inner}"))
        for state in states[0]:
            state.hidden = _run(block, state)
        empty_block_(block)

    def _outside(
        self, stage: str, module: nn.Module, blocks: list[nn.Module], names: list[str], states: list[list[_State]]
    ) -> Iterator[Group]:
        """Show the layers that are in no block."""
        if not names:
            return
        layers = {name: module.get_submodule(name.removeprefix(f"{stage}.").removesuffix(".weight")) for name in names}
        collector = self._collector(layers)
        for index, state in enumerate(states[0] if collector.needs else []):
            unread = tuple(f"{stage}.{start}" for start in state.call.unread)
            watched = {name: layers[name] for name in collector.needs if not name.startswith(unread or ("\0",))}
            runs = []
            for each in states:
                with recorded(watched) as seen:
                    _leave(module, blocks, each[index])
                runs.append(seen)
            collector.add_(runs[0], runs[1] if len(runs) == 2 else {}, state.call.weights)
        yield self._group(layers, collector)

    def _collector(self, layers: Mapping[str, nn.Module]) -> Collector:
        codes = self.detectors[0].codes
        return Collector({name: self.needs[name] for name in layers if self.needs.get(name) and name not in codes})

    def _group(self, layers: Iterable[str], collector: Collector) -> Group:
        return {name: collector.statistics(name) if name in collector.needs else NOTHING_SEEN for name in layers}

    def _fill_outside_(self, module: nn.Module, stage: str, path: str, detector: Detector, original: bool) -> None:
        """Read every parameter that is in no block."""
        source = dataclasses.replace(detector, codes={}) if original else detector
        for name in parameter_shapes(detector.config, stage):
            inner = name.removeprefix(f"{stage}.")
            if not path or not inner.startswith(f"{path}."):
                set_parameter_(module, inner, source.read(name))

    def decoder_inputs(self, samples: Samples, language: list[Outputs]) -> list[Iterable[StageInput]]:
        """What the mask decoder is given: the maps of every picture, and the embedding its mask question gave."""
        inputs: list[Iterable[StageInput]] = []
        for detector, answers in zip(self.detectors, language):
            encoder = detector.stream_stage("mask_encoder")
            maps = [encoder(*call.tensors) for call in whole_inputs(detector, samples)]
            inputs.append([StageInput((*each, answers[2 * i + 1][1])) for i, each in enumerate(maps)])
        return inputs


def _enter(module: nn.Module, blocks: list[nn.Module], call: StageInput) -> _State:
    """Run a stage up to its first block; without blocks, do nothing yet."""
    if not blocks:
        return _State(torch.empty(0), (), {}, call)

    def stop(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _Entered(given, named)

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        module(*call.tensors)
    except _Entered as entered:
        (hidden, *others), named = entered.args
    finally:
        handle.remove()
    # Nothing is in the past, so keys and values are the layer's own, and no cache need be filled.
    named = {name: value for name, value in named.items() if name != "past_key_values"}
    # What the stage was given has done its work; `_leave` asks for shapes alone.
    shapes = tuple(torch.zeros(1, dtype=t.dtype).expand(t.shape) for t in call.tensors)
    return _State(hidden, tuple(others), named, dataclasses.replace(call, tensors=shapes))


def _run(block: nn.Module, state: _State) -> torch.Tensor:
    result = block(state.hidden, *state.others, **state.named)
    hidden: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return hidden


def _leave(module: nn.Module, blocks: list[nn.Module], state: _State) -> tuple[torch.Tensor, ...]:
    """What a stage gives when its last block has given `state.hidden`; blocks are passed by."""
    for block in blocks:
        block.forward = lambda *given, **named: state.hidden
    try:
        outputs: tuple[torch.Tensor, ...] = module(*state.call.tensors)
    finally:
        for block in blocks:
            del block.forward
    return outputs
