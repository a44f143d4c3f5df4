"""Configurations, tokenizers and weights by the library: safetensors only, and no code but what is trusted by name."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config.errors import RequestError
from mlmx.config.sources import require_reachable
from mlmx.config.trust import TrustedCode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Else the library would look for a proposal of converted weights, which is not the revision asked for.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"


def config_and_tokenizer(path: str, revision: str | None, code: TrustedCode | None) -> tuple[Any, Any]:
    """The model's configuration and tokenizer; read again when a local folder has changed."""
    folder = Path(path).expanduser()
    changed = sorted(file.stat().st_mtime_ns for file in folder.iterdir()) if folder.is_dir() else ()
    return _config_and_tokenizer(path, revision, code, tuple(changed))


@lru_cache(maxsize=2)  # the jobs of a sweep mostly share a tokenizer
def _config_and_tokenizer(
    path: str, revision: str | None, code: TrustedCode | None, changed: tuple[int, ...]
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    source, trust = path, code is not None
    if code is not None:
        # Code comes from the commit that is trusted, also for a model trained from it, whose folder may have changed.
        source, revision = code.repo, code.revision
        require_reachable("model", source, revision)
    where: dict[str, Any] = {"revision": revision, "code_revision": code.revision if code else None}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust, **where)
        return config, AutoTokenizer.from_pretrained(source, trust_remote_code=trust, **where)
    except Exception as error:  # of any kind: what a damaged file meets first, a tokenizer in Rust as well
        raise _refusal(path, revision, "cannot be loaded", error) from error


def saved_model(path: str, revision: str | None, code: TrustedCode | None) -> PreTrainedModel:
    """The masked LM of a folder or hub repository, in fp32."""
    from transformers import AutoModelForMaskedLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind: Any = AutoModelForMaskedLM
    config = None
    try:
        if code is not None:
            config, _ = config_and_tokenizer(path, revision, code)
            # The class of the trusted commit where it names one, wherever the weights lie.
            named = (getattr(config, "auto_map", None) or {}).get("AutoModelForMaskedLM")
            if named is not None:
                at = code.revision
                kind = get_class_from_dynamic_module(named, code.repo, revision=at, code_revision=at)
        loaded: PreTrainedModel = kind.from_pretrained(
            path, config=config, revision=revision, dtype="float32", use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:
        raise _refusal(path, revision, "its weights cannot be loaded", error) from error
    return loaded


def fresh_model(settings: dict[str, Any]) -> PreTrainedModel:
    """A masked LM with random weights; ``settings`` are those of its configuration and ``model_type``."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    auto: Any = AutoModelForMaskedLM
    made: PreTrainedModel = auto.from_config(AutoConfig.for_model(**settings), trust_remote_code=False)
    return made


def _refusal(path: str, revision: str | None, what: str, error: Exception) -> RequestError:
    """The library's refusal, in our words where its own advice would not help here."""
    if isinstance(error, RequestError):
        return error
    reason = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
    if "trust_remote_code" in reason:
        return RequestError(
            f"model.path={path}: brings code of its own, which is not run; read that code, and if you trust it name it "
            "on the command line: --trust-remote-code=owner/name@<40 hexadecimal digits of the commit>"
        )
    if "use_safetensors" in reason:
        return RequestError(f"model.path={path}: has no model.safetensors, and pickled weights are not read")
    if revision is not None and "valid git identifier" in reason:
        return RequestError(
            f"model.path={path}: has no revision {revision}; give model.revision=<a commit of it>, null for the newest"
        )
    return RequestError(f"model.path={path}: {what} ({reason})")
