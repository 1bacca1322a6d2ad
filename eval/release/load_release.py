"""Loads a release: checks it, picks its engine, tries it out, and serves the fallback where anything is off.

    from load_release import load_release
    model, info = load_release("path/to/release", target="cpu", public_key="ada.pub")
    model.generate("Once upon", new_tokens=32)      # token ids; model.tokenizer.decode(...) gives the text

This file needs `transformers`, the engine of the artifact (torch or openvino), and `cryptography` to check a
signature; nothing of the project that made the release. Weights are safetensors or OpenVINO's; no code runs.

**The copy of this file inside a release finds accidents only**: whoever can change the folder can change the
loader in it. Against a hand that means it, take the loader from elsewhere, with the key of whoever signed:
`from eval.release.load_release import load_release`, where the project `absorb` is installed.
"""

import base64
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger("load_release")

MANIFEST, INDEX, SIGNATURE = "manifest.json", "release.json", "signature.json"
ROLLOUT, ROLLOUT_LOG = "rollout.json", "log.jsonl"
Public = str | Path | bytes | list[Any]  # file or text of a key in PEM, Ed25519 or P-256; or several

if Path(__file__).with_name(MANIFEST).is_file():  # in a release, Python kept this file compiled
    with suppress(OSError):
        Path(cache_from_source(__file__)).unlink()
        Path(cache_from_source(__file__)).parent.rmdir()


class ReleaseError(RuntimeError):
    """Something about a release is not as its contract says."""


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Makes a ReleaseError of whatever a file that is missing, damaged or forged raises."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ReleaseError(f"{what} cannot be read ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Info:
    """What was loaded, and why."""

    release: str
    target: str
    folder: str  # below the release
    engine: str
    verdict: str  # of what was released for the target
    budget_note: str | None  # why that is not by the budget that was fixed beforehand; None where it is
    waiver: str | None
    expires: str | None
    context: int  # tokens up to which its contract promises anything
    fallback: bool
    reason: str | None  # why the fallback is served


class Model(ABC):
    """A causal language model with one way in: token ids that start with the boundary token."""

    def __init__(self, raw: Any, folder: Path, boundary: int) -> None:
        from transformers import AutoTokenizer

        self.raw, self.boundary = raw, boundary
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self.ends = end_ids(folder, self.tokenizer)

    @abstractmethod
    def logits(self, ids: list[int]) -> np.ndarray:
        """[T, V] float32 for the token ids [T]: row p scores the token at p + 1."""

    def encode(self, text: str) -> list[int]:
        """The boundary token and the tokens of a text, as in training: special tokens in it are text."""
        read = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [self.boundary, *read["input_ids"]]

    def generate(self, prompt: str | list[int], new_tokens: int = 32) -> list[int]:
        """The likeliest tokens after a prompt, one by one; ends before a token that ends a text."""
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        new_ids, row = list[int](), self._read(ids, first=True)
        while len(new_ids) < new_tokens and (token := int(row.argmax())) not in self.ends:
            new_ids.append(token)
            if len(new_ids) < new_tokens:
                row = self._read([token], first=False)
        return new_ids

    @abstractmethod
    def _read(self, ids: list[int], first: bool) -> np.ndarray:
        """[V] logits after `ids`, which follow what was read since the last `first`."""


class TorchModel(Model):
    def __init__(self, folder: Path, device: str, boundary: int) -> None:
        from transformers import AutoModelForCausalLM

        quantized = "quantization_config" in read_json(folder / "config.json")
        settings: dict[str, Any] = {"device_map": {"": device}} if quantized else {}
        settings |= {"dtype": "auto", "use_safetensors": True, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **settings)
        super().__init__((model if quantized else model.to(device)).eval(), folder, boundary)
        self.past: Any = None

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._forward(ids, None).logits[0].float().cpu().numpy()

    def _read(self, ids: list[int], first: bool) -> np.ndarray:
        output = self._forward(ids, None if first else self.past)
        self.past = output.past_key_values
        return output.logits[0, -1].float().cpu().numpy()

    def _forward(self, ids: list[int], past: Any) -> Any:
        import torch

        with torch.inference_mode():
            tokens = torch.tensor([ids], device=self.raw.device)
            return self.raw(input_ids=tokens, past_key_values=past, use_cache=True)


