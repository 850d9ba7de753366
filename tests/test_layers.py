"""The architecture, asserted: imports point downwards, lean modules stay lean, notebooks keep their anatomy."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted(ROOT.glob("nbs/[0-9]*_*.ipynb"))
COMPS = sorted(ROOT.glob("nbs/comps/*.ipynb"))
FLOWS = sorted(ROOT.glob("nbs/flow/*.ipynb"))
BENCHES = sorted(ROOT.glob("nbs/bench/*.ipynb"))
HEAVY = {"torch", "torchvision", "timm", "effdet", "accelerate"}
PLOTTING_OR_CLI = {"matplotlib", "typer", "rich", "papermill", "omegaconf"}


def cells(notebook: Path, kind: str = "code") -> list[str]:
    return ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


def exported(notebook: Path) -> list[str]:
    return [s for s in cells(notebook) if re.search(r"^#\|\s*export", s, re.M)]


def module_name(notebook: Path) -> str:
    return re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cells(notebook)), re.M)[1]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    package = ["cxrkit"]+list(path.relative_to(ROOT/"cxrkit").parts[:-1])
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package)-node.level+1]) if node.level else ""
            module = ".".join(x for x in (base, node.module or "") if x)
            found.add(module)
            found |= {f"{module}.{a.name}" for a in node.names}
    return found


NUMBERS = {module_name(n): int(n.name[:2]) for n in LIBRARY}


def source(module: str) -> Path:
    return ROOT/"cxrkit"/(module.replace(".", "/")+".py")


@pytest.mark.parametrize("module", NUMBERS)
def test_modules_import_only_lower_numbers(module):
    own = NUMBERS[module]
    for name in imports(source(module)):
        other = name.removeprefix("cxrkit.")
        if name.startswith("cxrkit.") and other in NUMBERS and other != module:
            assert NUMBERS[other] < own, f"{module} ({own:02}) imports {other} ({NUMBERS[other]:02})"
        assert not name.startswith("cxrkit.comps.") or module == "cli", f"{module} imports a competition: {name}"


@pytest.mark.parametrize("module", [m for m, n in NUMBERS.items() if n < 20])
def test_tables_and_stages_below_20_never_import_torch(module):
    assert not {n.split(".")[0] for n in imports(source(module))} & HEAVY


@pytest.mark.parametrize("notebook", COMPS, ids=lambda p: p.stem)
def test_competitions_import_only_tables_boxes_spec(notebook):
    allowed = {m for m, n in NUMBERS.items() if n <= 2}
    for name in imports(source(module_name(notebook))):
        if name.startswith("cxrkit.") and not name.startswith("cxrkit.comps"):
            assert name.split(".")[1] in allowed, f"{notebook.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT/"cxrkit").rglob("*.py")), ids=lambda p: p.stem)
def test_exported_code_does_not_need_nbdev_or_fastcore(path):
    assert not {n.split(".")[0] for n in imports(path)} & {"nbdev", "fastcore"}


@pytest.mark.parametrize("module", [m for m, n in NUMBERS.items() if n < 30])
def test_inference_imports_stay_lean(module):
    assert not {n.split(".")[0] for n in imports(source(module), top_level_only=True)} & PLOTTING_OR_CLI


def test_import_cxrkit_is_light_and_silent():
    code = ("import socket, sys\n"
            "def refuse(*a, **k): raise AssertionError('network at import')\n"
            "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
            "import cxrkit\n"
            "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'pandas', 'matplotlib'}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_module_calls_home_when_imported():
    "Every exported module is imported in one process in which any connection or name look-up fails the test."
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted((ROOT/"cxrkit").rglob("*.py"))
               if p.stem not in ("__init__", "_modidx")]
    code = ("import socket, importlib, warnings\n"
            "def refuse(*a, **k): raise AssertionError('network at import')\n"
            "socket.socket.connect = refuse; socket.getaddrinfo = refuse; socket.create_connection = refuse\n"
            f"for m in {modules!r}: importlib.import_module(m)\n")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("notebook", LIBRARY+COMPS+FLOWS+BENCHES, ids=lambda p: p.stem)
def test_notebook_opens_with_title_and_one_line(notebook):
    first = cells(notebook, "markdown")[0]
    assert re.match(r"# .+\n+>\s.+", first), first[:80]


@pytest.mark.parametrize("notebook", LIBRARY+COMPS, ids=lambda p: p.stem)
def test_library_notebook_anatomy(notebook):
    own = exported(notebook)
    lengths = [len([line for line in s.splitlines() if line.strip() and not line.startswith("#|")]) for s in own]
    assert sum(lengths) <= 350, f"{sum(lengths)} exported lines"
    assert max(lengths) <= 40, f"an exported cell of {max(lengths)} lines"
    lessons = "\n".join(s for s in cells(notebook) if s not in own)
    assert re.search(r"\bassert\b|test_\w+\(", lessons), "exports code and shows no assertion"


def test_exported_cells_are_short():
    lengths = sorted(len([line for line in s.splitlines() if line.strip() and not line.startswith("#|")])
                     for n in LIBRARY+COMPS for s in exported(n))
    assert lengths[int(len(lengths)*.9)] <= 25


@pytest.mark.parametrize("notebook", FLOWS, ids=lambda p: p.stem)
def test_flow_notebook_anatomy(notebook):
    raw = json.loads(notebook.read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in raw) == 1, "exactly one cell is tagged parameters"
    assert not any(re.search(r"^\s*def |^\s*class ", s, re.M) for s in cells(notebook)), "a flow defines nothing; move it to the library"
    assert not exported(notebook)


@pytest.mark.parametrize("notebook", LIBRARY+COMPS+FLOWS+BENCHES, ids=lambda p: p.stem)
def test_notebook_is_clean(notebook):
    raw = json.loads(notebook.read_text())
    assert raw["metadata"]["kernelspec"]["name"] == "python3"
    assert not any(o.get("output_type") == "error" for c in raw["cells"] for o in c.get("outputs", [])), "a committed error output"
    text = notebook.read_text()
    assert not re.search(r"/(home|root|Users|work|tmp)/\w", text), "a path of some machine"
