"""Secrets out of text: by the names of variables, in addresses, by their form; and out of what is written."""

from __future__ import annotations

import io
import json
import logging
import random
import string
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from mlmx.config.errors import RequestError
from mlmx.config.redaction import RedactedStream, exposed, redact, redacted, show_traceback
from mlmx.config.schema import TrainConfig
from mlmx.runs import explain
from mlmx.runs.log import log_to, log_to_file
from mlmx.runs.run import begin_run
from mlmx.tracking.tracker import Tracker

CANARY = "Canary-7f3a9e51c0"
SECRET_NAMES = [
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN"),
    *("WANDB_API_KEY", "MY_SECRET", "MY_SECRET_KEY", "DB_PASSWORD", "db_password", "GH_TOKEN", "STORAGE_ACCESS_KEY"),
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_the_value_of_a_secret_variable_is_never_shown(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, CANARY)
    assert redact(f"a {CANARY} b{CANARY}") == "a *** b***"
    assert exposed(f"a {CANARY}") == f"the value of {name}"
    monkeypatch.delenv(name)
    assert redact(f"a {CANARY}") == f"a {CANARY}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_REGION", "eu-central-1"),
        ("AWS_PROFILE", "research-team"),
        ("MLFLOW_TRACKING_USERNAME", "somebody"),
        ("TOKENIZERS_PARALLELISM", "disabled"),
        ("HF_TOKEN", "short"),  # would be found by chance
        ("HF_TOKEN", ""),
    ],
)
def test_what_is_no_secret_is_left_as_it_is(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    text = f"x {value} y short"
    assert (redact(text), exposed(text)) == (text, None)


def test_a_secret_that_begins_another_does_not_leave_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_TOKEN", "abcdefghij")
    monkeypatch.setenv("B_TOKEN", "abcdefghij-and-more")
    assert redact("abcdefghij-and-more, abcdefghij") == "***, ***"


ADDRESSES = [
    ("http://ann:s3cret@host:5000/api", "http://***@host:5000/api"),
    ("HTTPS://ann:s3cret@host", "HTTPS://***@host"),
    ("see 'postgresql://ann:s3cret@host/db', twice http://b:c@d", "see 'postgresql://***@host/db', twice http://***@d"),
    ("https://s3crettoken@host/x", "https://***@host/x"),
    ("http://ann:s3/cret@host", "http://***@host"),
    ("http://ann:s3@cret@host", "http://***@host"),
    ("http://ann:12345@host", "http://***@host"),
    ("https://b.s3.amazonaws.com/k?X-Amz-Signature=s&y=1", "https://b.s3.amazonaws.com/k?X-Amz-Signature=***&y=1"),
    ("http://h/?a=1&token=s3cret#x", "http://h/?a=1&token=***#x"),
    ("http://h/?sig=s3cret", "http://h/?sig=***"),
]


@pytest.mark.parametrize(("given", "shown"), ADDRESSES)
def test_credentials_in_an_address_are_never_shown(given: str, shown: str):
    assert redact(given) == shown
    assert redact(shown) == shown
    assert exposed(given) == "credentials in an address"


@pytest.mark.parametrize(
    "harmless",
    [
        "http://127.0.0.1:5000/a@b",
        "http://[::1]:5000/a@b",
        "sqlite:////tmp/a@b/mlflow.db",
        "hf://datasets/stanfordnlp/imdb@e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
        "distilbert/distilbert-base-uncased@12040accade4e8a0f71eabdb258fecc2e7e948be",
        "mail somebody@example.org; keyword=1 ?monkey=2&design=3 mask_token=[MASK]",
        "hf_internal_testing and hf_hub",
    ],
)
def test_what_only_looks_like_credentials_is_left_as_it_is(harmless: str):
    assert (redact(harmless), exposed(harmless)) == (harmless, None)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("hf_" + "aB3" * 12, "***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("{'Authorization': 'Basic dTpw'}", "{'Authorization': 'Basic ***'}"),
        ("authorization: Bearer abc.def", "authorization: Bearer ***"),
    ],
)
def test_tokens_are_known_by_their_form(given: str, shown: str):
    assert redact(f"x {given} y") == f"x {shown} y"
    assert exposed(given) == "an access token"


ODD_SECRETS = ['quo"te\\back', "line one\nline two", "umlaut-ä-€", "a+b/c=d e%f", "tab\tand 'both\" quotes"]


