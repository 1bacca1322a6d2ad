"""Keys, who holds them, and the envelope that is signed with them.

The envelope is DSSE 1.0 (github.com/secure-systems-lab/dsse) by securesystemslib, the library behind TUF and
in-toto. A line holds an envelope in one spelling only, so that a flipped bit of padding is noticed. A private
key is a file, Ed25519 or ECDSA on P-256, or lies in a key management service that securesystemslib knows.
"""

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eval.core.errors import UserError, one_line

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import Signer, SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
OTHERS = 0o077  # permission bits of group and others
AGAIN = "sign again"
Kind = Literal["ed25519", "p256"]  # of a new key; the second is for tools that read no other


def public_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.pub")


def new_key(path: Path, kind: Kind = "ed25519") -> "SSlibKey":
    """Makes a private key at `path` (PKCS8 PEM, mode 0600) and returns the public one, which lies beside it.

    Raises:
        UserError: one of the two files is there already.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from securesystemslib.signer import CryptoSigner

    for place in (path, public_path(path)):
        if place.exists():
            raise UserError(
                f"key {place}", "is there already", "name another file: a key is never overwritten"
            )
    key = Ed25519PrivateKey.generate() if kind == "ed25519" else generate_private_key(SECP256R1())
    signer = CryptoSigner(key)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    path.parent.mkdir(parents=True, exist_ok=True)
    _create(path, signer.private_bytes, 0o600)
    _create(public_path(path), public, 0o644)
    return signer.public_key


def _create(path: Path, content: bytes, mode: int) -> None:
    """Writes a file that was not there, with its mode from the first moment."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(content)


def private_key(where: str | Path, public: Path | None = None) -> "Signer":
    """The signer of a private key file, or of the URI of a key management service, as `awskms:...`.

    Args:
        public: the public key of a service's key; a file has its own.

    Raises:
        UserError: the file is missing, others may read it, it holds no plain key of such a kind, or the
            service cannot be asked.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.exceptions import UnsupportedLibraryError
    from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Signer

    path, fix = Path(where), "give the private key that `absorb sign --new-key FILE` made"
    if str(where).partition(":")[0] in SIGNER_FOR_URI_SCHEME and not path.is_file():
        if public is None:
            raise UserError(f"key {where}", "its public key is not given", "add --public FILE")
        of_service = public_key(public)
        if not is_ours(_parsed(of_service.keyval["public"])):
            why, other = "neither an Ed25519 key nor an ECDSA key on P-256", "make such a key in the service"
            raise UserError(f"key {public}", why, f"{other}: load_release verifies no other")
        try:
            return Signer.from_priv_key_uri(str(where), of_service)
        except (UnsupportedLibraryError, ValueError, OSError) as error:
            raise UserError(
                f"key {where}", str(error), "install what it asks for, or give a key file"
            ) from error
    if not path.is_file():
        raise UserError(f"key {path}", "no such file", fix)
    with path.open("rb") as stream:
        mode, content = os.fstat(stream.fileno()).st_mode, stream.read()
    if mode & OTHERS:
        raise UserError(f"key {path}", f"mode {mode & 0o777:04o}, others may read it", f"chmod 600 {path}")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"key {path}", "no private key in PEM without a password", fix) from error
    if not is_ours(key.public_key()):
        raise UserError(f"key {path}", "neither an Ed25519 key nor an ECDSA key on P-256", fix)
    return CryptoSigner(key)


def is_ours(key: Any) -> bool:
    """Is it a public key of the kinds that sign here: Ed25519, or ECDSA on P-256?"""
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    on_p256 = isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)
    return on_p256 or isinstance(key, Ed25519PublicKey)


def public_key(path: Path) -> "SSlibKey":
    """A public key file in PEM.

    Raises:
        UserError: the file is missing or holds no public key of a kind that signs.
    """
    fix = "give the .pub file of the signer"
    if not path.is_file():
        raise UserError(f"key {path}", "no such file", fix)
    try:
        return from_text(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"key {path}", "no public key in PEM", fix) from error


def from_text(text: str) -> "SSlibKey":
    """The public key in PEM, or of 32 bytes in hexadecimal (Ed25519). ValueError where it is none."""
    from securesystemslib.signer import SSlibKey

    return SSlibKey.from_crypto(_parsed(text))


def _parsed(text: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if not text.startswith("-----"):
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    try:
        return load_pem_public_key(text.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Holder:
    """A key that is trusted, and whose it is."""

    name: str
    key: "SSlibKey"


Trusted = dict[str, Holder]  # id of the key -> its holder


def read_trusted(paths: Iterable[str | Path]) -> Trusted:
    """The keys of public key files, called after the file, and those of files of allowed signers.

    A file of allowed signers is that of ssh-keygen(1): a line `NAME ssh-ed25519 BASE64` for each; a name with
    blanks stands in quotes. Keys of another kind have another word there.

    Raises:
        UserError: a file is missing, or a line holds no key.
    """
    trusted: Trusted = {}
    for path in map(Path, paths):
        if path.is_file() and not path.read_bytes().startswith(b"-----"):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            for number, line in enumerate(lines, start=1):
                if line.strip() and not line.startswith("#"):
                    holder = _allowed_signer(line, f"{path}: line {number}")
                    trusted[holder.key.keyid] = holder
        else:
            key = public_key(path)
            trusted[key.keyid] = Holder(path.stem, key)
    if not trusted:
        raise UserError(
            "--public", "no key", "give the .pub file of the signer, or a file of allowed signers"
        )
    return trusted


def _allowed_signer(line: str, thing: str) -> Holder:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from securesystemslib.signer import SSlibKey

    try:
        name, kind, key, *_ = shlex.split(line)
        return Holder(one_line(name), SSlibKey.from_crypto(load_ssh_public_key(f"{kind} {key}".encode())))
    except (ValueError, UnsupportedAlgorithm) as error:
        fix = "write NAME ssh-ed25519 BASE64, or give a public key in PEM"
        raise UserError(thing, "no allowed signer", fix) from error


def pem(key: "SSlibKey") -> bytes:
    """The key as a public key file has it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return _parsed(key.keyval["public"]).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def pems(trusted: Trusted) -> list[bytes]:
    """The same of every trusted key, as the loader takes them."""
    return [pem(holder.key) for holder in trusted.values()]


