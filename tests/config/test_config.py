"""Every key is checked against a signature; a config holds values only and runs no code."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

import mlmx
from mlmx.config.errors import RequestError, did_you_mean
from mlmx.config.options import bind, convert, table
from mlmx.config.redaction import refuse_code
from mlmx.config.schema import CONFIGS, EvaluateConfig, PredictConfig, TrainConfig, UiConfig, from_plain, to_config

NAN = math.nan


def encoder(
    tokenizer: Any,
    *,
    layers: int,
    dropout: float = 0.1,
    tied: bool = True,
    kind: Literal["bert", "roberta"] = "bert",
    path: str | list[str] = "here",
    note: str | None = None,
) -> None: ...


def shares(*, mask_share: float = 0.8, layers: int = 1) -> None: ...


ENCODERS: dict[str, Callable[..., None]] = table(encoder)


# ------------------------------------------------------------------------------------------ bind


def test_bind_fills_in_what_is_given_and_nothing_else():
    (part,) = bind("model", {"name": "encoder", "layers": 2}, ENCODERS)
    assert part.func is encoder
    assert part.keywords == {"layers": 2}
    assert part.args == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["model.name", "missing", "encoder"]),
        ({"name": None, "layers": 1}, ["model.name", "missing", "encoder"]),
        ({"name": "", "layers": 1}, ["model.name", "missing", "encoder"]),
        ({"name": 3, "layers": 1}, ["model.name", "missing", "encoder"]),
        ({"name": "encodr", "layers": 1}, ["model.name=encodr", "did you mean encoder?", "known: encoder"]),
        ({"name": "zzz", "layers": 1}, ["model.name=zzz", "known: encoder"]),
        ({"name": "encoder", "layrs": 1}, ["model.layrs", "did you mean layers?", "takes layers, dropout"]),
        ({"name": "encoder", "layers": 1, "zzz": 1}, ["model.zzz", "unknown option", "takes layers, dropout"]),
        ({"name": "encoder"}, ["model.layers", "missing", "model.layers=…"]),
        ({"name": "encoder", "layers": "x"}, ["model.layers='x'", "a whole number is needed"]),
        ({"name": "encoder", "layers": 1, "tied": 1}, ["model.tied=1", "true or false is needed"]),
        ({"name": "encoder", "layers": 1, "kind": "t5"}, ["model.kind='t5'", "one of bert, roberta is needed"]),
        ({"name": "encoder", "layers": 1, "path": 3.5j}, ["model.path=3.5j", "a text or a list is needed"]),
        # handed over by the pipeline, so no option
        ({"name": "encoder", "layers": 1, "tokenizer": "x"}, ["model.tokenizer", "unknown option"]),
    ],
)
def test_bind_refuses_what_the_signature_does_not_take(options: dict[str, Any], words: list[str]):
    with pytest.raises(RequestError) as refused:
        bind("model", options, ENCODERS)
    assert [word for word in words if word not in str(refused.value)] == []


def test_bind_hands_each_option_to_every_function_that_takes_it():
    options = {"name": "encoder", "layers": 3, "dropout": 0, "mask_share": 1}
    main, shared = bind("model", options, ENCODERS, shares)
    assert main.keywords == {"layers": 3, "dropout": 0.0}
    assert (shared.func, shared.keywords) == (shares, {"layers": 3, "mask_share": 1.0})


def test_a_near_name_of_a_shared_option_is_proposed():
    with pytest.raises(RequestError, match=r"did you mean mask_share\?"):
        bind("model", {"name": "encoder", "layers": 1, "mask_shar": 1}, ENCODERS, shares)


def test_functions_without_options_say_so():
    def plain_one(uniforms: Any) -> None: ...

    with pytest.raises(RequestError, match="takes no options"):
        bind("masking", {"name": "plain_one", "rate": 1}, table(plain_one))


@pytest.mark.parametrize(
    ("word", "choices", "hint"),
    [
        ("chunk_sze", ["chunk_size", "lr"], "; did you mean chunk_size?"),
        ("zzzzzz", ["chunk_size", "lr"], ""),
        ("", ["chunk_size"], ""),
        ("lr", [], ""),
        ("lr", ["lrs", "lr"], ""),
    ],
)
def test_did_you_mean_names_the_nearest_choice_or_none(word: str, choices: list[str], hint: str):
    assert did_you_mean(word, choices) == hint


# --------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize(
    ("value", "wanted", "converted"),
    [
        (1, float, 1.0),
        (1.5, float, 1.5),
        (42.0, int, 42),
        (-3, int, -3),
        (True, bool, True),
        ("a", str, "a"),
        (3, str, "3"),
        (True, str, "True"),
        (None, str | None, None),
        (None, type(None), None),
        ("b", Literal["a", "b"], "b"),
        (5, int | float, 5),
        (5.0, int | float, 5.0),
        ([1, 2.0], list[int], [1, 2]),
        ((1, 2), list[int], [1, 2]),
        ([], list[int], []),
        (["a"], str | list[str], ["a"]),
        ("a", str | list[str], "a"),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": 1}, dict, {"a": 1}),
        (object, Any, object),
    ],
)
def test_convert_gives_the_wanted_type(value: Any, wanted: Any, converted: Any):
    found = convert("key", value, wanted)
    assert (found, type(found)) == (converted, type(converted))


@pytest.mark.parametrize(
    ("value", "wanted", "wording"),
    [
        (42.5, int, "a whole number"),
        (NAN, int, "a whole number"),
        (math.inf, int, "a whole number"),
        (True, int, "a whole number"),
        ("2", int, "a whole number"),
        (None, int, "a whole number"),
        (True, float, "a number"),
        ("1e-3", float, "a number"),
        (1, bool, "true or false"),
        ("true", bool, "true or false"),
        (None, str, "a text"),
        (["a"], str, "a text"),
        ("c", Literal["a", "b"], "one of a, b"),
        ([1.5], list[int], "a list"),
        ("a", list[str], "a list"),
        ({"a": "x"}, dict[str, float], "a mapping"),
        ([1], dict[str, float], "a mapping"),
        ("x", int | None, "a whole number or null"),
    ],
)
def test_convert_refuses_another_type_and_words_what_is_needed(value: Any, wanted: Any, wording: str):
    with pytest.raises(RequestError) as refused:
        convert("lr", value, wanted)
    assert str(refused.value) == f"lr={value!r}: {wording} is needed"


# ---------------------------------------------------------------------------------- refuse_code


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"_target_": "os.system"}, "_target_"),
        ({"model": {"_target_": "os.system"}}, "model._target_"),
        ({"model": {"_target_": None}}, "model._target_"),
        ({"model": {"a": {"b": {"_target_": "x"}}}}, "model.a.b._target_"),
        ({"trainer": {"callbacks": [1, {"_target_": "x"}]}}, "trainer.callbacks.1._target_"),
        ({"trainer": [[{"_target_": "x"}]]}, "trainer.0.0._target_"),
        ({"a": {"_target_": "x"}, "model": "${a}"}, "a._target_"),
    ],
)
def test_a_target_is_refused_wherever_it_stands(config: dict[str, Any], place: str):
    with pytest.raises(RequestError) as refused:
        refuse_code(OmegaConf.to_container(OmegaConf.create(config), resolve=True))
    assert str(refused.value).startswith(f"{place}: ")
    assert "mlmx.plugins" in str(refused.value)


def test_values_without_a_target_pass():
    harmless = {"a": {"b": [1, None, {"c": "_target_"}]}, "d": None, "e": "${a}", "f": "${a.b}", "g": "???"}
    refuse_code(OmegaConf.to_container(OmegaConf.create(harmless), resolve=True))


# -------------------------------------------------------------------------- roots and their limits


@pytest.mark.parametrize("command", list(CONFIGS))
def test_unknown_root_keys_are_refused_with_the_nearest(command: str):
    known = fields(CONFIGS[command])[0].name
    composed = OmegaConf.create({f"{known}z": 1})
    with pytest.raises(RequestError, match=rf"{known}z: unknown key; did you mean {known}\?"):
        to_config(command, composed)
    with pytest.raises(RequestError, match=rf"{known}z: unknown key; did you mean {known}\?"):
        from_plain(CONFIGS[command], {f"{known}z": 1})


@pytest.mark.parametrize(
    ("schema", "key", "good", "bad"),
    [
        (TrainConfig, "chunk_size", [3, 128, 10**6], [2, 1, 0, -5]),
        (TrainConfig, "mlm_probability", [1e-9, 0.15, 0.999], [0, 1, -0.1, 2, NAN, math.inf]),
        (TrainConfig, "lr", [1e-12, 1], [0, -1, NAN, math.inf]),
        (TrainConfig, "epochs", [0.01, 3], [0, -1, NAN, math.inf]),
        (TrainConfig, "batch_size", [1, 64], [0, -8]),
        (TrainConfig, "weight_decay", [0, 0.1], [-0.1, NAN, math.inf]),
        (TrainConfig, "seed", [0, 2**32 - 1], [-1, 2**32]),
        (TrainConfig, "precision", ["fp32", "bf16", "fp16", "auto"], ["fp8", "", "BF16"]),
        (EvaluateConfig, "batch_size", [1], [0, -1]),
        (EvaluateConfig, "chunk_size", [None, 3], [2, 0, -1]),
        (PredictConfig, "top_k", [1], [0, -1]),
        (UiConfig, "port", [1, 5000, 65535], [0, -1, 65536]),
    ],
)
def test_dials_hold_their_limits(schema: type, key: str, good: list[Any], bad: list[Any]):
    for value in good:
        assert getattr(schema(**{key: value}), key) == value
    for value in bad:
        with pytest.raises(RequestError) as refused:
            schema(**{key: value})
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert str(refused.value).startswith(f"{key}={shown}: ")


def test_from_plain_converts_each_value_to_the_type_of_its_field():
    config = from_plain(TrainConfig, {"epochs": 2, "chunk_size": 128.0, "note": None})
    assert (repr(config.epochs), repr(config.chunk_size), config.note) == ("2.0", "128", None)
    with pytest.raises(RequestError, match="chunk_size='x': a whole number is needed"):
        from_plain(TrainConfig, {"chunk_size": "x"})


def test_plain_and_from_plain_are_inverse():
    config = TrainConfig(model={"name": "scratch"}, masking={"name": "token"}, tracking={"name": "none"})
    assert from_plain(TrainConfig, asdict(config)) == config
    assert list(asdict(config))[:3] == ["chunk_size", "mlm_probability", "lr"]


def test_configs_share_no_mutable_defaults():
    TrainConfig().model["name"] = "changed"
    assert TrainConfig().model == {}


def test_a_composition_is_resolved_into_plain_values():
    config = to_config("predict", OmegaConf.structured(PredictConfig(text=["${run}"], top_k=2)))
    assert config == PredictConfig(run="last", text=["last"], top_k=2)
    assert type(config.text) is list


# -------------------------------------------------------------------------------------- doctests


def test_the_examples_in_docstrings_are_true():
    tried = {}
    for found in pkgutil.walk_packages(mlmx.__path__, "mlmx."):
        if found.name == "mlmx.__main__":
            continue
        result = doctest.testmod(importlib.import_module(found.name))
        assert result.failed == 0, found.name
        tried[found.name] = result.attempted
    assert min(tried[f"mlmx.{name}"] for name in ("config.options", "runs.explain", "tracking.model_files")) > 0