@pytest.mark.parametrize("value", ODD_SECRETS)
def test_a_secret_is_found_however_it_is_written(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", value)
    written = [value, repr(value), json.dumps(value), json.dumps(value, ensure_ascii=False), quote(value, safe="")]
    for text in [*written, " ".join(value.split()), str(ValueError(value)), repr(ValueError(value))]:
        assert exposed(f"<{text}>") == "the value of MY_TOKEN"
        assert redact(text).strip("'\"") in ("***", "ValueError('***')", 'ValueError("***")', "ValueError('***'")


def test_any_secret_between_any_texts_is_replaced_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    draw = random.Random(0)
    alphabet = string.printable + "äß€😀"
    for _ in range(300):
        value = "".join(draw.choices(alphabet, k=draw.randint(8, 40))).strip()
        if len(value) < 8:
            continue
        monkeypatch.setenv("MY_TOKEN", value)
        before, after = ("".join(draw.choices(string.ascii_letters + " ", k=5)) for _ in range(2))
        assert redact(before + value + after) == f"{before}***{after}"


def test_values_are_redacted_inside_and_numbers_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    given = {"a": [CANARY, 1, None, {CANARY: f"x {CANARY}"}], "b": (1.5, True), "c": "plain"}
    assert redacted(given) == {"a": ["***", 1, None, {"***": "x ***"}], "b": [1.5, True], "c": "plain"}


def test_a_long_line_takes_no_longer_than_its_length_asks():
    long = ["a" * 10**6, "://" + "a:" * 10**5, "://a:" * 10**4, "?a" * 10**5, "authorization " * 10**4, "hf_" * 10**5]
    began = time.monotonic()
    for line in long:
        redact(line)
    assert time.monotonic() - began < 60  # a guard against quadratic time, which would take minutes


# -------------------------------------------------------------------------------- what is written


def test_a_stream_shows_no_secret_and_is_else_the_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    under = io.StringIO()
    stream = RedactedStream(under)
    assert stream.write(f"x {CANARY}\n") == len(CANARY) + 3
    stream.writelines([f"{CANARY}\n", "y\n"])
    print(CANARY, "end", file=stream)
    assert under.getvalue() == "x ***\n***\ny\n*** end\n"
    assert (stream.isatty(), stream.readable()) == (False, True)


def test_a_traceback_shows_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    try:
        raise ValueError(f"cannot reach http://u:p@h with {CANARY}")
    except ValueError as error:
        show_traceback(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("ValueError: cannot reach http://***@h with ***\n")


def test_debugging_shows_the_traceback_without_secrets(monkeypatch: pytest.MonkeyPatch):
    from mlmx.commands.main import main

    monkeypatch.setenv("MLMX_DEBUG", "1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RequestError):
        main(["train", "chunk_size=0"])
    assert sys.excepthook is show_traceback


def test_the_line_of_an_error_shows_no_secret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", CANARY)
    for error in (ValueError(f"no http://u:{CANARY}@h"), RequestError(f"{CANARY}: no such folder")):
        error.add_note(f"job 0 of the sweep (tracking.uri=http://u:{CANARY}@h)")
        assert CANARY not in explain.explain(error, "train")[1]


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever comes through: config, overrides, inputs, data report, results, evaluations and the log."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    config = TrainConfig(note=f"with {CANARY}", dataset={"name": "files", "path": [f"/data/{CANARY}/a.txt"]})
    run = begin_run(tmp_path / "run", config, (f"note={CANARY}", "lr=1e-3"), {"data": CANARY})
    made = Tracker(run, None)
    tags = {"mlmx.command": f"train note={CANARY}"}
    made.start(f"named {CANARY}", "none", {"note": CANARY}, tags, {"x": {"source": CANARY}})
    with log_to_file(run):
        logging.getLogger("mlmx").info("quoting %s", CANARY)
        try:
            raise OSError(f"http://u:{CANARY}@h")
        except OSError:
            logging.getLogger("mlmx").warning("failed", exc_info=True)
    run.append_line("evaluations.jsonl", {"dataset": {"path": CANARY}})
    made.finish("FINISHED", {})
    texts = {path.name: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "overrides.yaml", "data.json", "result.json", "train.log", "evaluations.jsonl"} <= set(texts)
    assert [name for name, text in texts.items() if CANARY.encode() in text] == []
    assert b"quoting ***" in texts["train.log"]
    assert run.config().note == "with ***"


def test_what_is_said_on_stdout_shows_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with log_to():
        logging.getLogger("mlmx").info("quoting %s", CANARY)
    assert capsys.readouterr().out == "quoting ***\n"
