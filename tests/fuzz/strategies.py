# ruff: noqa: E501 (tables of values)
"""What a command line may hold: right keys and wrong ones, with values of every kind."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from mlmx.config.options import table
from mlmx.config.schema import CONFIGS, group_names
from mlmx.data.chunks import CHUNKINGS
from mlmx.data.masking import MASKINGS
from mlmx.data.texts import DATASETS
from mlmx.models.encoders import MODELS
from mlmx.tracking.store import TRACKINGS

SCALARS = [
    "0", "-0", "-0.0", "1", "-1", "2", "16", "0.5", "1.5", "1e-400", "1e400", "-1e400", "1e308", "nan", "-nan", "inf",
    "-inf", ".inf", ".nan", str(10**30), str(-(10**30)), "9" * 400, "1" * 5000, "0x10", "0o17", "1_000", "01", "+5",
    "1.", ".5", "1e", "2147483648", "9223372036854775808", "4294967296",
    "true", "false", "True", "yes", "null", "~", "None", "", " ", "''", '""', "abc", "???", "a" * 100_000,
]  # fmt: skip
UNICODE = [
    "日本語", "😀", "👨‍👩‍👧", "שלום", "مرحبا", "\u202eabc\u202c", "e\u0301\u0301\u0301", "a\u0300" * 500, "\x00", "a\x00b", "\ud800",
    "\udcff\udcfe", "\ufeff", "\u2028", "\x85", "\n", "a\nb", "\r", "\t", "\x1b[31mred", "\x07", "ﬁ", "İ", "１６", "\u200b",
]  # fmt: skip
NESTED = [
    "[]", "{}", "[1,2]", "[16]", "{a:1}", "{a:{b:{c:[1,{d:2}]}}}", "[[[[]]]]", "[" * 50 + "]" * 50, "[" * 2000 + "]" * 2000,
    "{a:" * 60 + "1" + "}" * 60, "{a:" * 1500 + "1" + "}" * 1500, "{_target_:os.system}", "[{_target_:os.system}]",
    "{1:2}", "{null:1}", "{true:1}", "{1.5:2}", "{'':1}", "{a:1,a:2}", "{name:scratch}", "[null]", "[???]",
    "[" + "1," * 3000 + "1]",
]  # fmt: skip
INTERPOLATIONS = [
    "${seed}", "${lr}", "${chunk_size}", "${nope}", "${model.layers}", "${model}", "${.}", "${..}", "${}", "${", "$", "$$",
    "${oc.env:HOME}", "${oc.env:NOPE_NOT_SET}", "${oc.env:NOPE_NOT_SET,16}", "${oc.env:NOPE_NOT_SET,null}",
    "${hydra:job.num}", "${hydra:runtime.cwd}", "${hydra.job.num}", "${outputs:}", "${moment:}", "${outputs:1,2}",
    "${nope:1}", "${oc.decode:'1'}", "${oc.decode:'[['}", "${oc.create:{a:1}}", "${oc.select:nope}", "${oc.select:lr,1}",
    "${oc.dict.keys:model}", "${oc.dict.values:model}", "${oc.deprecated:lr}", "${${seed}}", "a${seed}b", "\\${seed}",
    "${note}", "${run_name}", "${example}", "${text}", "${run}", "${dataset.path}", "${masking}", "${trainer.name}",
    "[${seed},${lr}]", "{a:${seed}}", "${now:%Y}", "${now:}", "${python_version:}",
    "${oc.env:${oc.env:HOME}}", "${" * 100 + "seed" + "}" * 100,
]  # fmt: skip
FUNCTIONS = [
    "choice(1,2)", "choice()", "choice(1", "range(1,3)", "range(1,3,0)", "range(3)", "range(1,nan)", "range(0,1,1e-9)",
    "range(0,1000000000)", "range(0,3)", "interval(0,1)", "interval(1,0)", "glob(*)", "glob([)", "glob(*,exclude=*)",
    "int(3.5)", "int(x)", "float(x)", "float('1e400')", "str([1,2])", "bool(x)", "json_str({a:1})", "sort(3,1,2)",
    "sort(a,1)", "shuffle(1,2,3)", "shuffle(range(1,9))", "tag(a,b,choice(1,2))", "nope(1)", "cast(1)", "1,2", "1,1",
    "16,abc", ",", "1,", ",1", "a,b,c", "[1,2],[3]", "extend_list(1)",
]  # fmt: skip
SYNTAX = ["a=b", "=", "a:b", "@", "'", '"', "'a", '"a', "\\", "a\\", "(", ")", "[", "]", "{", "}", "{a", "[1", "{a:}", "#", "%", "&", "~nobody/x", "'~nobody'", "/" + "a" * 5000, "/dev/zero", "/dev/null",
          "*", "!", "a b", " a", "a ", "/", "..", "../..", "-", "--", "|", ">", "!!python/object:os.system", "&a [*a]", "%s", "%(x)s"]  # fmt: skip

values = st.one_of(
    st.sampled_from(SCALARS),
    st.sampled_from(UNICODE),
    st.sampled_from(UNICODE).map(lambda text: f"'{text}'"),
    st.sampled_from(NESTED),
    st.sampled_from(INTERPOLATIONS),
    st.sampled_from(FUNCTIONS),
    st.sampled_from(SYNTAX),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=12),
    st.text(st.sampled_from("'\"\\${}[](),:=~+@ .a1-\n"), max_size=12),
)

NONSENSE_KEYS = [
    "zzz", "chunk_sze", "a.b.c", "a" * 5000, ".", "..", "a.", ".a", "a..b", "a.0", "0", "-1", "1.5", "true", "null", "", " ", "a b", "é",
    "日本", "😀", "\u202ea", "\x00", "\ud800", "a\nb", "@", "a@b", "@a", "a@", "model@x", "model@x.y", "/model", "model/",
    "model/x", "model/x@y", "experiment@x", "_target_", "_name_", "defaults", "hydra", "$", "${seed}", "[0]", "a[0]", "model[0]",
    "model.name.x", "lr.x", "seed.0", "heldout.dataset.path", "__class__", "_metadata", "keys", "items", "get", "~", "+", "++", "'a'",
    '"a"', "a" + ".a" * 500, "a:b", "masking.name", "model.", "model..layers", "model.layers.x.y.z",
]  # fmt: skip
HYDRA_KEYS = [
    "hydra.zzz", "hydra.run", "hydra.run.zzz", "hydra.job", "hydra.job.num", "hydra.job.name", "hydra.job.config_name",
    "hydra.job.override_dirname", "hydra.mode", "hydra.verbose", "hydra.sweeper", "hydra.sweeper.params", "hydra.launcher",
    "hydra.output_subdir", "hydra.runtime.output_dir", "hydra.job_logging", "hydra.hydra_logging", "hydra.callbacks",
    "hydra.searchpath", "hydra.overrides", "hydra.overrides.task", "hydra/launcher", "hydra/sweeper", "hydra/job_logging",
    "hydra/hydra_logging", "hydra/output", "hydra/zzz", "hydra/env", "hydra/help", "hydra.help", "hydra.env", "hydra.sweep.subdir",
    "hydra.job.env_set", "hydra.job.env_copy", "hydra.job.config.override_dirname.kv_sep",
]  # fmt: skip
TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "model": MODELS,
    "dataset": DATASETS,
    "chunking": table(*CHUNKINGS.values()),
    "masking": MASKINGS,
    "tracking": TRACKINGS,
}
SHARED_OPTIONS = [
    "dataset.train_chunks", "dataset.eval_chunks", "dataset.split_seed", "dataset.heldout", "dataset.allow_overlap",
    "masking.mask_share", "masking.random_share", "masking.keep_share", "masking.final_probability",
    "heldout.dataset", "heldout.documents", "heldout.share", "trainer.name",
]  # fmt: skip


def option_keys() -> list[str]:
    """``model.layers``, ``dataset.path``, …: every option of every function that a group's ``name`` can mean."""
    keys = set(SHARED_OPTIONS)
    for group, functions in TABLES.items():
        for function in functions.values():
            keys |= {
                f"{group}.{p.name}"
                for p in inspect.signature(function).parameters.values()
                if p.kind is inspect.Parameter.KEYWORD_ONLY
            }
    return sorted(keys)


