"""Through the joint model, stage after stage and block after block, with one block's weights and activations at a time.

A block runs twice on every picture: to see what its layers are given, and, once they are quantized, to find what the
next block is given; once is enough where its codes do not depend on what is seen. If a method asks for it, the detector
as it was runs beside it. Where the cache knows what would be seen, pictures stay where they are until somebody must
look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from defaker_opt.detector import OPERANDS, Detector, linear_weights
from defaker_opt.methods import NOTHING_SEEN, Need, QuantizedWeight, Statistics
from defaker_opt.observe import Collector, recorded
from defaker_opt.observe.cache import StatisticsCache, open_cache
from defaker_opt.observe.inputs import Balance, StageInput, question_inputs, tile_inputs, whole_inputs
from defaker_opt.observe.line import Line, Outputs, leave
from defaker_opt.samples import Samples
from defaker_opt.streaming import empty_block_

Needs = Mapping[str, Collection[Need]]
Group = dict[str, Statistics]
# Codes that layers will get whatever is seen of them, those that stay float left out; None if some depend on it.
Foregone = Callable[[Collection[str]], Mapping[str, QuantizedWeight] | None]
# Gives a stage's outputs for each call, of each detector.
Give = Callable[[], list[Outputs]]


def observe_layers(
    detector: Detector,
    samples: Samples,
    needs: Needs,
    balance: Balance | None = None,
    foregone: Foregone = lambda layers: None,
) -> Iterator[Group]:
    """Statistics of all linear layers, a group of layers at a time, in the order in which they run.

    needs: by full weight name, or that of an operand of an attention (`detector.OPERANDS`), which is shown only if it
    is asked for; a layer that needs nothing, or has codes already, comes with nothing. Before asking for the next one,
    the caller puts the codes of the last one into the detector, which then stand for them. Statistics that an earlier
    job has found are taken from the cache, and what only they would need is not run.

    foregone: of the layers of a block; where it has codes, layers are shown what the others of their block make with
    them, otherwise what they made before.
    """
    with torch.inference_mode():
        looked_at = {name.partition(".")[0] for name, wanted in needs.items() if wanted}
        shifted = any("shift" in wanted for wanted in needs.values())
        # The detector as it is, and, if anyone asks, as it was.
        detectors = [detector, dataclasses.replace(detector, codes={})][: 1 + shifted]
        sweep = Sweep(detectors, needs, open_cache(detector, samples, balance) if looked_at else None, foregone)
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

    cache: of what earlier jobs found; None does without. foregone: see `observe_layers`.
    """

    detectors: list[Detector]
    needs: Needs
    cache: StatisticsCache | None = None
    foregone: Foregone = lambda layers: None

    def walk(self, stage: str, inputs: Callable[[], Sequence[Iterable[StageInput]]]) -> Generator[Group, None, Give]:
        """All groups of a stage; what gives its outputs. inputs: one entry serves both detectors. Nothing runs before
        it is needed.
        """
        names = list(linear_weights(self.detectors[0].config, stage))
        line = Line(self.detectors, stage, inputs)
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

    def _block(self, place: str, block: nn.Module, line: Line) -> Iterator[Group]:
        """Show the layers of a block."""
        linear = {f"{place}.{n}.weight": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        layers = {**linear, **self._operands(place, block)}
        coded = self.foregone(layers) if any(self.needs.get(layer) for layer in layers) else None

        def see(collector: Collector) -> None:
            watched = {layer: layers[layer] for layer in collector.needs}
            shown = line.before(block, place, watched) if coded is None else line.through(block, place, watched, coded)
            for state, seen, before in shown:
                collector.add_(seen, before, state.call.weights)
            empty_block_(block)

        line.behind.append((place, block))
        yield self._group(line.stage, layers, see, coded)
        self._passed(line.stage, layers)

    def _operands(self, place: str, module: nn.Module) -> dict[str, nn.Module]:
        """Attentions within a module by the names of their operands that are asked for."""
        return {
            name: inner
            for path, inner in module.named_modules()
            for operand in OPERANDS
            if (name := f"{place}.{path}.{operand}") in self.needs
        }

    def _outside(self, names: list[str], line: Line) -> Iterator[Group]:
        """Show the layers that are in no block."""
        if not names:
            return
        start = f"{line.stage}."
        layers = {name: line.module.get_submodule(name.removeprefix(start).removesuffix(".weight")) for name in names}
        if not line.path:
            layers.update(self._operands(line.stage, line.module))

        def see(collector: Collector) -> None:
            states = line.arrive()
            for index, state in enumerate(states[0]):
                unread = tuple(f"{start}{beginning}" for beginning in state.call.unread)
                watched = {name: layers[name] for name in collector.needs if not name.startswith(unread or ("\0",))}
                runs = []
                for each in states:
                    with recorded(watched) as seen:
                        leave(line.module, line.blocks, each[index])
                    runs.append(seen)
                collector.add_(runs[0], runs[1] if len(runs) == 2 else {}, state.call.weights)

        yield self._group(line.stage, layers, see)
        self._passed(line.stage, layers)

    def _group(
        self,
        stage: str,
        layers: Iterable[str],
        see: Callable[[Collector], None],
        coded: Mapping[str, QuantizedWeight] | None = None,
    ) -> Group:
        """What is known of layers, from the cache or by looking. Those that need nothing come with nothing.

        coded: what their block has in their place while they are looked at, None for its original weights.
        """
        known = {*self.detectors[0].codes, *self._known_operands()}
        needs = {name: self.needs[name] for name in layers if self.needs.get(name) and name not in known}
        # Recipes that differ in whether scores are codes share what was seen of layers.
        parts = [{n: w for n, w in needs.items() if _is_operand(n) == operand} for operand in (False, True)]
        found: Group = {}
        missing = []
        for part in filter(None, parts):
            kept = self.cache.read(stage, part, coded) if self.cache else None
            found.update(kept or {})
            missing += [] if kept else [part]
        if missing:
            collector = Collector({name: wanted for part in missing for name, wanted in part.items()})
            see(collector)
            found.update(collector.found())
            for part in missing:
                if self.cache:
                    self.cache.keep(stage, part, {name: found[name] for name in part}, coded)
        return {name: found[name] if name in needs else NOTHING_SEEN for name in layers}

    def _known_operands(self) -> set[str]:
        return {f"{attention}.{operand}" for attention in self.detectors[0].operand_scales for operand in OPERANDS}

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


def _is_operand(name: str) -> bool:
    return name.rpartition(".")[2] in OPERANDS
