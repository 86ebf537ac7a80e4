"""Through the joint model, stage after stage and block after block, with one block's weights and activations at a time.

A block runs twice on every picture: to see what its layers are given, and, once they are quantized, to find what the
next block is given. If a method asks for it, the detector as it was runs beside it. Where the cache knows what would be
seen, pictures stay where they are until somebody must look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from defaker_opt.detector import Detector, empty_stage, linear_weights, parameter_shapes
from defaker_opt.methods import NOTHING_SEEN, Need, Statistics
from defaker_opt.observe import Collector, recorded
from defaker_opt.observe.cache import StatisticsCache, open_cache
from defaker_opt.observe.inputs import Balance, StageInput, question_inputs, tile_inputs, whole_inputs
from defaker_opt.samples import Samples
from defaker_opt.stages import stage_file
from defaker_opt.streaming import empty_block_, fill_block_, set_parameter_

Needs = Mapping[str, Collection[Need]]
Group = dict[str, Statistics]
Outputs = list[tuple[torch.Tensor, ...]]
# Gives a stage's outputs for each call, of each detector.
Give = Callable[[], list[Outputs]]


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
    the next group, the caller puts the codes of the last one into the detector, which then stand for them. Statistics
    that an earlier job has found are taken from the cache, and what only they would need is not run.
    """
    with torch.inference_mode():
        looked_at = {name.partition(".")[0] for name, wanted in needs.items() if wanted}
        shifted = any("shift" in wanted for wanted in needs.values())
        # The detector as it is, and, if anyone asks, as it was.
        detectors = [detector, dataclasses.replace(detector, codes={})][: 1 + shifted]
        sweep = Sweep(detectors, needs, open_cache(detector, samples, balance) if looked_at else None)
        nobody: Give = list  # what nobody will ask for is not held in memory
        walked = yield from sweep.walk("vision_encoder", lambda: [tile_inputs(detector, samples)])
        vision = walked if looked_at & {"language", "mask_decoder"} else nobody
        del walked

        def questions() -> list[Iterable[StageInput]]:
            return [question_inputs(detector, each, balance) for each in vision()]

        walked = yield from sweep.walk("language", questions)
        language = walked if "mask_decoder" in looked_at else nobody
        del walked
        yield from sweep.walk("mask_encoder", lambda: [whole_inputs(detector, samples)])
        yield from sweep.walk("mask_decoder", lambda: sweep.decoder_inputs(samples, language()))


@dataclass(frozen=True)
class Sweep:
    """detectors: as it is and, if needed, as it was; everything below has one entry for each of them.

    cache: of what earlier jobs found; None does without.
    """

    detectors: list[Detector]
    needs: Needs
    cache: StatisticsCache | None = None

    def walk(self, stage: str, inputs: Callable[[], Sequence[Iterable[StageInput]]]) -> Generator[Group, None, Give]:
        """All groups of a stage; what gives its outputs. inputs: one entry serves both detectors. Nothing runs before
        it is needed.
        """
        names = list(linear_weights(self.detectors[0].config, stage))
        line = _Line(self.detectors, stage, inputs)
        outside = [name for name in names if not line.path or not name.startswith(f"{stage}.{line.path}.")]
        if any(self.needs.get(name) for name in names):
            for index, block in enumerate(line.blocks):
                yield from self._block(f"{stage}.{line.path}.{index}", block, line)
            yield from self._outside(outside, line)
        else:
            yield dict.fromkeys(names, NOTHING_SEEN)
            self._passed(stage, names)
            line.show_all()
        return line.outputs

    def _block(self, place: str, block: nn.Module, line: _Line) -> Iterator[Group]:
        """Show the layers of a block."""
        layers = {f"{place}.{n}.weight": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}

        def see(collector: Collector) -> None:
            watched = {layer: layers[layer] for layer in collector.needs}
            for state, before in line.before(block, place, watched):
                with recorded(watched) as seen:
                    _run(block, state)
                collector.add_(seen, before, state.call.weights)
            empty_block_(block)

        yield self._group(line.stage, layers, see)
        self._passed(line.stage, layers)
        line.behind.append((place, block))

    def _outside(self, names: list[str], line: _Line) -> Iterator[Group]:
        """Show the layers that are in no block."""
        if not names:
            return
        start = f"{line.stage}."
        layers = {name: line.module.get_submodule(name.removeprefix(start).removesuffix(".weight")) for name in names}

        def see(collector: Collector) -> None:
            states = line.arrive()
            for index, state in enumerate(states[0]):
                unread = tuple(f"{start}{beginning}" for beginning in state.call.unread)
                watched = {name: layers[name] for name in collector.needs if not name.startswith(unread or ("\0",))}
                runs = []
                for each in states:
                    with recorded(watched) as seen:
                        _leave(line.module, line.blocks, each[index])
                    runs.append(seen)
                collector.add_(runs[0], runs[1] if len(runs) == 2 else {}, state.call.weights)

        yield self._group(line.stage, layers, see)
        self._passed(line.stage, layers)

    def _group(self, stage: str, layers: Iterable[str], see: Callable[[Collector], None]) -> Group:
        """What is known of layers, from the cache or by looking. Those that need nothing come with nothing."""
        codes = self.detectors[0].codes
        needs = {name: self.needs[name] for name in layers if self.needs.get(name) and name not in codes}
        found = self.cache.read(stage, needs) if self.cache and needs else None
        if found is None:
            collector = Collector(needs)
            if needs:
                see(collector)
            found = collector.found()
            if self.cache and needs:
                self.cache.keep(stage, needs, found)
        return {name: found[name] if name in needs else NOTHING_SEEN for name in layers}

    def _passed(self, stage: str, layers: Iterable[str]) -> None:
        """What comes now sees what these layers give with the codes that they have got."""
        if self.cache:
            codes = self.detectors[0].codes
            self.cache.passed(stage, {name: codes[name] for name in layers if name in codes})

    def decoder_inputs(self, samples: Samples, language: list[Outputs]) -> list[Iterable[StageInput]]:
        """What the mask decoder is given: the maps of every picture, and the embedding its mask question gave."""
        inputs: list[Iterable[StageInput]] = []
        for detector, answers in zip(self.detectors, language):
            encoder = detector.stream_stage("mask_encoder")
            maps = [encoder(*call.tensors) for call in whole_inputs(detector, samples)]
            inputs.append([StageInput((*each, answers[2 * i + 1][1])) for i, each in enumerate(maps)])
        return inputs


