"""SAM2's configuration, which no release states: read off the shapes of its tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from defaker_opt.errors import SourceError
from defaker_opt.presets.tables import SAM2_TRUNKS
from defaker_opt.sources import Checkpoint
from defaker_opt.weights import Shapes

_TRUNK = "mask_encoder.trunk."


def read_segmenter(checkpoint: Checkpoint, shapes: Shapes) -> dict[str, Any]:
    """The `segmenter` part of a detector's configuration. shapes: by the names of a detector folder."""
    if not any(name.startswith(_TRUNK) for name in shapes):
        raise SourceError(
            f"{checkpoint.folder}: a language model without a segmenter; add SAM2's weights with --segmenter FILE.pt"
        )
    blocks = tuple(_blocks_by_stage(shapes))
    width = _size(shapes, f"{_TRUNK}patch_embed.projection.weight", 0)
    layout = checkpoint.facts.get("sam2_trunk") or _released(width, blocks)
    if layout is None:
        raise SourceError(
            f"{checkpoint.folder}: a SAM2 trunk of width {width} and {list(blocks)} blocks a stage is none of the "
            f"released ones; give its num_heads, global_att_blocks and window_spec as sam2_trunk in "
            f"{checkpoint.folder}/checkpoint_meta.json"
        )
    decoder = _numbers(shapes, r"mask_decoder\.transformer\.layers\.(\d+)\.")
    return {
        "image_size": 1024,
        "blocks": blocks,
        "widths": [width * 2**stage for stage in range(4)],
        "heads": [layout["num_heads"] * 2**stage for stage in range(4)],
        "windows": layout["window_spec"],
        "global_blocks": layout["global_att_blocks"],
        "position_grid": [_size(shapes, f"{_TRUNK}pos_embed", axis) for axis in (2, 3)],
        "hidden_size": _size(shapes, "mask_decoder.iou_token.weight", 1),
        "decoder_layers": 1 + max(decoder),
        "decoder_heads": 8,
        "decoder_intermediate_size": _size(shapes, "mask_decoder.transformer.layers.0.mlp.proj_in.weight", 0),
        "iou_hidden_size": _size(shapes, "mask_decoder.iou_head.proj_in.weight", 0),
    }


def _released(width: int, blocks: tuple[int, ...]) -> dict[str, Any] | None:
    """What shapes cannot tell: which blocks attend globally, and the windows."""
    for trunk in SAM2_TRUNKS.values():
        if (trunk.width, trunk.blocks) == (width, blocks):
            return {
                "num_heads": trunk.heads,
                "global_att_blocks": list(trunk.global_blocks),
                "window_spec": list(trunk.windows),
            }
    return None


def _blocks_by_stage(shapes: Shapes) -> Iterator[int]:
    """A block whose projection changes the width begins a stage."""
    count = 1 + max(_numbers(shapes, re.escape(_TRUNK) + r"blocks\.(\d+)\."))
    starts = [0, *(i for i in range(count) if f"{_TRUNK}blocks.{i}.proj.weight" in shapes), count]
    for start, end in itertools.pairwise(starts):
        yield end - start


def _size(shapes: Shapes, name: str, axis: int) -> int:
    if name not in shapes or len(shapes[name]) <= axis:
        raise SourceError(f"{name}: missing from the checkpoint, or of another shape; is it complete?")
    return shapes[name][axis]


def _numbers(shapes: Shapes, pattern: str) -> list[int]:
    found = [int(match[1]) for match in (re.match(pattern, name) for name in shapes) if match]
    if not found:
        raise SourceError(f"no tensor in the checkpoint becomes one named like {pattern}; is it complete?")
    return found
