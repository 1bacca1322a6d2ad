"""A release signed as OpenSSF's model signing does, verified by that tool's own command line."""

import pytest

from eval.release.load_release import ReleaseError, load_release
from eval.signoff.keys import new_key, read_trusted
from eval.watch.verify import checked
from tests.helpers import run as command


@pytest.mark.slow
def test_its_own_command_line_verifies_the_folder_and_finds_what_was_touched(released_run, tmp_path):
    ada, grace, out = released_run.folder / "key.pub", tmp_path / "grace", tmp_path / "release"
    new_key(grace, "p256")
    words = ["--study", released_run.path, "--variant", "small", "--owner", "Team A", "--out", out]
    words += ["--public", ada, "--openssf"]
    refused = command("-m", "eval.release", *words, "--key", released_run.folder / "key")
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
    assert "takes files of ECDSA keys alone; make one with `absorb sign" in refused.stderr
    done = command("-m", "eval.release", *words, "--key", grace)
    assert done.returncode == 0, done.stderr
    assert f"OpenSSF model signature: {out}.sig" in done.stdout

    def verify():
        where = ["--signature", f"{out}.sig", "--public_key", f"{grace}.pub", "--no-ignore-git-paths"]
        return command("-m", "model_signing", "verify", "key", out, *where)

    whole = verify()
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for name in ("variants/small/model.safetensors", "manifest.json", "signature.json", "README.md"):
        was = (out / name).read_bytes()
        (out / name).write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
        spoiled = verify()
        assert spoiled.returncode != 0
        assert name in spoiled.stdout + spoiled.stderr
        (out / name).write_bytes(was)
    (out / ".gitattributes").write_text("* text\n")
    assert verify().returncode != 0
    (out / ".gitattributes").unlink()
    assert verify().returncode == 0
    # our own signature of the folder is by the same key, and our loader and recheck read it
    assert load_release(out, "cpu", public_key=f"{grace}.pub")[1].fallback is False
    with pytest.raises(ReleaseError, match="was signed with the unknown key"):
        load_release(out, "cpu", public_key=ada)
    assert checked(out, read_trusted([ada, f"{grace}.pub"]), None)[1] == "cpu"
