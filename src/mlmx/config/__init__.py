"""What a user may ask for, and the rules every key is checked by.

Hydra composes YAML into the dataclasses of `commands`. A group option (``model: scratch``) is ``name:`` plus the
keyword-only arguments of the function of that name in a stage's table; `bind` checks the one against
the other, so a function's signature is its schema. Nothing here imports torch, and nothing after
`to_config` changes a value.
"""

from mlmx.config.commands import (
    CONFIGS,
    CompareConfig,
    Config,
    DoctorConfig,
    EvaluateConfig,
    Job,
    Options,
    PredictConfig,
    PrepareConfig,
    SyncConfig,
    TrainConfig,
    UiConfig,
    from_plain,
    group_names,
    load_option,
    register_schemas,
    to_config,
)
from mlmx.config.contents import refuse_code, refuse_secrets
from mlmx.config.requests import RequestError, WorkError, did_you_mean, path_of, require
from mlmx.config.signatures import bind, convert, table
from mlmx.config.trust import TRUST_FLAG, TrustedCode, require_trusted_model, trusted_code, trusted_code_of, trusting

__all__ = [
    "CONFIGS",
    "TRUST_FLAG",
    "CompareConfig",
    "Config",
    "DoctorConfig",
    "EvaluateConfig",
    "Job",
    "Options",
    "PredictConfig",
    "PrepareConfig",
    "RequestError",
    "SyncConfig",
    "TrainConfig",
    "TrustedCode",
    "UiConfig",
    "WorkError",
    "bind",
    "convert",
    "did_you_mean",
    "from_plain",
    "group_names",
    "load_option",
    "path_of",
    "refuse_code",
    "refuse_secrets",
    "register_schemas",
    "require",
    "require_trusted_model",
    "table",
    "to_config",
    "trusted_code",
    "trusted_code_of",
    "trusting",
]