def allowed_signer(name: str, key: "SSlibKey") -> str:
    """The line of a file of allowed signers for a key."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    raw = _parsed(key.keyval["public"])
    return f"{shlex.quote(name)} {raw.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()}"


def wrapped(payload: bytes, signer: "Signer") -> str:
    """The line of an envelope with `payload`, signed."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return _spelled(envelope)


def _spelled(envelope: "Envelope") -> str:
    return json.dumps(envelope.to_dict())


def envelope(text: str, where: str) -> "Envelope":
    """The envelope in a line, its signature not yet checked.

    Raises:
        UserError: it is no envelope of an in-toto statement, or not spelled as `wrapped` does.
    """
    from securesystemslib.dsse import Envelope

    try:
        parsed = Envelope.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(where, f"no DSSE envelope ({error})", AGAIN) from error
    if parsed.payload_type != PAYLOAD_TYPE:
        raise UserError(where, f"payload of type {parsed.payload_type!r}", AGAIN)
    if _spelled(parsed) != text:
        raise UserError(where, "its bytes are not those that were written", AGAIN)
    return parsed


def signed_by(envelope: "Envelope", key: "SSlibKey") -> bool:
    """Does the signature of `key` over these bytes hold?"""
    from securesystemslib.exceptions import VerificationError

    try:
        envelope.verify([key], threshold=1)
    except VerificationError:
        return False
    return True


def signer_name(envelope: "Envelope", key: "SSlibKey", trusted: Trusted | None, where: str, fix: str) -> str:
    """Whose `key` has signed these bytes; empty without `trusted` keys, which only says that they are whole.

    Raises:
        UserError: the signature does not hold, or the key is not trusted.
    """
    if not signed_by(envelope, key):
        raise UserError(where, "the signature does not fit the bytes: they were changed", fix)
    if trusted is None:
        return ""
    if key.keyid not in trusted:
        names = ", ".join(f"{holder.name} {keyid[:12]}" for keyid, holder in trusted.items())
        problem = f"signed with the unknown key {key.keyid[:12]}; trusted: {names}"
        raise UserError(where, problem, "ask the signer for the public key, or another signer")
    return trusted[key.keyid].name
