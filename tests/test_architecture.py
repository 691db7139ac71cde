"""The agreed shape: who may import whom, docstrings, no print."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for package in ("worldmodel", "planners", "envs")
    for path in sorted((ROOT / package).rglob("*.py"))
}
NAMES = sorted(FILES)
OURS = {"worldmodel", "planners", "envs"}


def folder_of(name: str) -> str:
    """The row of the table that a file is in."""
    return "worldmodel/commands" if name.startswith("worldmodel/commands/") else name.split("/")[0]


def imports_of(name: str) -> set[str]:
    """Dotted names that a file imports, at any depth; `from a import b` counts as a and, where b is a module, as a.b."""
    found = set()
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import; write the package's name"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [dotted for dotted in whole if is_module(dotted)]
            found.update(modules or [node.module])
    return found


def is_module(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def tops(imports: set[str]) -> set[str]:
    return {dotted.split(".")[0] for dotted in imports}


@pytest.mark.parametrize("name", NAMES)
def test_imports_keep_to_the_table(name):
    imports, folder = imports_of(name), folder_of(name)
    if folder == "envs":
        assert not tops(imports) & {"torch", "worldmodel", "planners", "assets"}
    elif folder == "worldmodel":
        assert not tops(imports) & {"envs", "planners", "mujoco", "gymnasium", "mink", "cv2"}
        assert "openvino" not in tops(imports) or name == "worldmodel/compiled.py"
    elif folder == "planners":
        assert tops(imports) <= {"torch", "numpy", "worldmodel", "planners", *sys.stdlib_module_names}
        assert {dotted for dotted in imports if dotted.startswith("worldmodel")} <= {"worldmodel.interface"}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_imports_the_commands(name):
    if folder_of(name) != "worldmodel/commands" and name != "worldmodel/__main__.py":
        assert not [dotted for dotted in imports_of(name) if dotted.startswith("worldmodel.commands")]


def test_no_cycles_between_modules():
    graph = {}
    for name in NAMES:
        dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        graph[dotted] = {other for other in imports_of(name) if other != dotted and is_module(other)}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def public_things(tree: ast.Module):
    """The module, its public functions and classes, and their public methods."""
    yield "module", tree
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("name", NAMES)
def test_public_things_have_a_docstring_that_begins_with_a_sentence(name):
    if not FILES[name].body:
        return  # an empty __init__.py
    for thing, node in public_things(FILES[name]):
        if thing == "forward" or thing.endswith(".forward"):
            continue  # torch's name; the class says what it does
        first = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        assert first, f"{name}: {thing} has no docstring"
        sentence = " ".join(first.split())
        starts_well = sentence[0].isupper() or sentence[0] in "`(1234567890[" or not sentence[0].isascii()
        assert starts_well or " " in sentence, f"{name}: {thing}: {sentence}"
        assert any(mark in sentence for mark in ".:;!?"), f"{name}: {thing}: the first line is no sentence: {sentence}"


@pytest.mark.parametrize("name", NAMES)
def test_packages_do_not_print(name):
    for node in ast.walk(FILES[name]):
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print, f"{name}:{node.lineno}: print; use logging, a progress bar or the command's result"


@pytest.mark.parametrize("name", NAMES)
def test_randomness_is_an_argument(name):
    """Nothing draws from a global generator or seeds one; torch's may be lent to constructors and given back."""
    lends = any(word in ast.unparse(FILES[name]) for word in ("fork_rng", "get_rng_state"))
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("np.random.seed", "random.seed"), f"{name}:{node.lineno}: {called}"
            assert lends or called != "torch.manual_seed", f"{name}:{node.lineno}: {called} without giving it back"
            drawn = re.fullmatch(r"np\.random\.(\w+)", called)
            legacy = drawn and drawn[1] not in ("default_rng", "Generator", "PCG64", "Philox", "SeedSequence")
            assert not legacy, f"{name}:{node.lineno}: {called} draws from the global generator"


@pytest.mark.parametrize("name", NAMES)
def test_no_catch_all_arguments_in_public_functions(name):
    for thing, node in public_things(FILES[name]):
        if isinstance(node, ast.FunctionDef):
            typed = node.args.kwarg is None or node.args.kwarg.annotation is not None
            assert typed, f"{name}: {thing} swallows any keyword"
