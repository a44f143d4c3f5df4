"""Who may import whom, how long a file and a function may be, and what a config may not hold."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mlmx"

# A module imports only from layers above its own line, never from its own line.
LAYERS = [
    ["__init__"],
    ["places", "redaction"],
    ["config"],
    ["space"],
    ["metrics_file"],
    ["runs", "sources", "provenance", "draws", "memory", "threads", "interrupts", "identity", "documents", "retention"],
    ["alive", "lineage"],
    ["sweeps"],
    ["comparison"],
    ["charts"],
    ["data", "masking", "model", "training", "scoring", "tracking"],
    ["describe"],
    ["measure"],
    ["parts", "examples"],
    ["train", "prepare", "evaluate", "predict", "ui", "doctor", "sync", "compare"],
    ["errors", "arguments", "hydra_node", "composition"],
    ["resumption", "searching"],
    ["sweep_jobs", "sweeping"],
    ["cli"],
    ["__main__"],
]
[STAGES] = [layer for layer in LAYERS if "data" in layer]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FUNCTION_LINES = 40
MAX_LONG_FUNCTIONS = 4

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module_of(path: Path) -> str:
    """``src/mlmx/data/texts.py`` → ``data.texts``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> int:
    """The layer of a module, or of the package it is in."""
    [layer] = [number for number, names in enumerate(LAYERS) if module.partition(".")[0] in names]
    return layer


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> Iterator[str]:
    """Modules of mlmx that a file imports anywhere in it, functions included."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "mlmx":
                    yield name.name.removeprefix("mlmx").removeprefix(".") or "__init__"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "mlmx":
                yield from (name.name if name.name in MODULES else "__init__" for name in node.names)
            elif module.startswith("mlmx."):
                yield module.removeprefix("mlmx.")


def functions() -> Iterator[tuple[str, int]]:
    """Every function with its number of lines, decorators and docstring included."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                yield f"{module_of(path)}.{node.name}", (node.end_lineno or first) - first + 1


def test_every_module_has_its_layer():
    names = {module.partition(".")[0] for module in MODULES}
    assert names == {name for layer in LAYERS for name in layer}


def test_the_imports_are_seen_in_functions_too():
    """The laws below hold of all imports only if these are found."""
    assert "errors" in set(imports_of(MODULES["cli"]))
    assert "tracking.mlflow_run" in set(imports_of(MODULES["tracking"]))
    assert {"data", "masking", "model"} <= set(imports_of(MODULES["parts"]))
    assert "__init__" in set(imports_of(MODULES["provenance"]))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_lower_layers(module: str):
    own = module.partition(".")[0]
    above = [
        imported
        for imported in imports_of(MODULES[module])
        if imported.partition(".")[0] != own and layer_of(imported) >= layer_of(module)
    ]
    assert above == []


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_each_other(stage: str):
    own = [path for module, path in MODULES.items() if module.partition(".")[0] == stage]
    imported = {name.partition(".")[0] for path in own for name in imports_of(path)}
    assert imported & (set(STAGES) - {stage}) == set()


def test_nothing_but_the_parts_of_a_stage_reaches_inside_it_from_below():
    """A stage's files are imported by themselves and by the commands, not by the layers under them."""
    below = [name for layer in LAYERS[: LAYERS.index(STAGES)] for name in layer]
    lower = [path for module, path in MODULES.items() if layer_of(module) < layer_of("data")]
    assert {name.partition(".")[0] for path in lower for name in imports_of(path)} <= set(below)


def test_no_module_is_a_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base", "core", "lib"}
    assert drawers & {part for module in MODULES for part in module.split(".")} == set()


def test_files_are_short_enough_to_be_read():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short_enough_to_be_read():
    lengths = dict(functions())
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}
    long = {name: lines for name, lines in lengths.items() if lines > LONG_FUNCTION_LINES}
    assert len(long) <= MAX_LONG_FUNCTIONS, long


def test_the_main_path_fits_on_a_screen():
    assert dict(functions())["train.train"] <= 30


def keys_of(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_no_config_names_a_target():
    loaded = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "conf").rglob("*.yaml")]
    assert len(loaded) > 20
    assert "_target_" not in set(keys_of(loaded))


