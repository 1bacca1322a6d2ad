"""A second signature of a release, as OpenSSF's model signing makes it (github.com/ossf/model-signing-spec).

It lies beside the folder, because it covers every file in it, and is read by tools that know nothing of this
project: `model_signing verify key FOLDER --signature FOLDER.sig --public_key KEY --no-ignore-git-paths`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from eval.core.errors import UserError, require_installed

if TYPE_CHECKING:
    from securesystemslib.signer import Signer


def model_signature(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sig")


def require_model_signing(key: str, signer: "Signer", folder: Path) -> None:
    """Can the folder be signed so once it is there?

    Raises:
        UserError: the tool is not installed, cannot sign with this key, or there is a signature already.
    """
    require_installed("model_signing", "--openssf", "run `pip install '.[openssf]'`")
    if signer.public_key.keytype != "ecdsa" or not Path(key).is_file():
        fix = "make one with `absorb sign --new-key FILE --kind p256`"
        raise UserError(f"key {key}", "model signing takes files of ECDSA keys alone", fix)
    if (path := model_signature(folder)).exists():
        raise UserError(
            f"signature {path}", "is there already", "delete it, or give another place with --out"
        )


def sign_model(folder: Path, key: str) -> Path:
    """Signs every file of `folder`, its manifest and our own signature too; returns the signature."""
    from model_signing import hashing, signing

    every = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    path = model_signature(folder)
    signing.Config().set_hashing_config(every).use_elliptic_key_signer(private_key=key).sign(folder, path)
    return path
