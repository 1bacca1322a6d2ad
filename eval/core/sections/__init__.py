"""The sections of a study: frozen, with unknown keys refused. `eval.core.study` puts them together."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from eval.core.config import FileName, Frozen
from eval.core.sections.auxiliary import Exits as Exits
from eval.core.sections.auxiliary import Future as Future
from eval.core.sections.corruption import Corruption as Corruption
from eval.core.sections.models import NamedModel as NamedModel
from eval.core.sections.source import Source as Source
from eval.core.sections.tasks import Harness as Harness
from eval.core.sections.tasks import Task as Task

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class Data(Frozen):
    """Documents: split by the hash of their content, or of their id, into training, validation and test."""

    documents: list[Source] = Field(
        min_length=1, description="where documents come from; all sources together are split"
    )
    transfer: list[Source] = Field(
        [],
        description="what students learn from their teachers on, in place of `documents`: text without "
        "answers will do; bases, methods and CE train on `documents`",
    )
    labels: list[str] = Field(
        [],
        exclude_if=lambda value: not value,
        description="for `task: classification`: the classes; the last is what is looked for, such as spam",
    )
    mixture_seed: int = Field(0, ge=0, description="of the draws of sources that have a `weight`")
    shifted: dict[FileName, list[Source]] = Field(
        {}, description="slice name -> sources of documents that are only ever scored"
    )
    validation: int = Field(64, gt=1, description="documents that every run is scored on")
    test: int = Field(64, ge=0, description="documents set aside for the final check of a release")
    shifted_test: int = Field(
        0,
        ge=0,
        exclude_if=lambda value: not value,
        description="documents of each shifted slice that are set aside like `test`, in whole clusters; the "
        "clusters that are left are scored like validation",
    )
    corruptions: list[Corruption] = Field(
        [],
        description="slices made of damaged validation documents where they are scored: no data and no model "
        "depends on them",
    )
    tasks: dict[FileName, Task] = Field({}, description="name -> prompts with answers, only ever scored")
    max_dropped: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of the rows of a source that may be left out because they cannot be used, and of "
        "training rows to which a server or a file has no answer; empty files do not count",
    )
    min_bytes: int = Field(1, gt=0, description="shorter documents are left out")
    near_duplicates: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="similarity of words, such as 0.8, from which documents are on one side of the split",
    )
    cluster: Literal["group", "domain", "source", "none"] | None = Field(
        None,
        description="what scored documents are not independent by; none given: their group, where a source "
        "of the slice has groups or texts have labels, else their domain",
    )
    scored_bytes: int = Field(4096, gt=0, description="bytes to which a scored document is cut")
    context: int = Field(256, gt=1, description="tokens per row, in training and in scoring")
    train_rows: Annotated[int, Field(gt=0)] | Literal["all"] = Field(
        400, description="rows of `context` tokens to train on, or `all` that the training documents have"
    )
    loss_on: Literal["last", "all"] = Field(
        "last", description="answers of a chat that are learned; scored is the last one alone"
    )
    end_of_text: bool = Field(
        False, description="learn EOS after each document without a prompt; after an answer it always is"
    )
    packing: bool = Field(False, description="several documents to a row, none of which sees another")

    @model_validator(mode="after")
    def weights_fit(self) -> Self:
        for name in ("documents", "transfer"):
            if len({source.weight is None for source in getattr(self, name)}) > 1:
                raise ValueError(f"give every source of `{name}` a `weight`, or none")
        if any(source.weight for sources in self.shifted.values() for source in sources):
            raise ValueError("a source of `shifted` is only scored: it has no `weight`")
        return self

    @model_validator(mode="after")
    def test_is_whole(self) -> Self:
        if self.shifted_test and self.shifted and not self.test:
            raise ValueError("`shifted_test` needs `test` documents beside it; give both, or neither")
        return self

    @model_validator(mode="after")
    def slices_have_names_of_their_own(self) -> Self:
        names = [*self.shifted, *(one.slice for one in self.corruptions)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"slice {twice!r} is there twice: name each slice and give each corruption once")
        return self

    @property
    def sources(self) -> list[Source]:
        """All of them: of documents, of the transfer corpus, of shifted slices."""
        return [*self.documents, *self.transfer, *(s for group in self.shifted.values() for s in group)]

    def cluster_of(self, name: str) -> str:
        """What the documents of a slice are not independent by: `cluster`, or what its sources suggest."""
        sources = self.shifted.get(name.removeprefix("test/"), self.documents)  # or its test documents
        grouped = any(source.group_column or source.group_by_folder for source in sources)
        return self.cluster or ("group" if grouped or self.labels else "domain")


class Optimizer(Frozen):
    """Muon for the matrices (Jordan et al. 2024) with AdamW for the rest, or AdamW for all."""

    name: Literal["muon", "adamw", "adamw_8bit"] = Field(
        "adamw",
        description="`muon` for the matrices inside the layers, or `adamw_8bit` (bitsandbytes: moments of 8 "
        "bits), with AdamW for the rest; or `adamw` for all",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the matrices")
    lr_rest: float | None = Field(
        None, gt=0, description="peak learning rate of embeddings, norms and biases; none: `lr`"
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="momentum of Muon")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.95), description="decay rates of AdamW's two moments")
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay, multiplied by the learning rate"
    )


class Hidden(Frozen):
    """Hidden states of student layers drawn to those of teacher layers; 0 is the embedding."""

    pairs: list[tuple[int, int]] = Field(
        min_length=1, description="pairs of a student layer and a teacher layer; 0 is the embedding"
    )
    distance: Literal["mse", "cosine"] = Field("mse", description="distance between the hidden states")
    weight: float = Field(1.0, gt=0, description="factor of the distance in the loss")


class Loss(Frozen):
    """(1 - weight) CE + weight * divergence(teacher, student) + hidden.weight * hidden-state distance."""

    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "jsd",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
        "uld",
        "policy_gradient",
    ] = Field(
        "forward_kl",
        description="divergence of the student from the teacher; `uld`: between their sorted probabilities; "
        "`policy_gradient`: the reverse KL, estimated at the tokens that the student drew",
    )
    weight: float = Field(
        0.9, ge=0, le=1, description="share of the divergence; the rest is cross-entropy (CE)"
    )
    temperature: float = Field(1.0, gt=0, description="divides the logits of teacher and student")
    beta: float = Field(
        0.5, gt=0, lt=1, description="share of the teacher in the mixture of the generalised JSD"
    )
    alpha: float = Field(
        0.1, ge=0, lt=1, description="share of the other distribution in the mixture of a skew divergence"
    )
    hidden: Hidden | None = None

    @model_validator(mode="after")
    def drawn_from_the_student(self) -> Self:
        if self.divergence == "policy_gradient" and (self.temperature, self.weight) != (1, 1):
            raise ValueError("`policy_gradient` is at `temperature: 1` and of `weight: 1`")
        return self


class Train(Frozen):
    """How one model is trained."""

    epochs: int = Field(1, gt=0, description="passes over the training rows")
    steps: int | None = Field(None, gt=0, description="optimizer steps; overrides `epochs`")
    rows: int = Field(4, gt=0, description="rows per step, over all processes and accumulation steps")
    accumulate: int = Field(1, gt=0, description="micro-batches per step; divides `rows`")
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    future: Future | None = None
    exits: Exits | None = Field(None, exclude_if=lambda value: value is None)
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="number format of the products; losses and weights stay in fp32. `tf32`: CUDA only. "
        "`auto`: bf16 where it is faster, measured once for a run",
    )
    compile: bool = Field(False, description="compile the model with torch.compile")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="how attention is computed, by its name in transformers; `auto`: as it chooses"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, a third more time"
    )
    warmup: float = Field(
        0.05, ge=0, le=1, description="share of the steps in which the learning rate rises linearly"
    )
    schedule: Literal["wsd", "cosine"] = Field(
        "wsd",
        description="of the learning rate: flat, then `decay`; or half a cosine wave to zero",
    )
    decay: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of the steps, the last ones, in which `wsd` falls to zero",
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    checkpoint_every: int = Field(100, gt=0, description="steps between checkpoints")
    evaluate_every: int | None = Field(
        None, gt=0, description="steps between measurements of validation bits per byte; none: never"
    )

    @model_validator(mode="after")
    def divides(self) -> Self:
        if self.rows % self.accumulate:
            raise ValueError(f"rows ({self.rows}) must be a multiple of accumulate ({self.accumulate})")
        return self


class Generation(Frozen):
    """How a student or a teacher writes: the first tokens of a training row, then new ones."""

    prompt_tokens: int = Field(32, gt=0, description="first tokens of a training row that are the prompt")
    new_tokens: int = Field(64, gt=0, description="tokens to write after the prompt, at most")
    temperature: float = Field(1.0, ge=0, description="divides the logits; 0: the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="probability mass of the likeliest tokens to draw from")


class Targets(Frozen):
    """What a student learns from its teacher."""

    source: Literal["cached", "online", "on_policy", "sequence"] = Field(
        "cached",
        description="the teacher's outputs: from a cache, or from a teacher that runs, on rows of the data "
        "(`online`), of the student (`on_policy`) or of the teacher (`sequence`)",
    )
    alignment: Literal["tokens", "bytes"] = Field(
        "tokens",
        description="what student and teacher are compared over: the tokens of one tokenizer, or pieces of "
        "text that end at the same byte in both of theirs",
    )
    form: Literal["dense", "sampled", "top_k"] = Field(
        "dense", description="what a cache holds per token: all logits, sampled ids, or the likeliest ids"
    )
    draws: int = Field(50, gt=0, description="sampled ids per token, for `form: sampled`")
    k: int = Field(64, gt=0, description="likeliest ids per token, for `form: top_k`")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "float32", description="number format of a teacher that runs; `auto`: as for `train.precision`"
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="weights of a teacher that runs; CUDA only"
    )
    share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the steps whose rows the student writes, for `source: on_policy`",
    )
    samples: int = Field(1, gt=0, description="texts after every prompt, for `source: on_policy`")
    generation: Generation = Generation()


class Student(Frozen):
    """What of the student is trained, and what it starts from. It is exported merged and plain."""

    tuning: Literal["full", "lora", "qlora"] = Field(
        "full", description="all weights, or LoRA adapters (`qlora`: over a base in nf4)"
    )
    rank: int = Field(16, gt=0, description="rank of the adapters")
    lora_alpha: int = Field(32, gt=0, description="the adapters' product is scaled by lora_alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate before the adapters")
    modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="names of the modules that get adapters"
    )
    start: Literal["base", "every", "influential", "fresh", "pretrained"] = Field(
        "base",
        description="initial weights: the base, `layers` of its layers, evenly spaced (`every`) or of most "
        "influence (`influential`), a new model (`fresh`), or another one that is named (`pretrained`)",
    )
    path: str | None = Field(
        None, description="the model of `start: pretrained`, as `base.path`: it has the tokenizer of the base"
    )
    revision: str | None = Field(None, description="commit, tag or branch of `path` on the hub")
    layers: int | None = Field(
        None, gt=0, description="layers of the base to keep, for `start: every` and `influential`"
    )
    architecture: dict[str, Any] | None = Field(
        None, description="a fresh student: `model_type` and fields of its transformers config"
    )

    @model_validator(mode="after")
    def check_initialisation(self) -> Self:
        if (self.start in ("every", "influential")) != (self.layers is not None):
            raise ValueError("`layers` says how many layers `start: every` or `influential` keeps")
        if (self.start == "fresh") != (self.architecture is not None):
            raise ValueError("`architecture` is given for `start: fresh`, and for it alone")
        if (self.start == "pretrained") != (self.path is not None):
            raise ValueError("`path` is given for `start: pretrained`, and for it alone")
        if self.start == "fresh" and self.tuning != "full":
            raise ValueError("`start: fresh` needs `tuning: full`: there is nothing yet to adapt")
        return self


class Base(NamedModel):
    """The plain model: a hub name, a folder or a GGUF file, or an architecture trained from nothing."""

    architecture: dict[str, Any] | None = Field(
        None,
        description="`model_type` and fields of its transformers config; trained from nothing by `train`",
    )
    vocab_size: int = Field(
        1024, gt=256, le=2**24, description="entries of the tokenizer that is trained with an `architecture`"
    )
    tokenizer: str | None = Field(
        None,
        description="where an `architecture` takes its tokenizer from, as `path` names a model; none: it is "
        "trained",
    )
    train: Train | None = Field(
        None, description="how the base is trained; none: the named model is used as it is"
    )

    @model_validator(mode="after")
    def one_origin(self) -> Self:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of `path` (hub name, folder or GGUF file) and `architecture`")
        if self.architecture is not None and self.train is None:
            raise ValueError("`architecture` needs `train`: an untrained base has nothing to teach")
        if self.tokenizer is not None and self.architecture is None:
            raise ValueError("`tokenizer` is for an `architecture`: a named model has its own")
        return self


class MethodChoice(Frozen):
    """How the knowledge is transferred: a plug-in and its settings."""

    name: str = Field(description="a file of distill/methods, or `package.module` of your own")
    settings: dict[str, Any] = Field({}, description="settings of the method; each method checks its own")


class Load(Frozen):
    """Open-loop load: requests arrive as a Poisson process, whether or not the one before is done."""

    rates: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        min_length=1,
        description="requests per second, one run each; none: rates are raised until the knee",
    )
    seconds: float = Field(30.0, gt=0, description="seconds per rate; 200 requests must arrive at least")
    slo_ms: float | None = Field(
        None, gt=0, description="ms from the intended arrival to the answer, to be held at p95"
    )


class Cost(Frozen):
    """How latency and memory are measured: batch 1, then the other `batch_sizes`."""

    processes: int = Field(5, gt=1, description="fresh processes per variant")
    prompt_tokens: int = Field(128, gt=0, description="tokens of a request's prompt")
    new_tokens: int = Field(32, gt=0, description="tokens to generate per request; 1: of a classifier")
    requests: int = Field(20, gt=0, description="measured requests per process, after warm-up")
    warmup: int = Field(3, gt=0, description="requests per process before measurement starts")
    threads: int = Field(1, gt=0, description="threads of a process on a CPU")
    batch_sizes: list[int] = Field([1], description="requests answered together; starts with 1, ascending")
    load: Load | None = None

    @model_validator(mode="after")
    def sizes_ascend(self) -> Self:
        if self.batch_sizes != sorted({1, *self.batch_sizes}) or self.batch_sizes[0] < 1:
            raise ValueError(f"batch_sizes must start with 1 and ascend, found {self.batch_sizes}")
        return self
