"""`precision: auto`: bf16 or float32, whichever this machine multiplies faster at the model's own shapes."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from transformers import AutoConfig, PreTrainedConfig

from distill.models.gguf import find_model, read_config
from distill.models.load import architecture_config
from eval.core.artifacts import write_text
from eval.core.sections import Base
from eval.core.sections.precision import PRECISION
from eval.core.study import Study, asks_for_auto, settled

SECONDS = 1.0  # of the whole measurement, at most; one product of each kind is made even so
FASTER = 1.3  # times the speed of float32 that bf16 must have: casts cost something too
FLOP = 1e9  # of one product, at most


def settle_precision(study: Study, acc: Accelerator) -> Study:
    """The study with `auto` replaced: by what the run folder chose before, or by a measurement now.

    One choice holds for all arms of a run, wherever it is continued, and for the recovery of their variants:
    S1 and S0 never differ by it.
    """
    if not asks_for_auto(study):
        return study
    file = study.folder / PRECISION
    if acc.is_main_process and not file.is_file():
        config = _base_config(study.base).get_text_config()
        width = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * width
        speeds = measure_products(study.data.context, width, inner, acc.device)
        chosen = "bf16" if speeds["bf16"] >= FASTER * speeds["fp32"] else "fp32"
        write_text(file, json.dumps({"precision": chosen, "gflops": speeds, "product": [width, inner]}))
        print(
            f"auto: {chosen} (products of width {width} by {inner} on {acc.device.type}: "
            f"{speeds['bf16']:,.0f} GFLOP/s in bf16, {speeds['fp32']:,.0f} in float32)",
            file=sys.stderr,
        )
    acc.wait_for_everyone()
    return settled(study)


def measure_products(tokens: int, width: int, inner: int, device: torch.device) -> dict[str, float]:
    """GFLOP/s of [tokens, width] x [width, inner] in bf16 and in float32, in turn; one thread on a CPU."""
    tokens = max(16, min(tokens, int(FLOP / (2 * width * inner))))
    left, right = torch.randn(tokens, width, device=device), torch.randn(inner, width, device=device)
    products: dict[str, Callable[[], torch.Tensor]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        products[name] = partial(torch.mm, left.to(dtype), right.to(dtype).mT)
    best = dict.fromkeys(products, float("inf"))
    threads, end = torch.get_num_threads(), time.perf_counter() + SECONDS
    if device.type == "cpu":
        torch.set_num_threads(1)  # as the workers that train
    try:
        for timed in (False, True):  # the first round warms up
            while True:
                for name, product in products.items():
                    seconds = _seconds(product, device)
                    best[name] = min(best[name], seconds) if timed else best[name]
                if not timed or time.perf_counter() >= end:
                    break
    finally:
        torch.set_num_threads(threads)
    return {name: round(2 * tokens * width * inner / seconds / 1e9, 1) for name, seconds in best.items()}


def _seconds(product: Callable[[], torch.Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    product()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _base_config(base: Base) -> PreTrainedConfig:
    """The transformers config of a base that `check_models` accepted."""
    if base.architecture is not None:
        return architecture_config(base.architecture, "base.architecture", base.vocab_size)
    assert base.path is not None
    if (place := find_model(base.path)) is not None:
        return read_config(place) if place.is_file() else AutoConfig.from_pretrained(place)
    return AutoConfig.from_pretrained(base.path, trust_remote_code=False, revision=base.revision or "main")