def keys_of(command: str) -> st.SearchStrategy[str]:
    """Keys for a command line: its dials, groups and their options, others' as well, and nonsense."""
    dials = sorted(field.name for field in dataclasses.fields(CONFIGS[command]))
    groups = [*group_names(CONFIGS[command]), "experiment"]
    return st.one_of(
        st.sampled_from(dials),
        st.sampled_from(dials),
        st.sampled_from(groups),
        st.sampled_from(option_keys()),
        st.sampled_from(option_keys()),
        st.sampled_from(NONSENSE_KEYS),
        st.sampled_from(HYDRA_KEYS),
        st.text(max_size=8),
    )


FLAGS = [
    ["-m"], ["--multirun"], ["-r"], ["--run"], ["--cfg"], ["--cfg", "job"], ["--cfg", "all"], ["--cfg", "hydra"], ["--cfg=jub"], ["-c", "job"],
    ["--resolve"], ["--package"], ["--package", "model"], ["--package", "zzz"], ["-p", ""], ["--info"], ["--info", "config"],
    ["--info", "defaults"], ["--info", "zzz"], ["-i"], ["--config-dir"], ["--config-dir", "nowhere"], ["--config-dir", ""], ["--config-dir", "\x00"],
    ["--config-dir", "\ud800"], ["--config-dir", "good.txt"], ["-cd"], ["--config-name", "x"], ["-cn"], ["--config-path", "x"], ["-cp", "x"],
    ["--experimental-rerun", "x"], ["--experimental-rerun"], ["--version"], ["--hydra-help"], ["--"], ["-"], ["---"], ["--zzz"], ["-z"], ["--mult"],
    ["--cfg", "job", "-m"], ["--cfg", "job", "--resolve"], ["--conf", "x"], ["-x=1"], ["--lr=1"], ["--😀"], ["-\ud800"], ["@good.txt"], [""],
]  # fmt: skip


