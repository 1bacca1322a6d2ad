"""A teacher behind a server with OpenAI's completions, such as vLLM; asked row by row, resumed row by row."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from distill.method import Method, Plain
from distill.teachers.answers import Answer, AnsweringTeacher, check_answer, likeliest
from distill.teachers.spelling import BROKEN, BY_ID, Spelling, Unmapped, columns, spellings
from eval.core.artifacts import digest
from eval.core.config import Frozen
from eval.core.documents import Batch, Row
from eval.core.errors import UserError
from eval.core.sections.models import Server

THING = "teacher.server"
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses after which another try may succeed
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before the second try, and at most


class Refused(Exception):
    """An answer of the server that another try would not change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"status {status}: {message}")
        self.status = status


class Client:
    """The connection to a server: time-outs, further tries, and a key that no message repeats.

    Raises:
        UserError: the environment variable that is to hold the key is not set.
    """

    def __init__(self, server: Server) -> None:
        self.server, self.key = server, ""
        if server.api_key_env is not None:
            self.key = os.environ.get(server.api_key_env, "")
            if not self.key:
                fix = f"set {server.api_key_env} to the key of the server"
                raise UserError(f"{THING}.api_key_env", f"{server.api_key_env} is not set", fix)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = httpx.Client(timeout=server.timeout, headers=headers)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers; a path with a slash in front is not below `/v1`.

        Raises:
            Refused: it refuses.
            UserError: it does not answer, or answers no JSON.
        """
        start = self.server.url.rstrip("/")
        url = f"{start.removesuffix('/v1')}{path}" if path.startswith("/") else f"{start}/{path}"
        tries = self.server.retries + 1
        cause = ""
        for attempt in range(tries):
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
            try:
                response = self.http.request(method, url, json=body)
            except httpx.TransportError as error:
                cause = f"{type(error).__name__} {error}".strip()
            else:
                if response.status_code == httpx.codes.OK:
                    return self._json(response)
                cause = f"status {response.status_code}: {self._message(response)}"
                if response.status_code not in TRY_AGAIN:
                    raise Refused(response.status_code, self._message(response))
                wait = max(wait, _retry_after(response))
            if attempt < tries - 1:
                time.sleep(wait)
        problem = f"{url} does not answer after {tries} tries ({cause})"
        raise UserError(THING, problem, "start it, then give the same command: it goes on where it was")

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            problem = f"{response.url} answers no JSON: {self._clean(response.text)}"
            raise UserError(THING, problem, "give the address up to `/v1`") from error

    def _message(self, response: httpx.Response) -> str:
        """What the server says of an error, in one line, without the key."""
        try:
            body = response.json()
            text = str(body["error"]["message"] if "error" in body else body["message"])
        except (ValueError, KeyError, TypeError):  # it says it otherwise
            text = response.text
        return self._clean(text)

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self.key, "***") if self.key else text)[:300]


def _retry_after(response: httpx.Response) -> float:
    """Seconds that a server asks to wait, as a number or as a date; 0: it does not ask."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date either
        return 0.0


def _refusal(server: Server, error: Refused, row: str = "") -> UserError:
    if error.status in (401, 403):
        fix = f"give a key that it takes in {server.api_key_env or 'teacher.server.api_key_env'}"
        return UserError(THING, f"refuses the key ({error})", fix)
    fix = "leave its document out, or set targets.k, data.context or the server itself to fit"
    return UserError(f"{THING}{row}", f"refused with {error}", fix if row else "give the address up to `/v1`")


