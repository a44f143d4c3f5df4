"""How the house is built, and what its code and configs may not hold; who may import whom is in pyproject.toml."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mlmx"

MAX_FILE_LINES = 400
MOST_ENTRIES = 12  # at the top of the package

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module_of(path: Path) -> str:
    """``src/mlmx/data/texts.py`` → ``data.texts``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Modules of mlmx that a file imports anywhere in it, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "mlmx":
                    yield name.name.removeprefix("mlmx").removeprefix(".") or "__init__"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module == "mlmx":
                yield from (name.name if name.name in MODULES else "__init__" for name in node.names)
            elif module.startswith("mlmx."):
                yield module.removeprefix("mlmx.")


def test_the_house_has_few_rooms_and_no_package_holds_code():
    own = ("__init__.py", "__main__.py", "py.typed", "__pycache__")
    assert len([path for path in PACKAGE.iterdir() if path.name not in own]) <= MOST_ENTRIES
    faces = [path for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE]
    assert len(faces) >= MOST_ENTRIES - 1
    assert [path for path in faces if path.read_text(encoding="utf-8")] == []


def test_plugins_of_hydra_see_the_search_alone():
    plugins = sorted((PACKAGE.parent / "hydra_plugins").rglob("*.py"))
    imported = {name for path in plugins for name in imports_of(ast.parse(path.read_text(encoding="utf-8")))}
    assert imported == {"sweeps.search"}


def test_no_module_is_a_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base", "core", "lib"}
    assert drawers & {part for module in MODULES for part in module.split(".")} == set()


def test_files_are_short_enough_to_be_read():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


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


CODE_FROM_TEXT = ("eval", "exec", "compile", "__import__", "instantiate", "get_class")
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def called(node: ast.Call) -> str:
    """``eval`` of ``eval(x)`` and ``instantiate`` of ``utils.instantiate(x)``, but nothing of ``model.eval()``."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    name = getattr(node.func, "attr", "")
    return name if name in ("instantiate", "get_class") else ""


def test_text_never_becomes_code():
    calls = [(m, node) for m, path in MODULES.items() for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert [module for module, node in calls if called(node) in CODE_FROM_TEXT] == []
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
    assert {where.partition(":")[0] for where, *_ in loads} == {"models.loading"}
    fresh = [(where, keywords(call)) for where, call in calls_of("auto.from_config")]
    assert [where for where, given in fresh if given["trust_remote_code"] is not False] == []


NO_WEIGHTS = ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained")


def test_only_what_runs_after_the_checks_imports_a_heavy_library_on_loading():
    heavy = {"torch", "transformers", "datasets", "mlflow", "accelerate", "matplotlib", "rich"}
    loading = {module for module, path in MODULES.items() if library_imports(TREES[path].body) & heavy}
    after = {"models.head", "tracking.logged_models", "tracking.mlflow_run", "comparison.plots", "evaluation.scoring"}
    kernels = {"cpu", "flops"}
    training = {"arithmetic", "callbacks", "failures", "state", "trainer"}
    assert loading <= after | {f"kernels.{part}" for part in kernels} | {f"training.{part}" for part in training}


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
        if path.stat().st_size and len(documented) < len(public) + 1:
            silent.append(module_of(path))
    assert silent == []
