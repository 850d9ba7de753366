"""A project of small flows for tests: numbers instead of radiographs, but real notebooks, kernels and sealed runs."""
import json
import textwrap
from pathlib import Path

BEGIN = "from cxrkit.provenance import gather_params, write_json\nfrom cxrkit.runs import start_run"

MAKE = ['''
    comp = "lesson"
    name = "make"
    n_folds = 2
    seed = 0
    ''', BEGIN, '''
    run = start_run("10_make", comp, name, gather_params("10_make", globals()))
    (run.path/"numbers.csv").write_text("".join(f"{(seed+1)*i % 7}\\n" for i in range(20)))
    run.seal()
    ''']

TRAIN = ['''
    comp = "lesson"
    name = "train"
    fold = 0
    inputs = "10_make"
    epochs = 4
    seed = 0
    pause = 0.0     # seconds an epoch
    broken = False
    workers = 0
    ''', BEGIN+"\nimport json, time", '''
    run = start_run("30_train", comp, name, gather_params("30_train", globals()), inputs, fold)
    numbers = [int(x) for x in (run.input("10_make").path/"numbers.csv").read_text().split()][fold::2]
    ''', '''
    state = json.loads((run.path/"state.json").read_text()) if (run.path/"state.json").exists() else dict(epoch=0, weight=seed, log="epoch,loss,seconds\\n")
    began = time.time()
    while state["epoch"] < epochs:
        weight = (state["weight"]*31+sum(numbers)+state["epoch"]) % 1009
        state = dict(epoch=state["epoch"]+1, weight=weight, log=state["log"]+f"{state['epoch']},{weight},{time.time()-began:.3f}\\n")
        (run.path/"log.csv").write_text(state["log"])
        write_json(run.path/"state.json", state)
        time.sleep(pause)
    ''', '''
    if broken: raise RuntimeError(f"fold {fold} is broken on purpose")
    (run.path/"preds.csv").write_text(f"run_id,prob\\n{run.run_id},{state['weight']/1009}\\n")
    run.write_scores({"accuracy": state["weight"]/1009})
    run.seal()
    ''']

BLEND = ['''
    comp = "lesson"
    name = "blend"
    inputs = "10_make 30_train"
    ''', BEGIN, '''
    run = start_run("40_blend", comp, name, gather_params("40_blend", globals()), inputs)
    folds = [r for r in run.inputs if r.flow == "30_train"]
    (run.path/"final.csv").write_text("".join((r.path/"preds.csv").read_text() for r in folds))
    run.write_scores({"mean": sum(r.scores["accuracy"] for r in folds)/len(folds)})
    run.seal()
    ''']

ASK = ['''
    comp = "lesson"
    name = "ask"
    how = "environment"
    ''', BEGIN+"\nimport os, signal, sys", '''
    run = start_run("50_ask", comp, name, gather_params("50_ask", globals()))
    if how == "die": os.kill(os.getpid(), signal.SIGKILL)
    write_json(run.path/"asked.json", dict(python=sys.executable, threads=os.environ.get("OMP_NUM_THREADS"), gpu=os.environ.get("CUDA_VISIBLE_DEVICES"), cwd=os.getcwd()))
    if how != "forget": run.seal()
    ''']


def write_notebook(path: Path, *cells: str, tagged: int | None = 0) -> Path:
    "A notebook of code cells, of which one is tagged as the parameters cell."
    cells = [dict(cell_type="code", id=f"cell{i}", source=textwrap.dedent(s).strip(), outputs=[], execution_count=None,
                  metadata=dict(tags=["parameters"]) if i == tagged else {}) for i, s in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")), nbformat=4, nbformat_minor=5)))
    return path


def write_flow(project: Path, flow: str, **params) -> Path:
    "A flow with nothing but parameters."
    return write_notebook(project/"nbs"/"flow"/f"{flow}.ipynb", "\n".join(f"{k} = {v!r}" for k, v in params.items()))


def write_project(root: Path) -> Path:
    "All flows of this file, in a project folder."
    for flow, cells in {"10_make": MAKE, "30_train": TRAIN, "40_blend": BLEND, "50_ask": ASK}.items():
        write_notebook(root/"nbs"/"flow"/f"{flow}.ipynb", *cells)
    return root


def sealed_results(root: Path) -> dict[str, bytes]:
    "Every file that sealed runs hold, except those that tell how a run went: what must not depend on kills."
    how = {"manifest.json", "notebook.ipynb", "env.json", "log.csv"}
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted((root/"runs").rglob("*"))
            if p.is_file() and p.name not in how and ".partial" not in p.as_posix()}
