"""Keys of sign-offs: private, whole, and of files or key services."""

import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from eval.core.errors import UserError
from eval.signoff.keys import new_key, private_key, public_key


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