class _Line:
    """A stage with all its calls, which stand before some block and move on when somebody looks.

    behind: blocks that have been shown, and that the calls have still to pass.
    """

    def __init__(
        self, detectors: list[Detector], stage: str, inputs: Callable[[], Sequence[Iterable[StageInput]]]
    ) -> None:
        self.detectors, self.stage, self._inputs = detectors, stage, inputs
        self.module = empty_stage(detectors[0].config, stage).eval()
        self.path = stage_file(stage).BLOCKS
        self.blocks = list(self.module.get_submodule(self.path).children()) if self.path else []
        self.behind: list[tuple[str, nn.Module]] = []
        self._states: list[list[_State]] = []
        # Up to where the calls of the detector as it was have moved while they were looked at.
        self._ahead: nn.Module | None = None

    def show_all(self) -> None:
        """No block is left to be shown."""
        self.behind = [(f"{self.stage}.{self.path}.{index}", block) for index, block in enumerate(self.blocks)]

    def before(
        self, block: nn.Module, place: str, watched: Mapping[str, nn.Module]
    ) -> Iterator[tuple[_State, dict[str, list[torch.Tensor]]]]:
        """Each call that stands before a block, which has its original weights, and what layers were given when nothing
        was quantized.
        """
        states = self.arrive()
        self._fill(block, place, dataclasses.replace(self.detectors[0], codes={}))
        for index, state in enumerate(states[0]):
            before: dict[str, list[torch.Tensor]] = {}
            if len(states) == 2:
                with recorded(watched) as before:
                    states[1][index].hidden = _run(block, states[1][index])
            yield state, before
        self._ahead = block

    def arrive(self) -> list[list[_State]]:
        """Move all calls behind the blocks that have been shown; where they stand then."""
        if not self._states:
            self._fill_outside_(self.detectors[-1], original=True)
            self._states = [[_enter(self.module, self.blocks, call) for call in each] for each in self._inputs()]
            if len(self._states) < len(self.detectors):
                self._states.append([dataclasses.replace(state) for state in self._states[0]])
        for place, block in self.behind:
            for detector, states in zip(self.detectors, self._states):
                if states is not self._states[0] and block is self._ahead:
                    continue
                self._fill(block, place, detector)
                for state in states:
                    state.hidden = _run(block, state)
                empty_block_(block)
        self.behind = []
        return self._states

    def outputs(self) -> list[Outputs]:
        """The stage's outputs for each call."""
        outputs = []
        for detector, each in zip(self.detectors, self.arrive()):
            self._fill_outside_(detector, original=False)
            outputs.append([_leave(self.module, self.blocks, state) for state in each])
        # Whoever asks again has everything run again, so that nothing is held for them.
        self._states, self._ahead = [], None
        self.show_all()
        return outputs

    def _fill(self, block: nn.Module, place: str, detector: Detector) -> None:
        fill_block_(block, place.partition(".")[2], lambda inner: detector.read(f"{self.stage}.{inner}"))

    def _fill_outside_(self, detector: Detector, original: bool) -> None:
        """Read every parameter that is in no block."""
        source = dataclasses.replace(detector, codes={}) if original else detector
        for name in parameter_shapes(detector.config, self.stage):
            inner = name.removeprefix(f"{self.stage}.")
            if not self.path or not inner.startswith(f"{self.path}."):
                set_parameter_(self.module, inner, source.read(name))


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
