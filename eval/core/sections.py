"""The sections of a study: frozen, with unknown keys refused. `eval.core.study` puts them together."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Frozen):
    """Where documents come from."""

    kind: Literal["folder", "dataset", "pydoc"]
    path: str = ""  # folder: a directory, `stdlib`, `package:NAME`; dataset: hub id, json, parquet, text
    include: list[str] = ["**/*.py"]
    exclude: list[str] = []  # shell patterns against /the/path/below/the/root
    data_files: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    prompt_column: str | None = None  # context that is given: only the text after it is learned and scored
    messages_column: str | None = None  # chats: the tokenizer's template; the last answer is the text
    streaming: bool = False  # of a data set: read only as many documents as are asked for
    domain_column: str | None = None
    domain: str | None = None  # a fixed name; folder sources default to the top folder of each file
    documents: int | None = Field(None, gt=0)  # at most so many: by hash; of a data set, the first

    @model_validator(mode="after")
    def stream_ends(self) -> Self:
        if self.streaming and self.documents is None:
            raise ValueError("`streaming` needs `documents`: how many to take")
        return self


class Corruption(Frozen):
    """Damage done to every validation document, the same in every run."""

    kind: Literal["typos", "truncation", "whitespace"]
    strength: float = Field(gt=0, le=1)  # share of the characters, of the bytes, of the spaces

    @property
    def slice(self) -> str:
        return f"{self.kind}-{self.strength:g}"


class Task(Frozen):
    """Prompts with answers: a JSONL file, or a task of lm-evaluation-harness as `lm_eval:NAME`."""

    kind: Literal["multiple_choice", "exact_match", "f1", "lm_eval"]
    path: str
    new_tokens: int = Field(16, gt=0)  # of a generated answer
    limit: int | None = Field(None, gt=0)  # at most so many samples


class Data(Frozen):
    """Documents: split by the hash of their id into training, validation and test ones."""

    documents: list[Source] = Field(min_length=1)
    shifted: dict[str, list[Source]] = {}  # slice name -> documents that are only ever scored
    validation: int = Field(64, gt=1)
    test: int = Field(64, ge=0)
    corruptions: list[Corruption] = []  # slices made of the validation documents, only ever scored
    tasks: dict[str, Task] = {}  # name -> prompts with answers, only ever scored
    scored_bytes: int = Field(4096, gt=0)  # a scored document is cut to so many bytes
    context: int = Field(256, gt=1)  # tokens per row
    train_rows: int = Field(400, gt=0)
    packing: bool = False  # several documents to a row, none of which sees another


class Optimizer(Frozen):
    """Muon for the matrices (Jordan et al. 2024) with AdamW for the rest, or AdamW for all."""

    name: Literal["muon", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)  # of the matrices
    lr_rest: float | None = Field(None, gt=0)  # of embeddings, norms and biases; default: lr
    momentum: float = Field(0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)


class Hidden(Frozen):
    """Hidden states of student layers drawn to those of teacher layers; 0 is the embedding."""

    pairs: list[tuple[int, int]] = Field(min_length=1)  # student layer, teacher layer
    distance: Literal["mse", "cosine"] = "mse"
    weight: float = Field(1.0, gt=0)


class Loss(Frozen):
    """(1 - weight) CE + weight * divergence(teacher, student) + hidden.weight * hidden-state distance."""

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"
    ] = "forward_kl"
    weight: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.5, gt=0, lt=1)  # of the generalized JSD
    alpha: float = Field(0.1, ge=0, lt=1)  # of the skew divergences: the share of the other in the mixture
    hidden: Hidden | None = None


class Train(Frozen):
    """How one model is trained."""

    epochs: int = Field(1, gt=0)
    steps: int | None = Field(None, gt=0)  # overrides epochs
    rows: int = Field(4, gt=0)  # per step, over all processes and accumulation steps
    accumulate: int = Field(1, gt=0)
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward pass; losses and weights stay in fp32
    compile: bool = False
    warmup: float = Field(0.05, ge=0, le=1)  # share of the steps
    decay: float = Field(0.3, ge=0, le=1)  # share of the steps, linear to zero
    clip: float = Field(1.0, gt=0)
    checkpoint_every: int = Field(100, gt=0)
    evaluate_every: int | None = Field(None, gt=0)  # steps between validation bits per byte

    @model_validator(mode="after")
    def divides(self) -> Self:
        if self.rows % self.accumulate:
            raise ValueError(f"rows ({self.rows}) must be a multiple of accumulate ({self.accumulate})")
        return self


class Generation(Frozen):
    """How a student or a teacher writes: the first tokens of a training row, then new ones."""

    prompt_tokens: int = Field(32, gt=0)
    new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, ge=0)  # 0: the likeliest token
    top_p: float = Field(1.0, gt=0, le=1)


class Targets(Frozen):
    """What a student learns from its teacher."""

    source: Literal["cached", "online", "on_policy", "sequence"] = "cached"
    form: Literal["dense", "sampled", "top_k"] = "dense"  # of a cache
    draws: int = Field(50, gt=0)  # sampled ids per token
    k: int = Field(64, gt=0)  # likeliest ids per token
    dtype: Literal["float32", "bfloat16"] = "float32"  # of a teacher that runs
    quantization: Literal["int8", "nf4"] | None = None  # of a teacher that runs, CUDA only
    share: float = Field(0.5, ge=0, le=1)  # of the steps whose rows the student writes, on-policy
    generation: Generation = Generation()


class Student(Frozen):
    """What of the student is trained, and what it starts from. It is exported merged and plain."""

    tuning: Literal["full", "lora", "qlora"] = "full"
    rank: int = Field(16, gt=0)
    lora_alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    modules: list[str] | Literal["all-linear"] = "all-linear"
    start: Literal["base", "every", "influential", "fresh"] = "base"
    layers: int | None = Field(None, gt=0)  # how many layers of the base to keep
    architecture: dict[str, Any] | None = None  # of a fresh student

    @model_validator(mode="after")
    def start_is_told(self) -> Self:
        if (self.start in ("every", "influential")) != (self.layers is not None):
            raise ValueError("`layers` says how many layers `start: every` or `influential` keeps")
        if (self.start == "fresh") != (self.architecture is not None):
            raise ValueError("`architecture` is given for `start: fresh`, and for it alone")
        if self.start == "fresh" and self.tuning != "full":
            raise ValueError("`start: fresh` needs `tuning: full`: there is nothing yet to adapt")
        return self


class Base(Frozen):
    """The plain model: a hub name or folder, or an architecture trained from nothing."""

    path: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None  # `model_type` and the fields of its transformers config
    vocab_size: int = Field(1024, gt=256)
    train: Train | None = None  # none: the named model is used as it is

    @model_validator(mode="after")
    def one_origin(self) -> Self:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of `path` (hub name or folder) and `architecture`")
        if self.architecture is not None and self.train is None:
            raise ValueError("`architecture` needs `train`: an untrained base has nothing to teach")
        return self


class MethodChoice(Frozen):
    name: str  # a file of distill/methods, or `package.module` of your own
    settings: dict[str, Any] = {}


class Load(Frozen):
    """Open-loop load: requests arrive as a Poisson process, whether or not the one before is done."""

    rates: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=1)  # per second; none: by knee
    seconds: float = Field(10.0, gt=0)  # per rate
    slo_ms: float | None = Field(None, gt=0)  # latency from the intended arrival that must be held at p95


class Cost(Frozen):
    """How latency and memory are measured: batch 1, then the other `batch_sizes`."""

    processes: int = Field(3, gt=1)
    prompt_tokens: int = Field(128, gt=0)
    new_tokens: int = Field(32, gt=1)
    requests: int = Field(20, gt=0)  # per process, after warm-up
    warmup: int = Field(3, gt=0)
    threads: int = Field(1, gt=0)
    batch_sizes: list[int] = [1]
    load: Load | None = None

    @model_validator(mode="after")
    def sizes_ascend(self) -> Self:
        if self.batch_sizes != sorted({1, *self.batch_sizes}) or self.batch_sizes[0] < 1:
            raise ValueError(f"batch_sizes must start with 1 and ascend, found {self.batch_sizes}")
        return self