class OpenVinoModel(Model):
    def __init__(self, folder: Path, device: str, boundary: int) -> None:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}  # as it was measured
        compiled = openvino.Core().compile_model(folder / "openvino_model.xml", device.upper(), settings)
        super().__init__(compiled.create_infer_request(), folder, boundary)
        self.inputs = {name for port in compiled.inputs for name in port.get_names()}
        self.length = 0

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._forward(ids, first=True)

    def _read(self, ids: list[int], first: bool) -> np.ndarray:
        return self._forward(ids, first)[-1]

    def _forward(self, ids: list[int], first: bool) -> np.ndarray:
        if first:
            self.raw.reset_state()
            self.length = 0
        start, self.length = self.length, self.length + len(ids)
        feeds = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, self.length), dtype=np.int64),
            "position_ids": np.arange(start, self.length, dtype=np.int64)[None, :],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self.raw.infer({name: feeds[name] for name in self.inputs})
        return self.raw.get_tensor("logits").data[0].copy()


ENGINES = {"torch": TorchModel, "openvino": OpenVinoModel}


def end_ids(folder: Path, tokenizer: Any) -> set[int]:
    """Ids that end a text: that of the tokenizer, and those that the configs of the model list."""
    files = [folder / "generation_config.json", folder / "config.json"]
    listed = [read_json(file).get("eos_token_id") for file in files if file.is_file()]
    value: Any = next((ends for ends in listed if ends is not None), [])
    return {tokenizer.eos_token_id, *(value if isinstance(value, list) else [value])} - {None}


def read_json(path: Path) -> dict[str, Any]:
    with reading(path):
        return {**json.loads(path.read_bytes())}  # ** takes an object and nothing else


def sha256(path: Path) -> str:
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_files(root: Path, files: dict[str, Any], wanted: set[str]) -> None:
    """Raises ReleaseError at the first of the `wanted` files that is missing or was changed."""
    for name in sorted(wanted):
        if (link := (root / name).is_symlink()) or not (root / name).is_file():
            raise ReleaseError(f"{name} is {'a link' if link else 'missing'}")
        if sha256(root / name) != files[name]["sha256"]:
            raise ReleaseError(f"{name} was changed")


def list_files(root: Path, below: str = "") -> set[str]:
    """Names of all files. Raises ReleaseError at a link, `below` itself too: what it names is no part."""
    above = [root / below, *(root / below).parents][: len(Path(below).parts)]  # down from the root
    every = {path.relative_to(root).as_posix(): path for path in [*above, *(root / below).rglob("*")]}
    if links := sorted(name for name, path in every.items() if path.is_symlink()):
        raise ReleaseError(f"{links[0]} is a link")
    return {name for name, path in every.items() if path.is_file()}


def check_new(root: Path, files: dict[str, Any], below: str = "") -> None:
    """Raises ReleaseError at a file that was not released, such as code or weights in another format."""
    if new := sorted(list_files(root, below) - set(files) - {MANIFEST, SIGNATURE}):
        raise ReleaseError(f"{new[0]} is not part of the release")


