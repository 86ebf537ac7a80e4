"""Are the operations counted from full-size graphs those of the formulas? No weight is needed, only names and shapes.

    python profiling/roofline_counts.py [--source defakerone-2b:random] [--tokens 1000]

Stages are exported as trained, without savings. `published` is the literature's formula: for the vision encoder
its layers alone, for the mask encoder windows without padding and no neck, for a prefill causal attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from defaker_opt.detector import Detector, load_detector
from defaker_opt.graph.export import export_stage
from defaker_opt.planning.formulas import language_counts, mask_encoder_counts, vision_counts
from defaker_opt.profiles.work import count_work
from defaker_opt.savings import NO_SAVING


def counted(detector: Detector, stage: str, sizes: dict[str, tuple[int, ...]]) -> float:
    """Operations of an exported stage whose parameters stay without values."""
    graph = export_stage(detector, stage)
    inner = graph.model.graph
    for name in [name for name in inner.initializers if name.startswith(f"{stage}.")]:
        value = inner.initializers.pop(name)
        value.const_value = None
        inner.inputs.append(value)
    return count_work(ir.to_proto(graph.model), sizes, [tensor.name for tensor in graph.spec.outputs]).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="defakerone-2b:random")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--stages", nargs="+", default=["vision_encoder", "mask_encoder", "language"])
    arguments = parser.parse_args()
    detector = dataclasses.replace(load_detector(arguments.source), savings=NO_SAVING)
    config, tokens = detector.config, arguments.tokens
    language, vision, tile = config.language, config.vision, config.tiling.tile_size
    n, d = (tile // vision.patch_size) ** 2 + 1, vision.hidden_size
    past = (1, language.kv_heads, 0, language.head_dim)
    prefill: dict[str, tuple[int, ...]] = {
        "inputs_embeds": (1, tokens, language.hidden_size),
        "position_ids": (1, tokens),
    }
    prefill |= {f"past_{kind}_{layer}": past for kind in ("key", "value") for layer in range(language.layers)}
    keys = language.kv_heads * language.head_dim
    width, inner = language.hidden_size, language.intermediate_size
    parameters = language.layers * (width * (width + 2 * keys) + width * width + 3 * width * inner)
    cases: dict[str, tuple[dict[str, tuple[int, ...]], float, float]] = {
        "vision_encoder": (
            {"tiles": (1, 3, tile, tile)},
            vision_counts(config, 1).total,
            vision.layers * (2 * n * (4 * d * d + 2 * d * vision.intermediate_size) + 4 * n * n * d),
        ),
        "mask_encoder": (
            {"image": (1, 3, config.segmenter.image_size, config.segmenter.image_size)},
            mask_encoder_counts(config).total,
            1.812e12,
        ),
        "language": (
            prefill,
            language_counts(config, tokens).total,
            2 * parameters * tokens + 2 * tokens**2 * width * language.layers,
        ),
    }
    rows: dict[str, Any] = {}
    table = Table("stage", "graph", "our formula", "published", title=f"{arguments.source}, 10¹² operations")
    for stage in arguments.stages:
        sizes, formula, published = cases[stage]
        found = counted(detector, stage, sizes)
        rows[stage] = {"graph": found, "formula": formula, "published": published}
        table.add_row(stage, *(f"{value / 1e12:.4f} ({found / value - 1:+.2%})" for value in rows[stage].values()))
    Console(width=120).print(table)
    print(json.dumps({"source": arguments.source, "tokens": tokens, "operations": rows}))


if __name__ == "__main__":
    main()
