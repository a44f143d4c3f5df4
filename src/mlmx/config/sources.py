"""Where models and data come from: installed packages of real data, and the Hugging Face hub.

Nothing reaches for a network it was not asked to use, and an unreachable hub is known at once instead of
after the libraries' retries (23 s).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import urllib.error
import urllib.request
from functools import cache
from http.client import HTTPException
from pathlib import Path

from mlmx.config.errors import RequestError, require

HUB_TIMEOUT_SECONDS = 4
COMMIT = re.compile(r"[0-9a-f]{40}")


def find_package_file(package: str, name: str, sha256: str | None = None) -> Path:
    """A data file of an installed package, checked by its pinned hash; the package's code is never imported."""
    # Of a dotted name, find_spec would import the package above it.
    require(package.isidentifier(), f"{package!r}: is no name of an installed package")
    spec, named = importlib.util.find_spec(package), package.replace("_", "-")
    if spec is None or not spec.submodule_search_locations:
        raise RequestError(f"the package {named} is not installed; pip install 'mlmx[demo]' brings it")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    require(path.is_file(), f"the package {named} holds no {name}; reinstall it")
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        require(found == sha256, f"{path}: sha256 is {found}, expected {sha256}; reinstall the pinned package")
    return path


def require_reachable(kind: str, repo: str, revision: str | None = None) -> None:
    """Fail now if a hub ``model`` or ``dataset`` can neither be fetched nor read from the local cache, at revision."""
    if _hub_answers():
        return
    at = "" if revision is None else f" at revision {revision}"
    local = "local folder (model.path=…)" if kind == "model" else "local file (dataset=files dataset.path=…)"
    none = f"{kind}.path={repo}: the hub cannot be reached and no copy of it{at} is cached here; connect, or give a"
    require(_is_cached(kind, repo, revision), f"{none} {local}, or try experiment=demo, which needs no network")
    # The libraries are to work offline. They read the switch at import; one already imported is told as well.
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = True


@cache
def _hub_answers() -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # it answers, whatever it says
    except (OSError, HTTPException, ValueError):  # nobody there, no HTTP, no address
        return False
    return True


def _is_cached(kind: str, repo: str, revision: str | None) -> bool:
    from huggingface_hub import constants  # noqa: PLC0415 (reads the environment)

    if kind == "dataset":  # offline, that library reads what it has prepared, in a folder per commit
        prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
        at = revision if revision and COMMIT.fullmatch(revision) else "*"
        *owner, name = repo.split("/")  # Owner/MyTexts → Owner___my_texts
        name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
        name = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", name).lower()
        return any((prepared / "___".join([*owner, name])).glob(f"*/*/{at}/"))
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    named = folder / "refs" / (revision or "main")
    commit = named.read_text(encoding="utf-8").strip() if named.is_file() else revision
    snapshot = folder / "snapshots" / (commit or "main")
    return snapshot.is_dir() and any(snapshot.iterdir())
