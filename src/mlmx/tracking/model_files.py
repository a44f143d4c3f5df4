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
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import yaml  # type: ignore[import-untyped]

# What makes a checkpoint loadable; the optimizer, scheduler and random states are for resuming, and stay local.
NOT_THE_MODEL = ("optimizer.safetensors", "trainer_state.json", "state.json", "manifest.json")
OF_THE_MODEL = (".safetensors", ".safetensors.index.json", "config.json", ".py")  # endings
MODEL, TOKENIZER = "model", "components/tokenizer"
FINAL = "model"
STEP, CHECKPOINT = "mlmx.step", "mlmx.checkpoint"  # tags of a model
Score = tuple[float, int]  # value, milliseconds since 1970
version = cache(metadata.version)  # which reads and parses a file each time


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


def model_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that its model is loaded from."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in NOT_THE_MODEL]


def place_of(path: Path) -> str:
    """The folder of an MLflow model that a file of a saved model belongs to.

    >>> place_of(Path("generation_config.json")), place_of(Path("tokenizer_config.json"))
    ('model', 'components/tokenizer')
    """
    return MODEL if path.name.endswith(OF_THE_MODEL) and path.name != "tokenizer_config.json" else TOKENIZER


def descriptions(folder: Path, files: Sequence[Path], model_id: str, run_id: str) -> dict[str, str]:
    """The texts that make an MLflow model of these files, by name.

    Classes are named by the library's Auto classes: those of a repository's own code are never loaded by MLflow.
    """
    try:
        mask = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["mask_token"]
        mask = str(mask["content"] if isinstance(mask, dict) else mask)
    except (OSError, ValueError, KeyError, TypeError):
        mask = "[MASK]"
    example = [f"This is a great {mask}."]
    written = max((path.stat().st_mtime for path in files), default=0.0)
    column = json.dumps([{"type": "string", "required": True}])
    env, python = {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}, platform.python_version()
    examples = {"artifact_path": "input_example.json", "serving_input_path": "serving_input_example.json"}
    function = {"env": env, "loader_module": "mlflow.transformers", "python_version": python}
    names = {"instance_type": "FillMaskPipeline", "task": "fill-mask", "source_model_name": "", "model_binary": MODEL}
    names |= {"pipeline_model_type": "AutoModelForMaskedLM", "tokenizer_type": "AutoTokenizer"}
    parts = {"code": None, "components": ["tokenizer"], "transformers_version": version("transformers")}
    described = {
        "flavors": {"python_function": function, "transformers": names | parts},
        "mlflow_version": version("mlflow"),
        "model_id": model_id,
        "model_size_bytes": sum(path.stat().st_size for path in files),
        "model_uuid": model_id.removeprefix("m-"),
        "run_id": run_id,
        "saved_input_example_info": examples | {"type": "json_object"},
        "signature": {"inputs": column, "outputs": column, "params": None},
        "utc_time_created": datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    return {
        "input_example.json": json.dumps(example, ensure_ascii=False),
        "serving_input_example.json": json.dumps({"inputs": example}, indent=2, ensure_ascii=False),
        **_environment(),
        "MLmodel": _yaml(described),
    }


def _yaml(value: object) -> str:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the one in Python takes five times as long
    return str(yaml.dump(value, Dumper=dumper, allow_unicode=True))


@cache
def _environment() -> dict[str, str]:
    """What the model needs, pinned to what made it; nobody is asked for it."""
    python, packages = platform.python_version(), ("mlflow", "torch", "transformers", "tokenizers", "safetensors")
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in packages]
    dependencies = [f"python={python}", "pip", {"pip": pinned}]
    virtualenv = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    return {
        "requirements.txt": "".join(f"{line}\n" for line in pinned),
        "conda.yaml": _yaml({"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": dependencies}),
        "python_env.yaml": _yaml(virtualenv),
    }