def read_key(public_key: str | Path | bytes) -> tuple[Any, list[Any], str]:
    """A key, what it checks a signature by, and its id in securesystemslib: the hash of canonical JSON."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    with reading("the public key"):
        text = public_key if isinstance(public_key, bytes) else Path(public_key).read_bytes()
        key: Any = load_pem_public_key(text)
    if isinstance(key, ed25519.Ed25519PublicKey):
        kind, scheme, public, by = "ed25519", "ed25519", key.public_bytes_raw().hex(), list[Any]()
    elif getattr(getattr(key, "curve", None), "name", "") == "secp256r1":
        public = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        kind, scheme, by = "ecdsa", "ecdsa-sha2-nistp256", [ec.ECDSA(SHA256())]
    else:
        raise ReleaseError(f"{public_key!s} holds neither an Ed25519 key nor an ECDSA key on P-256")
    named = {"keytype": kind, "scheme": scheme, "keyval": {"public": public}}
    canonical = json.dumps(named, sort_keys=True, separators=(",", ":")).replace("\\n", "\n")
    return key, by, hashlib.sha256(canonical.encode()).hexdigest()


def verified(text: bytes, keys: Public, what: str) -> dict[str, Any]:
    """The in-toto statement in a DSSE 1.0 envelope (github.com/secure-systems-lab/dsse) of a given key."""
    from cryptography.exceptions import InvalidSignature

    known = {name: one for *one, name in map(read_key, keys if isinstance(keys, list) else [keys])}
    try:
        envelope = json.loads(text)
        kind, payload = envelope["payloadType"], base64.b64decode(envelope["payload"], validate=True)
        key_id, signature = (envelope["signatures"][0][name] for name in ("keyid", "sig"))
        if key_id not in known:
            raise ReleaseError(f"{what} was signed with the unknown key {key_id[:12]}, none of those given")
        (key, by), signature = known[key_id], base64.b64decode(signature, validate=True)
        key.verify(signature, f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload, *by)
        statement = json.loads(payload)
    except InvalidSignature as error:
        raise ReleaseError(f"{what} was changed: its signature does not fit") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ReleaseError(f"{what} is no signature ({error})") from error
    expected = {"keyid": key_id, "sig": base64.b64encode(signature).decode()}
    whole = {"payload": base64.b64encode(payload).decode(), "payloadType": kind, "signatures": [expected]}
    if text != f"{json.dumps(whole)}\n".encode():  # one spelling, one key
        raise ReleaseError(f"{what} was changed")
    return statement


def check_signature(root: Path, files: dict[str, Any], keys: Public) -> None:
    """Raises ReleaseError unless one of the keys has signed the list of files and their hashes."""
    with reading(SIGNATURE):
        statement = verified((root / SIGNATURE).read_bytes(), keys, SIGNATURE)
        signed = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    listed = {name: entry["sha256"] for name, entry in files.items()} | {MANIFEST: sha256(root / MANIFEST)}
    for name in sorted({*signed, *listed}, key=lambda name: (name == MANIFEST, name)):
        if signed.get(name) != listed.get(name):
            raise ReleaseError(f"{name} is not the one that was signed")


@reading("the rollout")
def check_arm(arm: str, rollout: Path | None, root: Path, target: str, keys: Public | None) -> None:
    """Raises ReleaseError where the fallback is asked for, by the caller or a rollout, or it is in doubt."""
    if arm != "release":
        raise ReleaseError("it was asked for")
    if rollout is None:
        return
    state = read_json(rollout / ROLLOUT)
    if state.get("release") != sha256(root / MANIFEST) or state.get("target") != target:
        raise ReleaseError(f"{rollout / ROLLOUT} is of another release or target")
    if keys is not None:
        *_, last = [b"", *(rollout / ROLLOUT_LOG).read_bytes().splitlines(keepends=True)]
        said = verified(last, keys, ROLLOUT_LOG).get("predicate", {}).get("state")
        if said != {name: value for name, value in state.items() if name != "log"}:
            raise ReleaseError(f"{rollout / ROLLOUT} is not what the last line of {ROLLOUT_LOG} says")
    if state.get("status") not in ("running", "complete"):
        what = f"{state.get('status')} on {state.get('time')}: {state.get('reason')}"
        raise ReleaseError(f"the rollout was {what}")


def check_golden_answers(model: Model, answers: list[dict[str, Any]]) -> None:
    """Raises ReleaseError at the first prompt that is not continued as it was when this was released."""
    for one in answers:
        if (ids := model.encode(one["text"])) != one["ids"]:
            raise ReleaseError(f"the tokenizer reads {one['text'][:20]!r} as {ids[:8]}...")
        if (tokens := model.generate(ids, new_tokens=len(one["expected"]))) != one["expected"]:
            raise ReleaseError(f"{one['text'][:20]!r} is continued with {tokens}, not {one['expected']}")


def loaded(root: Path, index: dict[str, Any], files: dict[str, Any], part: dict[str, Any]) -> Model:
    """One artifact of the release, checked and tried out."""
    folder = part["folder"]
    check_new(root, files, folder)
    check_files(root, files, {name for name in files if name.startswith(f"{folder}/")})
    try:
        model = ENGINES[part["engine"]](root / folder, part["device"], part["boundary"])
        check_golden_answers(model, part["golden_answers"])
    except ReleaseError:
        raise
    except Exception as error:  # libraries raise their own, and some a bare one
        what = f"{part['engine']} cannot run {folder} ({type(error).__name__}: {error})"
        raise ReleaseError(what) from error
    return model


@reading(INDEX)
def check_waiver(index: dict[str, Any], part: dict[str, Any], day: date) -> None:
    """Raises ReleaseError where the waiver of a target has run out, or the clock is before the release."""
    if day < date.fromisoformat(index["released"]):
        raise ReleaseError(f"the clock says {day}, the release is of {index['released']}")
    if part["expires"] and day > date.fromisoformat(part["expires"]):
        raise ReleaseError(f"its waiver expired on {part['expires']}")


def overdue(index: dict[str, Any], root: Path, history: Path | None, day: date) -> str | None:
    """The day of the last recheck, or of the release, where it is longer ago than the contract promises."""
    days, release, last = index.get("recheck_days"), sha256(root / MANIFEST), index["released"]
    try:
        with reading(f"history {history}"):
            lines = history.read_bytes().splitlines() if history else []
            looks = (look for look in map(json.loads, lines) if look["release"] == release)
            seen = max([last, *(str(date.fromisoformat(look["time"][:10])) for look in looks)])
            if date.fromisoformat(seen) > day:  # it would silence the reminder for long
                raise ValueError(f"a look of {seen}, which is yet to come")
        last = seen
    except ReleaseError as error:
        log.warning("%s", error)
    return last if days and (day - date.fromisoformat(last)).days > days else None


@reading("the release")
def load_release(
    path: str | Path,
    target: str,
    sha256_of_manifest: str | None = None,
    public_key: Public | None = None,
    today: date | None = None,
    rollout: Path | None = None,
    rollout_key: Public | None = None,
    arm: str = "release",
    history: Path | None = None,
) -> tuple[Model, Info]:
    """The model that was released for `target`, or the fallback with a logged reason.

    Args:
        sha256_of_manifest: as `eval.release` printed it. The hashes find accidents; this also finds a hand
            that rewrote the hashes, if this loader is not that of the folder.
        public_key: file of the key that signed the folder, in PEM, or what it holds; or a list: any of these.
        today: a day to come, to see what will be served then.
        rollout: folder of `eval.watch.rollout`; where that says so, or is damaged, the fallback is served.
        rollout_key: public keys of all who sign its steps, a list or one. arm: "fallback" to load that one.
        history: file of `eval.watch.recheck --append`; a recheck that is overdue is logged.

    Raises:
        ReleaseError: files, signature or index are off, there is no such target, or the fallback is off.
    """
    root, day = Path(path), max(today or date.min, datetime.now(UTC).date())
    files = read_json(root / MANIFEST).get("files")
    if sha256_of_manifest not in (None, sha256(root / MANIFEST)):
        raise ReleaseError(f"{root / MANIFEST} is not the one that was released")
    if not isinstance(files, dict) or INDEX not in files:
        raise ReleaseError(f"{root / MANIFEST} lists no {INDEX}")
    if public_key is not None:
        check_signature(root, files, public_key)
    check_files(root, files, {INDEX})
    index = read_json(root / INDEX)
    if target not in index["targets"]:
        raise ReleaseError(f"no target {target!r}; this release has {', '.join(index['targets'])}")
    part, reason = {"budget_note": None, **index["targets"][target]}, None  # releases of before have none
    try:
        check_arm(arm, rollout, root, target, rollout_key)
        check_new(root, files)
        check_files(root, files, {name for name in files if not name.startswith(("variants/", "fallback/"))})
        check_waiver(index, part, day)
        model = loaded(root, index, files, part)
    except ReleaseError as error:
        reason = str(error)
        log.warning("release %s, target %s: the fallback is served: %s", index["name"], target, reason)
        part = {**part, **index["fallback"]}
        try:
            model = loaded(root, index, files, part)
        except ReleaseError:
            if part["device"] == "cpu":
                raise
            part = {**part, "device": "cpu"}  # it may be the device that is missing
            model = loaded(root, index, files, part)
    facts = {name: part[name] for name in ("folder", "engine", "verdict", "budget_note", "waiver", "expires")}
    facts |= {"release": (name := index["name"]), "target": target, "context": index["context"]}
    if part["waiver"] and reason is None:
        log.warning("release %s ships on a waiver until %s: %s", name, part["expires"], part["waiver"])
    if since := overdue(index, root, history, day):
        log.warning("release %s was not rechecked since %s, longer than it promises", name, since)
    return model, Info(**facts, fallback=reason is not None, reason=reason)
