"""Ed25519 keys and the envelope that is signed with them.

The envelope is DSSE 1.0 (github.com/secure-systems-lab/dsse) by securesystemslib, the library behind TUF and
in-toto. A file holds an envelope in one spelling only, so that a flipped bit of padding is noticed.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from eval.core.errors import UserError

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
OTHERS = 0o077  # permission bits of group and others
AGAIN = "sign again"


def public_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.pub")


def new_key(path: Path) -> "SSlibKey":
    """Makes a private key at `path` (PKCS8 PEM, mode 0600) and returns the public one, which lies beside it.

    Raises:
        UserError: one of the two files is there already.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from securesystemslib.signer import CryptoSigner

    for place in (path, public_path(path)):
        if place.exists():
            raise UserError(
                f"key {place}", "is there already", "name another file: a key is never overwritten"
            )
    key = Ed25519PrivateKey.generate()
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


def private_key(path: Path) -> "CryptoSigner":
    """The signer of a private key file.

    Raises:
        UserError: the file is missing, others may read it, or it holds no plain Ed25519 key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    fix = "give the private key that `python -m eval.signoff --new-key FILE` made"
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
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"key {path}", "not an Ed25519 key", fix)
    return CryptoSigner(key)


def public_key(path: Path) -> "SSlibKey":
    """A public key file in PEM.

    Raises:
        UserError: the file is missing or holds no Ed25519 public key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    fix = "give the .pub file of the signer"
    if not path.is_file():
        raise UserError(f"key {path}", "no such file", fix)
    try:
        key = load_pem_public_key(path.read_bytes())
    except ValueError as error:
        raise UserError(f"key {path}", "no public key in PEM", fix) from error
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"key {path}", "not an Ed25519 key", fix)
    return SSlibKey.from_crypto(key)


def from_raw(raw: str) -> "SSlibKey":
    """The public key of 32 bytes in hexadecimal."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from securesystemslib.signer import SSlibKey

    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(raw)))


def wrapped(payload: bytes, signer: "CryptoSigner") -> str:
    """The text of an envelope with `payload`, signed."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return _spelled(envelope)


def _spelled(envelope: "Envelope") -> str:
    return json.dumps(envelope.to_dict(), indent=1) + "\n"


def envelope(text: str, where: Path) -> "Envelope":
    """The envelope in a file, its signature not yet checked.

    Raises:
        UserError: it is no envelope of an in-toto statement, or not spelled as `wrapped` does.
    """
    from securesystemslib.dsse import Envelope

    try:
        parsed = Envelope.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"sign-off {where}", f"no DSSE envelope ({error})", AGAIN) from error
    if parsed.payload_type != PAYLOAD_TYPE:
        raise UserError(f"sign-off {where}", f"payload of type {parsed.payload_type!r}", AGAIN)
    if _spelled(parsed) != text:
        raise UserError(f"sign-off {where}", "its bytes are not those that were written", AGAIN)
    return parsed


def signed_by(envelope: "Envelope", key: "SSlibKey") -> bool:
    """Does the signature of `key` over these bytes hold?"""
    from securesystemslib.exceptions import VerificationError

    try:
        envelope.verify([key], threshold=1)
    except VerificationError:
        return False
    return True
