"""Our GPTQ checkpoints as GPTQModel reads them.

    python profiling/gptq_interchange.py

The language part of the embedded detector and of small drawn ones is written and loaded by GPTQModel on the
CPU; both compute logits for the same tokens. `weights`: largest difference of a decoded weight, which must be 0.
`same_numbers`: ‖difference‖ / ‖logits‖ in float32 with the folder's numbers. `as_loaded`: the same between GPTQModel in
float16 and the float32 stage with the build's own codes. `same_words`: share of positions where both then have the same
likeliest token. GPTQModel gets an environment of its own in the cache folder, with the torch that is here. Phi-3 is not
among them: GPTQModel 7.6 wants its fused projection taken apart, as transformers, whose names we write, does not have
it. JSON is the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from environments import python_of

from defaker_opt.checkpoint import Tensors, gptq, tensors_of
from defaker_opt.detector import Detector, linear_weights, load_detector, source_folder, stored_shapes
from defaker_opt.gptq_folder import write_gptq
from defaker_opt.gptq_folder.layout import find_layout
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.pipeline import plan_job
from defaker_opt.recipe import load_recipe
from defaker_opt.stages.language import Language
from defaker_opt.target import load_target
from defaker_opt.weights import DrawnWeights, open_weights

PEER_PACKAGES = (f"torch=={torch.__version__}", "gptqmodel==7.6.0")
TOKENS = 48

# Runs in GPTQModel's environment: what a checkpoint decodes to, and its logits: in float16, and in float32 with the
# same numbers.
LOAD = """
import sys, numpy as np, torch
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
tokens = torch.from_numpy(np.load(sys.argv[2]))
with torch.inference_mode():
    said = {"float16": model(input_ids=tokens).logits[0].float().numpy()}
    for name, layer in [each for each in model.named_modules() if hasattr(each[1], "qweight")]:
        layer.scales.data = layer.scales.data.float()  # its kernels are for float16, its decoder is not
        weight = layer.dequantize_weight().float().T.contiguous()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        plain.weight.copy_(weight)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
        model.set_submodule(name, plain)
        said[name + ".weight"] = weight.numpy()
    said["float32"] = model.float()(input_ids=tokens).logits[0].numpy()
np.savez(sys.argv[3], **said)
"""


def peer_python() -> Path:
    """The interpreter of an environment with GPTQModel, which is made on first use."""
    return python_of("gptqmodel", ("install", *PEER_PACKAGES))


def ask_peer(script: str, *arguments: object) -> None:
    """Run a script in GPTQModel's environment; what it prints goes to our standard error."""
    settings = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "TORCHDYNAMO_DISABLE": "1"}
    command = [str(peer_python()), "-c", script, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as away:  # it writes logs where it is run
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **settings}, cwd=away)  # noqa: S603 - our own


def detectors() -> Iterator[tuple[str, Detector]]:
    """The embedded detector by its recipe, then small ones with drawn weights for all that a checkpoint may have."""
    job = plan_job(load_recipe("int4"), load_target("cpu"), "reference", lambda what, fraction: None)
    for each in job.recipe.passes:
        each.apply(job.detector, lambda what, fraction: None, job.samples)
    yield "reference, recipe int4", job.detector
    plain = load_detector("reference").config
    for name, changed, scheme in (
        ("llama", {"rope_theta": 1e6}, "int4-g64"),
        ("llama", {}, "int4-sym-g64"),
        ("llama", {}, "int2-asym-g32"),
        ("qwen2", {}, "int4-asym-g32"),
    ):
        language = dataclasses.replace(plain.language, architecture=name, **changed)
        config = dataclasses.replace(plain, language=language)
        detector = Detector(config, DrawnWeights(stored_shapes(config), 0))
        rules = (Rule("language.layers.*", scheme, "mse_clip"), Rule("*", "float"))
        Quantize(rules).apply(detector, lambda what, fraction: None)
        yield ", ".join([name, *changed, scheme]), detector


def our_logits(detector: Detector, tokens: torch.Tensor, folder: Tensors | None) -> np.ndarray:
    """Logits [S, V] in float32 of the language stage with the build's codes, or with the numbers of a folder."""
    stage = detector.load_stage("language")
    assert isinstance(stage, Language)
    embedding, head = (detector.read(f"language.{name}.weight") for name in ("embed_tokens", "lm_head"))
    with torch.inference_mode():
        if folder is not None:
            embedding, head = (folder.read(f"{name}.weight").float() for name in ("model.embed_tokens", "lm_head"))
            for name, parameter in stage.named_parameters():
                if f"model.{name}" in folder.places:
                    parameter.copy_(folder.read(f"model.{name}"))
        language = detector.config.language
        past = tuple(torch.zeros(1, language.kv_heads, 0, language.head_dim) for _ in range(2 * language.layers))
        hidden, _ = stage.hidden_states(embedding[tokens], torch.arange(tokens.shape[1])[None], past)
        logits: np.ndarray = (stage.norm(hidden[0]) @ head.T).numpy()
    return logits


def read_folder(folder: Path) -> Tensors:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return gptq.unpacked(folder, tensors_of(open_weights(folder)), config)


def relative(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def check_written(detector: Detector, work: Path) -> dict[str, float]:
    """Write a folder, let GPTQModel load it, and compare."""
    schemes = {name: str(weight.scheme) for name, weight in detector.codes.items()}
    layout = find_layout(linear_weights(detector.config, "language"), schemes, ())
    folder = work / "written"
    write_gptq(detector, layout, folder, source_folder("reference"), "", lambda what, fraction: None)
    vocab = detector.config.language.vocab_size
    tokens = np.random.default_rng(0).integers(5, vocab, (1, TOKENS))
    np.save(work / "tokens.npy", tokens)
    ask_peer(LOAD, folder, work / "tokens.npy", work / "said.npz")
    said, ours = np.load(work / "said.npz"), read_folder(folder)
    decoded = [name for name in said.files if name.endswith(".weight")]
    build = our_logits(detector, torch.from_numpy(tokens), None)
    same = our_logits(detector, torch.from_numpy(tokens), ours)
    return {
        "layers": len(decoded),
        "weights": max(float(np.abs(said[name] - ours.read(name).numpy()).max()) for name in decoded),
        "same_numbers": relative(said["float32"], same),
        "as_loaded": relative(said["float16"], build),
        "same_words": float((said["float16"].argmax(-1) == build.argmax(-1)).mean()),
    }


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for name, detector in detectors():
        with tempfile.TemporaryDirectory() as work:
            results[name] = check_written(detector, Path(work))
        print(name, results[name], file=sys.stderr)
    print(json.dumps({"checkpoints": results, "tokens": TOKENS, "versions": PEER_PACKAGES}))


if __name__ == "__main__":
    main()
