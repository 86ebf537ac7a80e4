"""The calls of a stage on their way through its blocks, and what layers are given where they stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from defaker_opt.detector import Detector, empty_stage, parameter_shapes
from defaker_opt.methods import QuantizedWeight
from defaker_opt.observe import recorded
from defaker_opt.observe.inputs import StageInput
from defaker_opt.stages import stage_file
from defaker_opt.streaming import empty_block_, fill_block_, set_parameter_

Outputs = list[tuple[torch.Tensor, ...]]
# What layers are given in one call.
Seen = dict[str, list[torch.Tensor]]


@dataclass
class State:
    """Where one call of a stage stands: what the next block is given, and the call it belongs to."""

    hidden: torch.Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]
    call: StageInput


class _Entered(BaseException):
    """Raised when a stage reaches its first block, with what that is given; nothing but `_enter` sees it."""


class Line:
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
        self._states: list[list[State]] = []
        # Up to where the calls of the detector as it was have moved while they were looked at.
        self._ahead: nn.Module | None = None

    def show_all(self) -> None:
        """No block is left to be shown."""
        self.behind = [(f"{self.stage}.{self.path}.{index}", block) for index, block in enumerate(self.blocks)]

    def before(
        self, block: nn.Module, place: str, watched: Mapping[str, nn.Module]
    ) -> Iterator[tuple[State, Seen, Seen]]:
        """Each call that stands before a block, with what its layers are given by the original weights, and what they
        were given when nothing was quantized. The calls stay where they are.
        """
        states = self._arrive_before()
        self._fill(block, place, dataclasses.replace(self.detectors[0], codes={}))
        for index, state in enumerate(states[0]):
            before: Seen = {}
            if len(states) == 2:
                with recorded(watched) as before:
                    states[1][index].hidden = _run(block, states[1][index])
            with recorded(watched) as seen:
                _run(block, state)
            yield state, seen, before
        self._ahead = block

    def through(
        self, block: nn.Module, place: str, watched: Mapping[str, nn.Module], coded: Mapping[str, QuantizedWeight]
    ) -> Iterator[tuple[State, Seen, Seen]]:
        """Move each call through a block that has codes, with what its layers are given on the way.

        Calls of the detector as it was move too, unseen.
        """
        states = self._arrive_before()
        self._fill(block, place, dataclasses.replace(self.detectors[0], codes=dict(coded)))
        for state in states[0]:
            with recorded(watched) as seen:
                state.hidden = _run(block, state)
            yield state, seen, {}
        if len(states) == 2:
            self._fill(block, place, self.detectors[1])
            for state in states[1]:
                state.hidden = _run(block, state)
        self.behind = []

    def _arrive_before(self) -> list[list[State]]:
        """Move all calls to the block that was shown last."""
        last = self.behind.pop()
        states = self.arrive()
        self.behind = [last]
        return states

    def arrive(self) -> list[list[State]]:
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
            outputs.append([leave(self.module, self.blocks, state) for state in each])
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


def _enter(module: nn.Module, blocks: list[nn.Module], call: StageInput) -> State:
    """Run a stage up to its first block; without blocks, do nothing yet."""
    if not blocks:
        return State(torch.empty(0), (), {}, call)

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
    # What the stage was given has done its work; `leave` asks for shapes alone.
    shapes = tuple(torch.zeros(1, dtype=t.dtype).expand(t.shape) for t in call.tensors)
    return State(hidden, tuple(others), named, dataclasses.replace(call, tensors=shapes))


def _run(block: nn.Module, state: State) -> torch.Tensor:
    result = block(state.hidden, *state.others, **state.named)
    hidden: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return hidden


def leave(module: nn.Module, blocks: list[nn.Module], state: State) -> tuple[torch.Tensor, ...]:
    """What a stage gives when its last block has given `state.hidden`; blocks are passed by."""
    for block in blocks:
        block.forward = lambda *given, **named: state.hidden
    try:
        outputs: tuple[torch.Tensor, ...] = module(*state.call.tensors)
    finally:
        for block in blocks:
            del block.forward
    return outputs
