"""The torch engine: a plain transformers checkpoint, bitsandbytes-quantized ones included, run eagerly."""

import inspect
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eval.core.documents import Batch, tokens_per_batch
from eval.core.errors import UserError, require_one_of
from eval.engines import REMAKE, Engine, at_every_position, first_line, load_tokenizer, silence, silenced

DEVICES = ("cpu", "cuda")
DTYPES = ["float32", "bfloat16", "float16"]  # in which models are computed
silence("bitsandbytes")  # int8 layers log a line when they are called, where `silenced` would cost time
CLASSIFIER = "ForSequenceClassification"  # how the name of such a class of transformers ends


def classifies(config: PreTrainedConfig) -> bool:
    """True of the config of a model that says the class of a text, and not its next token."""
    return any(name.endswith(CLASSIFIER) for name in config.architectures or [])


def model_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that makes or loads the models of a config."""
    return AutoModelForSequenceClassification if classifies(config) else AutoModelForCausalLM


def output_rows(config: PreTrainedConfig) -> int:
    """V: how many logits its models have at a position, of tokens or of classes."""
    return config.num_labels if classifies(config) else config.get_text_config().vocab_size


def logits_of(model: Any, batch: Batch, **options: Any) -> Tensor:
    """[B, T, V] logits of a model with the interface of transformers; of a classifier the same at each p."""
    return at_every_position(model(**batch.inputs, **options).logits, batch.input_ids.shape[1])


def load_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on the CPU, in evaluation mode, and its tokenizer, from a folder in the transformers format.

    Only safetensors are read, and no code of the folder is run. A quantized checkpoint keeps its format;
    `dtype` is that of the weights which are not quantized.

    Raises:
        UserError: a file is missing or damaged, a weight is missing, left over or of another shape, or
            the tokenizer gives ids that the model has no row for.
    """
    folder = Path(folder)
    model = load_model(folder, dtype=dtype)
    return model, load_tokenizer(folder, embedding_rows(model))


def load_model(
    folder: Path, *, dtype: torch.dtype | None = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """The model alone, on `device`, in `dtype` or, without one, as it is stored; see `load_checkpoint`."""
    quantized = check_folder(folder)
    dtype = dtype or stored_dtype(folder)
    try:
        with silenced("transformers"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            model, report = model_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
                device_map={"": device} if quantized else None,
            )
    except (ValueError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"model {folder}", f"cannot be read ({first_line(error)})", REMAKE) from error
    for kind in ("missing", "unexpected", "mismatched"):
        if keys := sorted(k if isinstance(k, str) else k[0] for k in report[f"{kind}_keys"]):
            problem = f"weights do not match config.json: {keys[0]} is {kind} ({len(keys)} such)"
            raise UserError(
                f"model {folder}", problem, "save model and config together with save_pretrained()"
            )
    return (model if quantized else model.to(device)).eval()


def with_labels(config: PreTrainedConfig, labels: Sequence[str]) -> PreTrainedConfig:
    """The config of a classifier of these classes, changed in place; without labels it stays as it is."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
        config.architectures = [CLASSIFIER]
    return config


def check_labels(config: PreTrainedConfig, labels: Sequence[str], where: str) -> None:
    """Refuses a pretrained model that is to classify as it is, and has no such classes.

    Raises:
        UserError: it is no classifier, or its classes have other names or another order.
    """
    if not labels:
        return
    if not classifies(config):
        fix = "give one that was trained for it, or train it here"
        raise UserError(where, f"{config.architectures} is no {CLASSIFIER}", fix)
    named = [config.id2label[number] for number in sorted(config.id2label)]
    if named != list(labels):
        raise UserError(where, f"its classes are {named}, data.labels are {list(labels)}", "write them alike")


def load_encoder(
    folder: Path, labels: Sequence[str], seed: int, where: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of a folder with a new head for these classes, whose weights `seed` decides.

    Weights of other heads are left aside.

    Raises:
        UserError: the folder is damaged, its family classifies nothing, or it lacks a weight below the head.
    """
    if check_folder(folder):
        raise UserError(where, "its weights are quantized", "give the model that it was made of")
    torch.manual_seed(seed)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with silenced("transformers"):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=with_labels(config, labels),
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # a head of other classes
                output_loading_info=True,
            )
    except (ValueError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        fix = "give a folder of a family that transformers classifies with, such as bert"
        raise UserError(where, f"{folder} ({first_line(error)})", fix) from error
    lost = [key for key in report["missing_keys"] if key.startswith(f"{model.base_model_prefix}.")]
    lost += [key for key, *_ in report["mismatched_keys"] if key.startswith(f"{model.base_model_prefix}.")]
    if lost := [key for key in lost if ".pooler." not in key]:
        raise UserError(where, f"{folder} lacks {lost[0]} ({len(lost)} such)", "give a whole model")
    return model.eval(), load_tokenizer(folder, embedding_rows(model))


def stored_dtype(folder: Path) -> torch.dtype:
    """The number format of the weights in a folder, as its config.json says; none said: float32.

    Raises:
        UserError: it is none that models are computed in.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = (config, config.get("text_config") or {})
    keys = ("dtype", "torch_dtype")  # the second one: before transformers 5
    names = [part.get(key) for part in parts for key in keys]
    name = next((str(name) for name in names if name), "float32").removeprefix("torch.")
    require_one_of(f"dtype in {folder / 'config.json'}", name, DTYPES)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def computing_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The number format to compute in: that of the weights, or float32 on a CPU that is slower in theirs.

    A CPU without instructions for 16-bit products takes 3 to 40 times as long as in float32, which holds
    every value of theirs exactly: what serves such a model there computes in float32.
    """
    if device.type != "cpu" or stored == torch.float32 or _product_ms(stored) < _product_ms(torch.float32):
        return stored
    return torch.float32


@cache
def _product_ms(dtype: torch.dtype) -> float:
    """Milliseconds of a product of two [256, 256] matrices on the CPU, the best of five."""
    left, times = torch.ones(256, 256, dtype=dtype), []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(left, left)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of rows of the input embedding: tokens that the model has."""
    return model.get_input_embeddings().num_embeddings


def check_folder(folder: Path) -> bool:
    """Checks that a folder has a readable config and whole safetensors; returns whether it is quantized.

    Raises:
        UserError: a file is missing or damaged, or the quantization is not one of bitsandbytes.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"model {folder}",
            "no config.json",
            "give a folder in the transformers format, made by save_pretrained()",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"config {path}", first_line(error), REMAKE) from error
    if not isinstance(config, dict):
        raise UserError(f"config {path}", f"a {type(config).__name__}, expected a mapping", REMAKE)
    check_weights(folder)
    if "quantization_config" in config:
        method = str(config["quantization_config"].get("quant_method"))
        require_one_of(f"quantization of {folder}", method, ["bitsandbytes"])
    return "quantization_config" in config


