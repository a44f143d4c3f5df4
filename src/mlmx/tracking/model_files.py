"""A saved model's folder as an MLflow model: a fill-mask pipeline, described by text so that nothing is loaded.

::

    MLmodel  requirements.txt  python_env.yaml  conda.yaml  input_example.json  serving_input_example.json
    model/                 weights and configuration
    components/tokenizer/  the tokenizer's files

``mlflow.transformers.save_model`` writes the same; it would load the model, import torch and copy the weights.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import yaml  # type: ignore[import-untyped]

# What makes a checkpoint loadable; the optimizer, scheduler and random states are for resuming, and stay local.
NOT_THE_MODEL = ("optimizer.safetensors", "trainer_state.json", "state.json", "manifest.json")
WEIGHTS = ".safetensors"
OF_THE_MODEL = (WEIGHTS, ".safetensors.index.json", "config.json", ".py")  # endings; tokenizer_config.json is not meant
MODEL, TOKENIZER = "model", "components/tokenizer"
EXAMPLE, MASK = "This is a great {mask}.", "[MASK]"
PACKAGES = ("mlflow", "torch", "transformers", "tokenizers", "safetensors")


def model_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that its model is loaded from."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in NOT_THE_MODEL]


def place_of(path: Path) -> str:
    """The folder of an MLflow model that a file of a saved model belongs to.

    >>> place_of(Path("generation_config.json")), place_of(Path("tokenizer_config.json"))
    ('model', 'components/tokenizer')
    """
    model = path.name.endswith(OF_THE_MODEL) and path.name != "tokenizer_config.json"
    return MODEL if model else TOKENIZER


def descriptions(folder: Path, files: Iterable[Path], model_id: str, run_id: str) -> dict[str, str]:
    """The texts that make an MLflow model of these files, by name."""
    example = [EXAMPLE.format(mask=_mask_token(folder))]
    return {
        "input_example.json": json.dumps(example, ensure_ascii=False),
        "serving_input_example.json": json.dumps({"inputs": example}, indent=2, ensure_ascii=False),
        **_environment(),
        "MLmodel": _yaml(_mlmodel(list(files), model_id, run_id)),
    }


def _mask_token(folder: Path) -> str:
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["mask_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return MASK
    return str(said["content"] if isinstance(said, dict) else said)


def _mlmodel(files: list[Path], model_id: str, run_id: str) -> dict[str, object]:
    """Classes are named by the library's Auto classes: those of a repository's own code are never loaded by MLflow."""
    written = max((path.stat().st_mtime for path in files), default=0.0)
    column = json.dumps([{"type": "string", "required": True}])
    return {
        "flavors": {
            "python_function": {
                "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
                "loader_module": "mlflow.transformers",
                "python_version": platform.python_version(),
            },
            "transformers": {
                "code": None,
                "components": ["tokenizer"],
                "instance_type": "FillMaskPipeline",
                "model_binary": MODEL,
                "pipeline_model_type": "AutoModelForMaskedLM",
                "source_model_name": "",
                "task": "fill-mask",
                "tokenizer_type": "AutoTokenizer",
                "transformers_version": _version("transformers"),
            },
        },
        "mlflow_version": _version("mlflow"),
        "model_id": model_id,
        "model_size_bytes": sum(path.stat().st_size for path in files),
        "model_uuid": model_id.removeprefix("m-"),
        "run_id": run_id,
        "saved_input_example_info": {
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
            "type": "json_object",
        },
        "signature": {"inputs": column, "outputs": column, "params": None},
        "utc_time_created": datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }


@cache
def _version(name: str) -> str:
    return metadata.version(name)  # reads and parses a file each time


def _yaml(value: object) -> str:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the one in Python takes five times as long
    return str(yaml.dump(value, Dumper=dumper, allow_unicode=True))


@cache
def _environment() -> dict[str, str]:
    """What the model needs, pinned to what made it; nobody is asked for it."""
    python = platform.python_version()
    pinned = [f"{name}=={_version(name).partition('+')[0]}" for name in PACKAGES]
    dependencies = [f"python={python}", "pip", {"pip": pinned}]
    conda = {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": dependencies}
    virtualenv = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    return {
        "requirements.txt": "".join(f"{line}\n" for line in pinned),
        "conda.yaml": _yaml(conda),
        "python_env.yaml": _yaml(virtualenv),
    }


# ------------------------------------------------------------------------------- Files as artifacts of an MLflow store

LINKED = (".safetensors", "tokenizer.json")  # written once, under a new name; other files may be rewritten
NOT_READ = ".safetensors"
GROWING = (".jsonl", ".log")  # while the run goes on


def local_folder(address: str) -> Path | None:
    """Where artifacts lie on this machine's disks; None for those of a server."""
    parsed = urlparse(address)
    return Path(url2pathname(parsed.path)) if parsed.scheme in ("", "file") else None


def place(path: Path, target: Path) -> None:
    """A file at its place in a local store."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        if not path.name.endswith(LINKED):
            raise OSError("copied")
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


def is_placed(path: Path, target: Path) -> bool:
    """Whether a file is there as it is; weights, which are never rewritten, are not read for that."""
    if not target.is_file() or target.stat().st_size != path.stat().st_size:
        return False
    return path.name.endswith(NOT_READ) or filecmp.cmp(path, target, shallow=False)


@contextlib.contextmanager
def at_rest(path: Path) -> Iterator[Path]:
    """A copy of a file that grows: what comes after its length was told would be taken for another request."""
    if path.suffix not in GROWING:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mlmx-") as folder:
        yield Path(shutil.copy2(path, folder))
