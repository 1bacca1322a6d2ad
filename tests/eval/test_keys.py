"""Keys of sign-offs: private, whole, and of files or key services."""

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner

from eval.core.errors import UserError
from eval.release.load_release import load_release
from eval.signoff.keys import new_key, private_key, public_key
from tests.eval.run_builder import copy_run
from tests.helpers import run_here


def test_a_key_is_private_whole_and_never_overwritten(tmp_path):
    path = tmp_path / "keys" / "ada"
    key = new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert private_key(path).public_key.keyid == public_key(tmp_path / "keys" / "ada.pub").keyid == key.keyid
    before = path.read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        new_key(path)
    path.with_name("bob.pub").write_text("something")
    with pytest.raises(UserError, match=r"bob\.pub: is there already"):
        new_key(path.with_name("bob"))
    assert path.read_bytes() == before
    assert not path.with_name("bob").exists()
    path.chmod(0o640)
    with pytest.raises(UserError, match="mode 0640, others may read it"):
        private_key(path)


def test_a_file_that_is_no_key_is_refused(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(UserError, match="no such file"):
        private_key(path)
    new_key(path)
    with pytest.raises(UserError, match="no public key"):
        public_key(path)
    shutil.copy(path.with_name("key.pub"), path)
    path.chmod(0o600)
    with pytest.raises(UserError, match="no private key"):
        private_key(path)


def test_a_key_service_is_asked_by_its_name(tmp_path):
    """securesystemslib's signers: without its library, or without the public key, that is one line."""
    new_key(tmp_path / "key")
    with pytest.raises(UserError, match="its public key is not given"):
        private_key("awskms:alias/ada")
    with pytest.raises(UserError, match=r"key awskms:alias/ada: .*install what it asks for"):
        private_key("awskms:alias/ada", tmp_path / "key.pub")


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)]
)
def test_a_key_of_a_service_that_the_loader_could_not_verify_is_refused_before_it_signs(tmp_path, key):
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public)
    with pytest.raises(
        UserError, match="neither an Ed25519 key nor an ECDSA key on P-256; make such a key in"
    ):
        private_key("awskms:alias/ada", tmp_path / "key.pub")


class ServiceSigner(CryptoSigner):
    """A key service of the machine's own: it signs with a key that lies at the path in the URI."""

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri, public_key, secrets_handler=None):
        path = Path(priv_key_uri.partition(":")[2])
        return cls(load_pem_private_key(path.read_bytes(), None), public_key)


@pytest.mark.slow
def test_the_key_of_a_service_signs_verifies_releases_and_is_what_the_loader_trusts(
    released_run, tmp_path, monkeypatch
):
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "ourkms", ServiceSigner)
    run = copy_run(released_run.folder, tmp_path / "copy")
    shutil.rmtree(run.path / "signoff")
    key, public, out = tmp_path / "hidden", tmp_path / "hidden.pub", tmp_path / "out"
    new_key(key, "p256")
    new_key(tmp_path / "other")
    study, service = ["--study", run.path], ["--key", f"ourkms:{key}", "--public", public]

    def done(module, *words, code=0):
        ended = run_here(f"{module}.__main__", *study, *words)
        assert ended.returncode == code, ended.stderr
        return ended.stdout

    done("eval.signoff", "--variant", "small", "--by", "Ada", *service)
    assert "signed by Ada" in done("eval.signoff", "--verify", "--public", public)
    done("eval.signoff", "--verify", "--public", tmp_path / "other.pub", code=1)
    done("eval.release", "--variant", "small", "--owner", "Team A", "--out", out, *service)
    info = load_release(out, "cpu", public_key=public)[1]
    assert (info.fallback, info.reason) == (False, None)
    with pytest.raises(RuntimeError, match="was signed with the unknown key"):
        load_release(out, "cpu", public_key=tmp_path / "other.pub")