def check_weights(folder: Path) -> None:
    """Refuses a folder without safetensors, or with some that are cut short or have a damaged header."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(
            f"model {folder}",
            "no *.safetensors",
            "save the model with save_pretrained(): other formats are not read",
        )
    for path in paths:
        try:
            with safe_open(path, framework="pt"):
                continue
        except SafetensorError as error:
            raise UserError(f"weights {path}", first_line(error), REMAKE) from error


class TorchEngine(Engine):
    """A transformers model, computed in its `computing_dtype`; the state is its `past_key_values`."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device, quantized = torch.device(device), check_folder(folder)
        stored = stored_dtype(folder)
        dtype = stored if quantized else computing_dtype(stored, self.device)
        self.model = load_model(folder, dtype=dtype, device=device)
        self.computed_in = str(dtype).removeprefix("torch.") if dtype != stored else None
        parameters = inspect.signature(self.model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        super().__init__(folder, embedding_rows(self.model))

    @property
    def scoring_tokens(self) -> int:
        """On a GPU as many as its memory holds."""
        if self.device.type == "cpu":
            return super().scoring_tokens
        return tokens_per_batch(self.vocabulary, self.device)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        self.check_ids(batch.input_ids)
        moved = batch.to(self.device)
        return logits_of(self.model, moved, use_cache=False).float()

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        ids = self.check_ids(ids).to(self.device)
        if classifies(self.model.config):
            return self.model(input_ids=ids).logits.float(), None
        output = self.model(input_ids=ids, use_cache=True, **self.last_only)
        return output.logits[:, -1].float(), output.past_key_values

    @torch.inference_mode()
    def decode(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        ids = tokens[:, None].to(self.device)
        output = self.model(input_ids=ids, past_key_values=state, use_cache=True)
        return output.logits[:, -1].float(), output.past_key_values


def load(folder: Path, threads: int, device: str) -> Engine:
    torch.set_num_threads(threads)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device {device!r}",
            "this machine has no CUDA device",
            "run this on one that has, or on the device cpu",
        )
    return TorchEngine(folder, device)
