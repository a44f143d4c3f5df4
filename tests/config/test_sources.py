"""Packages of real data are read, never run; a hub is known to be there or not before anything is asked of it."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from mlmx.config import sources
from mlmx.config.errors import RequestError
from mlmx.config.sources import find_package_file, require_reachable

# ------------------------------------------------------------------------------- packages of data


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package of data that must not be imported."""
    folder = tmp_path / "site" / "mlmx_test_data"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the code of a data package was run')")
    (folder / "words.csv").write_text("source,text\nimdb,good\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_a_file_of_a_package_is_found_without_running_its_code(package: Path):
    sha256 = hashlib.sha256((package / "words.csv").read_bytes()).hexdigest()
    assert find_package_file("mlmx_test_data", "words.csv") == package / "words.csv"
    assert find_package_file("mlmx_test_data", "words.csv", sha256) == package / "words.csv"
    assert "mlmx_test_data" not in sys.modules


def test_a_file_that_is_not_the_pinned_one_is_refused(package: Path):
    (package / "words.csv").write_text("source,text\nimdb,changed\n")
    with pytest.raises(RequestError, match=r"words\.csv: sha256 is [0-9a-f]{64}, expected 0123; reinstall"):
        find_package_file("mlmx_test_data", "words.csv", "0123")


@pytest.mark.parametrize(
    ("package_name", "name", "words"),
    [
        ("no_such_package", "x.csv", "no-such-package is not installed; pip install 'mlmx[demo]'"),
        ("mlmx_test_data", "x.csv", "mlmx-test-data holds no x.csv; reinstall it"),
    ],
)
def test_a_package_that_is_missing_or_incomplete_is_named(package_name: str, name: str, words: str, package: Path):
    with pytest.raises(RequestError) as refused:
        find_package_file(package_name, name)
    assert words in str(refused.value)


# --------------------------------------------------------------------------------------------- hub


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """Whether the hub answers is asked once per process; here, once per test."""
    sources._hub_answers.cache_clear()
    yield
    sources._hub_answers.cache_clear()


@contextlib.contextmanager
def served(answer: bytes | None) -> Iterator[str]:
    """The address of a server that answers once; None: it takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(answer or b"")

        serving = threading.Thread(target=serve)
        if answer is not None:
            serving.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        if answer is not None:
            serving.join()


ANSWERS = [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", True),
    (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", True),
    (b"SSH-2.0-OpenSSH_9.6\r\n", False),
    (b"", False),
    (None, False),
]


@pytest.mark.parametrize(("answer", "there"), ANSWERS, ids=["200", "404", "503", "no-http", "hangs-up", "silent"])
def test_a_hub_is_there_if_it_answers_whatever_it_says(
    answer: bytes | None, there: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "HUB_TIMEOUT_SECONDS", 0.2 if answer is None else 4)
    with served(answer) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert sources._hub_answers() is there


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "nonsense", "http://", "ftp://127.0.0.1:9"])
def test_an_address_without_a_hub_is_no_hub(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", address)
    for kind in ("model", "dataset"):
        with pytest.raises(RequestError, match=rf"{kind}\.path=owner/name: the hub cannot be reached"):
            require_reachable(kind, "owner/name")


@pytest.mark.parametrize("value", ["1", "true", "ON", "Yes"])
def test_offline_is_taken_at_its_word(value: str, monkeypatch: pytest.MonkeyPatch):
    """With HF_HUB_OFFLINE set, no address is even tried."""
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("the network was used"))
    with pytest.raises(RequestError, match="cannot be reached"):
        require_reachable("model", "owner/name")


def test_the_hub_is_asked_once_for_a_model_and_a_dataset(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def refuses(request: Any, timeout: float) -> None:
        asked.append(request.get_method())
        raise ConnectionRefusedError

    monkeypatch.setattr("urllib.request.urlopen", refuses)
    for kind in ("model", "dataset"):
        with pytest.raises(RequestError):
            require_reachable(kind, "owner/name")
    assert asked == ["HEAD"]


def test_an_unreachable_hub_with_a_copy_of_the_model_is_read_from_the_copy(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (constants, datasets.config):  # switched to offline by this, and back after the test
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    from mlmx.models.encoders import load_tokenizer, pretrained, require_there

    cached = Path(constants.HF_HUB_CACHE) / "models--owner--name"
    shutil.copytree(tiny, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    encoder = pretrained(path="owner/name")
    try:
        require_there(encoder)
        assert load_tokenizer(encoder, chunk_size=64).mask_token == "[MASK]"
    finally:
        shutil.rmtree(cached)
    with pytest.raises(RequestError, match=r"model\.path=owner/name: the hub cannot be reached"):
        require_there(encoder)