# Where text becomes code, and in which modules that may be: `bind` evaluates the annotations of functions.
EVERYWHERE_ELSE = ("exec", "compile", "__import__", "instantiate", "get_class")
CODE_FROM_TEXT: dict[str, list[str]] = {"eval": ["config.signatures"], **{name: [] for name in EVERYWHERE_ELSE}}
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def called(node: ast.Call) -> str:
    """``eval`` of ``eval(x)`` and ``instantiate`` of ``utils.instantiate(x)``, but nothing of ``model.eval()``."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    name = getattr(node.func, "attr", "")
    return name if name in ("instantiate", "get_class") else ""


def test_text_never_becomes_code():
    calls = [(m, node) for m, path in MODULES.items() for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    used = {name: sorted({module for module, node in calls if called(node) == name}) for name in CODE_FROM_TEXT}
    assert used == CODE_FROM_TEXT
    assert [module for module, node in calls if any(keyword.arg == "shell" for keyword in node.keywords)] == []


def library_imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Top-level names of what these statements import."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_no_module_loads_pickles():
    assert library_imports(node for tree in TREES.values() for node in ast.walk(tree)) & UNSAFE_MODULES == set()


def dotted(node: ast.expr) -> str:
    """``torch.load`` of ``torch.load(path)``."""
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def keywords(node: ast.Call) -> dict[str, object]:
    """The literal keyword arguments of a call; others are None."""
    return {word.arg or "**": getattr(word.value, "value", None) for word in node.keywords}


def calls_of(*names: str) -> Iterator[tuple[str, ast.Call]]:
    """``module.line`` and call of every call whose dotted name ends so."""
    for module, path in MODULES.items():
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Call) and f".{dotted(node.func)}".endswith(tuple(f".{name}" for name in names)):
                yield f"{module}:{node.lineno}", node


def test_no_pickle_is_written_or_read():
    """numpy pickles arrays of objects, torch everything, yaml's other loaders make objects of any class."""
    assert [where for where, _ in calls_of("torch.load", "torch.save", "torch.package", "torch.jit.load")] == []
    assert [where for where, _ in calls_of("yaml.load", "yaml.unsafe_load", "yaml.full_load", "read_pickle")] == []
    arrays = [(where, keywords(call)) for where, call in calls_of("np.load", "np.save", "np.savez", "savez_compressed")]
    assert [where for where, given in arrays if given.get("allow_pickle") is not False] == []
    assert len(arrays) >= 4


def test_weights_are_safetensors_and_remote_code_is_decided_in_one_place():
    loads = [(where, keywords(call), dotted(call.func)) for where, call in calls_of("from_pretrained")]
    assert len(loads) >= 3
    assert [where for where, given, _ in loads if "trust_remote_code" not in given] == []
    models = [(where, given) for where, given, name in loads if name not in NO_WEIGHTS]
    assert [where for where, given in models if given.get("use_safetensors") is not True] == []
    assert {where.partition(":")[0] for where, *_ in loads} == {"model.loading"}
    fresh = [(where, keywords(call)) for where, call in calls_of("auto.from_config")]
    assert [where for where, given in fresh if given["trust_remote_code"] is not False] == []


NO_WEIGHTS = ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained")


def test_only_what_runs_after_the_checks_imports_a_heavy_library_on_loading():
    heavy = {"torch", "transformers", "datasets", "mlflow", "accelerate", "matplotlib", "rich"}
    loading = {module for module, path in MODULES.items() if library_imports(TREES[path].body) & heavy}
    after = {"scoring", "model.head", "tracking.mlflow_run", "tracking.plots", "charts"}
    training = {"cpu", "engine", "flops", "gradients", "guards", "out_of_memory", "progress", "reporter", "resumable"}
    assert loading <= after | {f"training.{part}" for part in training}


def test_no_error_is_swallowed_by_a_bare_except():
    for path, tree in TREES.items():
        bare = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]
        assert bare == [], path


def test_every_module_class_and_public_function_says_what_it_is():
    silent = []
    for path, tree in TREES.items():
        named = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        public = [node for node in named if not node.name.startswith("_")]
        documented = [node for node in [tree, *public] if ast.get_docstring(node)]
        if len(documented) < len(public) + 1:
            silent.append(module_of(path))
    assert silent == []
