"""A saved model's folder as an MLflow model: a fill-mask pipeline, described by text so that nothing is loaded.

::

    MLmodel  requirements.txt  python_env.yaml  conda.yaml  input_example.json  serving_input_example.json
    model/                 weights and configuration
    components/tokenizer/  the tokenizer's files

``mlflow.transformers.save_model`` writes the same; it would load the model, import torch and copy the weights.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import yaml  # type: ignore[import-untyped]

# What makes a checkpoint loadable; the optimizer, scheduler and random states are for resuming, and stay local.
NOT_THE_MODEL = ("optimizer.safetensors", "trainer_state.json", "state.json", "manifest.json")
WEIGHTS = ".safetensors"
OF_THE_MODEL = (WEIGHTS, ".safetensors.index.json", "config.json", ".py")  # endings; tokenizer_config.json is not meant
MODEL, TOKENIZER = "model", "components/tokenizer"
EXAMPLE, MASK = "This is a great {mask}.", "[MASK]"
FINAL = "model"
STEP, CHECKPOINT = "mlmx.step", "mlmx.checkpoint"  # tags of a model
PACKAGES = ("mlflow", "torch", "transformers", "tokenizers", "safetensors")
Score = tuple[float, int]  # value, milliseconds since 1970


@dataclass(frozen=True)
class Saved:
    """A saved model of a run: a checkpoint, or the final one."""

    folder: Path
    step: int
    epoch: float
    final: bool = False

    @property
    def name(self) -> str:
        """What MLflow calls it; dots and slashes are not allowed there.

        >>> Saved(Path("checkpoint-7"), 7, 1.0).name, Saved(Path("checkpoint-9"), 9, 1.3).name
        ('epoch-1', 'step-9')
        """
        if self.final:
            return FINAL
        whole = math.isclose(self.epoch, round(self.epoch), abs_tol=1e-6)
        return f"epoch-{round(self.epoch)}" if whole else f"step-{self.step}"

    @property
    def tags(self) -> dict[str, str]:
        """Which of the run's models it is."""
        own = {} if self.final else {CHECKPOINT: self.folder.name}
        return {STEP: str(self.step), "mlmx.epoch": f"{self.epoch:g}", **own}


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