class ServerTeacher(AnsweringTeacher):
    """A teacher that a server runs: it is asked for the k likeliest ids of every token of a row.

    Args:
        tokenizer: of student and teacher.
        k: ids of a token.
        store: folder of answers that are not on disk elsewhere yet, a file a row; None: they are not stored.
    """

    unanswered = "rows whose tokens the server spells so that their ids cannot be told"

    def __init__(
        self,
        server: Server,
        method: Method,
        tokenizer: PreTrainedTokenizerBase,
        k: int,
        store: Path | None = None,
    ) -> None:
        super().__init__(method, 1 + max(tokenizer.get_vocab().values()))
        self.server, self.client, self.k, self.store = server, Client(server), k, store
        self.front = method.in_front(tokenizer)
        self.texts = [tokenizer.decode([i]) for i in range(self.vocabulary)]
        self.spellings = spellings(tokenizer, self.texts)

    def close(self) -> None:
        self.client.http.close()

    def answers(self, batch: Batch) -> list[Answer | None]:
        """One for each row of a batch; None where its tokens' texts cannot be mapped back to ids.

        Raises:
            UserError: the server refuses a row, which is named, does not answer, or answers something else.
        """
        rows = []
        for i, length in enumerate(batch.attention_mask.sum(1).tolist()):
            tokens = batch.input_ids[i, :length].tolist()
            rows.append(Row(batch.documents[i], batch.domains[i], i, tokens))
        known: dict[int, Answer | None] = {
            i: answer for i, row in enumerate(rows) if (answer := self._stored(row)) is not None
        }
        missing = [i for i in range(len(rows)) if i not in known]
        groups = [missing[i : i + self.server.batch] for i in range(0, len(missing), self.server.batch)]
        names = dict(enumerate(batch.ids))

        def ask(group: list[int]) -> list[Answer | None]:
            return self._ask([rows[i] for i in group], [names[i] for i in group])

        with ThreadPoolExecutor(self.server.parallel) as threads:
            futures = [threads.submit(ask, group) for group in groups]
            try:
                for group, future in zip(groups, futures, strict=True):
                    known |= dict(zip(group, future.result(), strict=True))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return [known[i] for i in range(len(rows))]

    def written(self, batch: Batch) -> None:
        """Deletes the stored answers for a batch."""
        for i, length in enumerate(batch.attention_mask.sum(1).tolist()):
            row = Row(batch.documents[i], batch.domains[i], i, batch.input_ids[i, :length].tolist())
            if (path := self._place(row)) is not None:
                path.unlink(missing_ok=True)

    def _prompt(self, row: Row) -> list[int]:
        return [*self.front.get(row.domain, self.front.get("", [])), *row.tokens]

    def _place(self, row: Row) -> Path | None:
        name = digest([self._prompt(row), len(row.tokens), self.k])
        return None if self.store is None else self.store / f"{name}.safetensors"

    def _stored(self, row: Row) -> Answer | None:
        path = self._place(row)
        return Answer(**load_file(path)) if path is not None and path.is_file() else None

    def _ask(self, rows: list[Row], names: list[str]) -> list[Answer | None]:
        """Answers for a few rows by one request, stored; if refused one by one, to name the row."""
        try:
            choices = self._choices([self._prompt(row) for row in rows])
        except Refused as error:
            if len(rows) > 1:
                return [a for row, name in zip(rows, names, strict=True) for a in self._ask([row], [name])]
            raise _refusal(self.server, error, f", row {names[0]}") from error
        answers: list[Answer | None] = []
        for row, name, choice in zip(rows, names, choices, strict=True):
            try:
                answer = self._read(row, name, choice)
            except Unmapped as error:
                self.causes[name] = str(error)
                answers.append(None)
                continue
            check_answer(answer, self.vocabulary, THING, name)
            if (path := self._place(row)) is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(vars(answer), path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
            answers.append(answer)
        return answers

    def _choices(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self.server.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
        }
        if self.server.protocol == "echo":
            body |= {"echo": True, "logprobs": self.k, "return_tokens_as_token_ids": True}
        elif self.server.protocol == "prompt_logprobs":
            body |= {"prompt_logprobs": self.k}
        else:
            body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
            body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": self.k}
            body |= {"return_text_in_logprobs": True}
        path = "/generate" if self.server.protocol == "generate" else "completions"
        answer = self.client.ask("POST", path, body)
        choices = answer.get("choices") if isinstance(answer, dict) else answer
        if not isinstance(choices, list) or len(choices) != len(prompts):
            count = len(choices) if isinstance(choices, list) else "no"
            fix = "set teacher.server.batch: 1, or take another server"
            raise UserError(THING, f"{count} `choices` for {len(prompts)} prompts", fix)
        return sorted(choices, key=lambda choice: choice.get("index", 0))

    def _read(self, row: Row, name: str, choice: dict[str, Any]) -> Answer:
        """The answer for one row, from what the server says of a prompt that ends with it."""
        try:
            forms = {"echo": self._echoed, "generate": self._generated, "prompt_logprobs": self._by_id}
            read = forms[self.server.protocol]
            tokens = list(read(row, name, choice))
        except (UserError, Unmapped):
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            form = "logprobs of an echo" if self.server.protocol == "echo" else self.server.protocol
            problem = f"no {form} for its tokens ({type(error).__name__}: {error})"
            fix = "set teacher.server.protocol to what the server can do"
            raise UserError(f"{THING}, row {name}", problem, fix) from error
        ids, log_probs, own = zip(*tokens, strict=True)
        return Answer(np.array(ids, np.int64), np.array(log_probs, np.float32), np.array(own, np.float32))

    def _by_id(
        self, row: Row, name: str, choice: dict[str, Any]
    ) -> Iterator[tuple[list[int], list[float], float]]:
        """vLLM: of each token a mapping of ids; the text of an id is held against the tokenizer."""
        answered = choice["prompt_logprobs"]
        start = len(self._prompt(row)) - len(row.tokens)
        if len(answered) != start + len(row.tokens):
            raise ValueError(f"{len(answered)} tokens for a prompt of {start + len(row.tokens)}")
        for token, entries in zip(row.tokens[1:], answered[start + 1 :], strict=True):
            own = entries[str(token)]
            self._same_token(name, token, own.get("decoded_token"))
            named = ((int(i), float(entry["logprob"])) for i, entry in entries.items())
            yield (
                *likeliest(((i, value) for i, value in named if i < self.vocabulary), self.k),
                own["logprob"],
            )

    def _generated(
        self, row: Row, name: str, choice: dict[str, Any]
    ) -> Iterator[tuple[list[int], list[float], float]]:
        """SGLang: of each token itself, and of the likeliest, [log-probability, id, text]."""
        answered = choice["meta_info"]["input_token_logprobs"], choice["meta_info"]["input_top_logprobs"]
        start = len(self._prompt(row)) - len(row.tokens)
        if not len(answered[0]) == len(answered[1]) == start + len(row.tokens):
            raise ValueError(f"{len(answered[0])} tokens for a prompt of {start + len(row.tokens)}")
        each = (column[start + 1 :] for column in answered)
        for token, (own, i, text), entries in zip(row.tokens[1:], *each, strict=True):
            if i != token:
                raise ValueError(f"id {i} for {token}")
            self._same_token(name, token, text)
            named = {int(one): float(value) for value, one, _ in entries} | {token: float(own)}
            yield *likeliest(((i, v) for i, v in named.items() if i < self.vocabulary), self.k), float(own)

    def _echoed(
        self, row: Row, name: str, choice: dict[str, Any]
    ) -> Iterator[tuple[list[int], list[float], float]]:
        """An echo: of each token a mapping of texts, or of ids; a text of several ids belongs to the tail.

        Raises:
            Unmapped: the texts of the row are not those of its tokens, or another text is that of no token.
        """
        answered = columns(choice["logprobs"])
        start, end = len(self._prompt(row)) - len(row.tokens), len(self._prompt(row))
        if len(answered[0]) < end:
            raise ValueError(f"{len(answered[0])} tokens for a prompt of {end}")
        texts, *rest = (column[start + 1 : end] for column in answered)
        spelling = self._spelling(row.tokens[1:], texts)
        for token, own, entries in zip(row.tokens[1:], *rest, strict=True):
            named = {spelling.id(one): float(value) for one, value in entries.items()}
            named[token] = float(own)
            yield *likeliest(((i, v) for i, v in named.items() if i is not None), self.k), float(own)

    def _spelling(self, tokens: list[int], texts: list[str]) -> Spelling:
        """How a server spells tokens whose ids are known."""
        spelled = next((one for one in self.spellings if one.fits(tokens, texts)), None)
        if spelled is None:
            pairs = zip(tokens, texts, strict=True)
            token, text = next((i, t) for i, t in pairs if not self.spellings[0].fits([i], [t]))
            raise Unmapped(
                f"id {token} is {text!r} there, {self.texts[token]!r} in the tokenizer of the base"
            )
        return spelled

    def _same_token(self, name: str, token: int, text: str | None) -> None:
        """Refuses a server that reads another token under an id; parts of a character have no text."""
        own = self.texts[token]
        if not text or text == f"{BY_ID}{token}" or BROKEN in text + own or not own:
            return
        if text.strip() != own.strip():
            problem = f"id {token} is {text!r} there, {own!r} in the tokenizer of the base"
            raise UserError(
                f"{THING}, row {name}", problem, "take a base with the tokenizer of the server's model"
            )


def check_server(server: Server, tokenizer: PreTrainedTokenizerBase, k: int, batch: Batch) -> None:
    """Asks a server for its model, and for a few rows, before anything long begins.

    Raises:
        UserError: it does not answer, has no model of that name, or answers for other tokens.
    """
    with closing(ServerTeacher(server, Plain(Frozen()), tokenizer, k)) as teacher:
        try:
            listed = teacher.client.ask("GET", "models")
            names = [str(model["id"]) for model in listed["data"]]
        except Refused as error:
            raise _refusal(server, error) from error
        except (KeyError, TypeError) as error:
            fix = "give the address up to `/v1`"
            raise UserError(THING, "its list of models has another form", fix) from error
        if server.model not in names:
            raise UserError(f"{THING}.model", f"{server.model!r}", f"it serves {', '.join(names) or 'none'}")
        if teacher.answers(batch).count(None):
            name, cause = next(iter(teacher.causes.items()))
            fix = "take a base with the tokenizer of the server's model"
            raise UserError(f"{THING}, row {name}", cause, fix)