# Behind these a request goes on to be judged by what it says itself, not refused for the hub that does not answer.
LOCAL = ["model=scratch", "dataset=files", "dataset.path=good.txt", "chunk_size=16", "tracking=none"]


def requests() -> st.SearchStrategy[list[str]]:
    """A command of any kind with whatever may stand behind it; half of those that read data read a good file."""
    return st.sampled_from(sorted(CONFIGS)).flatmap(request_of)


def request_of(command: str) -> st.SearchStrategy[list[str]]:
    """The command with whatever may stand behind it."""
    bases = [[], LOCAL] if command == "train" else [[], LOCAL[:-1]] if command == "prepare" else [[]]
    return st.builds(lambda base, rest: [command, *base, *rest], st.sampled_from(bases), arguments_of(command))


def arguments_of(command: str) -> st.SearchStrategy[list[str]]:
    """One to four things that may stand behind a command."""
    prefixes = st.sampled_from(["", "", "", "", "+", "++", "~", "~", "@", "+++"])
    override = st.builds(
        lambda prefix, key, equals, value: f"{prefix}{key}{equals}{value if equals else ''}",
        prefixes,
        keys_of(command),
        st.sampled_from(["=", "=", "=", "=", "=", "=", "=", "", "==", ":"]),
        values,
    )
    piece = st.one_of(override.map(lambda one: [one]), override.map(lambda one: [one]), st.sampled_from(FLAGS))
    several = st.lists(piece, min_size=2, max_size=4).map(lambda pieces: [word for piece in pieces for word in piece])
    return st.one_of(piece, piece, several)  # several faults are answered by the first
