"""Sweeps: refused before they start, run in real kernels, killed at any moment, and always the same result."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from tinyflows import sealed_results, write_flow, write_notebook, write_project

from cxrkit import sweep as sweep_module
from cxrkit.plan import SweepError, grid_names, plan_sweep, read_sweep
from cxrkit.runs import find_runs, load_run, start_run
from cxrkit.sweep import Launch, Task, advance, child_environment, explain_failure, machine_slots, preview, run_sweep, visible_gpus

PLAN = dict(name="tiny", comp="lesson", slots=2, runs=[dict(flow="10_make"), dict(flow="30_train", folds=[0, 1]), dict(flow="40_blend")])


@pytest.fixture(autouse=True)
def outside_a_launcher(monkeypatch):
    for name in ("CXRKIT_LAUNCHER", "CXRKIT_RUN", "CXRKIT_HOME", "CUDA_VISIBLE_DEVICES"): monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path)


def go(plan, root, **options):
    "Run a plan and return (tasks by key, what was printed)."
    text = StringIO()
    tasks = run_sweep(plan_sweep(plan, root), root, console=Console(file=text, width=200, force_terminal=False), **options)
    return {t.key: t for t in tasks}, text.getvalue()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "A finished sweep: (project, tasks, what was printed)."
    root = write_project(tmp_path_factory.mktemp("undisturbed"))
    return (root, *go(PLAN, root))


# before anything starts

def entry(**given): return dict(flow="30_train", folds=[0])|given


@pytest.mark.parametrize("entries, message", [
    ([entry(params=dict(epohcs=3))], "no parameter 'epohcs'; did you mean 'epochs'"),
    ([entry(params=dict(epochs="3"))], "expected int as in epochs = 4, got str '3'"),
    ([entry(params=dict(pause=True))], "expected float as in pause = 0.0, got bool True"),
    ([entry(grid=dict(epochs=3))], "grid.epochs: expected a list of values, got 3"),
    ([entry(grid=dict(epochs=[3, 3]))], "two points get the name 'train-epochs3'"),
    ([entry(grid=dict(seeds=[1, 2]))], "no parameter 'seeds'; did you mean 'seed'"),
    ([entry(flow="30_trian")], "no flow is called '30_trian': expected the notebook .*; did you mean '30_train'"),
    ([entry(fold=0)], "unknown key 'fold'; did you mean 'folds'"),
    ([entry(folds=None)], r"works on one fold \(its default is 0\); say which: `folds: \[0, 1\]`"),
    ([entry(folds=[0, 2])], "fold 2 is out of range: 10_make:make has 2 folds, numbered 0 to 1"),
    ([entry(folds=[-1])], r"folds: expected a list such as \[0, 1\], got \[-1\]"),
    ([entry(params=dict(fold=1), folds=None)], "a fold is not a parameter to vary"),
    ([dict(flow="10_make", folds=[0])], "has no parameter fold; leave `folds` out"),
    ([entry(params=dict(inputs="10_make:mkae"))], "'10_make:mkae' is neither in this sweep nor sealed; did you mean '10_make:make'"),
    ([entry(name="a b")], "name: expected letters, digits"),
    ([entry(), entry()], "30_train:train@0 is planned 2 times"),
    ([dict(flow="10_make", name="other"), entry()], "'10_make' could mean 10_make:make, 10_make:other; add the name"),
    (["30_train"], r"entry: expected keys flow, name, params, grid, folds; got '30_train'"),
])
def test_mistakes_are_refused_before_anything_starts(project, entries, message):
    with pytest.raises(SweepError, match=message): plan_sweep(dict(comp="lesson", runs=[dict(flow="10_make"), *entries]), project)
    assert not (project/"runs").exists()


def test_untagged_and_broken_notebooks_are_refused(project):
    flows = project/"nbs"/"flow"
    write_notebook(flows/"60_untagged.ipynb", "fold = 0", tagged=None)
    write_notebook(flows/"61_computed.ipynb", "epochs = 2*4")
    write_notebook(flows/"62_broken.ipynb", "epochs = 8", "x = = 1")
    (flows/"63_text.ipynb").write_text("not a notebook")
    with pytest.raises(SweepError) as refused: plan_sweep(dict(comp="lesson", runs=[dict(flow=f) for f in ("60_untagged", "61_computed", "62_broken", "63_text")]), project)
    for part in ("expected one code cell tagged 'parameters', got 0", "the parameters cell holds `epochs = 2 * 4`", "62_broken.ipynb: code cell 2 is not valid Python, line 1", "63_text.ipynb is not a readable notebook", "4 mistake(s), nothing was started"):
        assert part in str(refused.value)


@pytest.mark.parametrize("yaml, message", [
    ("comp: lesson\nruns: [", "is not a readable sweep"), ("comp: lesson\nruns: [{flow: 10_make, params: {seed: '${vars.sede}'}}]\nvars: {seed: 1}", "is not a readable sweep: .*sede"),
    ("runs: [{flow: 10_make}]", "`comp` is missing"), ("comp: lesson", "`runs` is missing or empty"), ("comp: lesson\nslot: 2", "unknown key 'slot'; did you mean 'slots'"),
    ("comp: lesson\nslots: 0\nruns: [{flow: 10_make}]", "slots: expected a whole number ≥ 1, got 0")])
def test_files_that_are_no_sweep_are_refused(project, yaml, message):
    (project/"s.yaml").write_text(yaml)
    with pytest.raises(SweepError, match=message): read_sweep(project/"s.yaml", root=project)


def test_yaml_variables_overrides_and_missing_file(project):
    (project/"s.yaml").write_text("comp: lesson\nvars: {seed: 3}\nruns:\n  - {flow: 10_make, params: {seed: '${vars.seed}'}}\n")
    assert read_sweep(project/"s.yaml", root=project).runs[0].params["seed"] == 3
    assert read_sweep(project/"s.yaml", ["vars.seed=4"], project).runs[0].params["seed"] == 4
    with pytest.raises(SweepError, match="override 'seed': expected key=value"): read_sweep(project/"s.yaml", ["seed"], project)
    with pytest.raises(FileNotFoundError, match="no sweep file .*; did you mean 's.yaml'"): read_sweep(project/"ss.yaml", root=project)


def test_order_follows_inputs_and_grids_get_names(project):
    runs = [dict(flow="40_blend", params=dict(inputs="10_make 30_train:train-epochs3")), dict(flow="30_train", folds=[0, 1], grid=dict(epochs=[2, 3])), dict(flow="10_make")]
    plan = plan_sweep(dict(comp="lesson", runs=runs), project)
    assert [p.key for p in plan.runs] == ["10_make:make", *(f"30_train:train-epochs{e}@{f}" for e in (2, 3) for f in (0, 1)), "40_blend:blend"]
    assert plan.runs[-1].after == ("10_make:make", "30_train:train-epochs3@0", "30_train:train-epochs3@1")
    assert list(grid_names("t_{lr}", dict(lr=[.1], text=["a b"]))) == ["t_0.1-texta_b"]


def test_a_sweep_uses_its_own_runs_and_not_newer_ones(undisturbed):
    root, tasks, _ = undisturbed
    own = {t.run.run_id for k, t in tasks.items() if k.startswith("30_train")}
    assert {i["run"].split("/")[1] for i in tasks["40_blend:blend"].run.built_on if i["run"].startswith("30_train")} == own
    later = start_run("10_make", "lesson", "make", dict(n_folds=2, seed=5), root=root).seal()
    try:
        assert find_runs("lesson", "10_make", root=root)[-1] == later
        assert [row["state"] for row in preview(plan_sweep(PLAN, root), root)] == ["sealed"]*4
    finally:
        for p in sorted(later.folder.iterdir()): p.unlink()
        later.folder.rmdir()


# slots

def test_slots_follow_gpus_or_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"] and machine_slots()[0] == 2 and machine_slots()[2] == ["3", "5"]
    assert machine_slots(3)[2] == ["3", "5", "3"] and machine_slots(1)[2] == ["3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == [] and machine_slots(2) == (2, 1, []) and machine_slots(2, 3) == (2, 3, [])


def test_each_run_gets_its_gpu_and_threads(project):
    run = plan_sweep(dict(comp="lesson", runs=[dict(flow="10_make")]), project)
    settled = sweep_module.settle(run.runs[0], {}, project)
    env = child_environment(settled, 3, "5")
    assert (env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"], env["CXRKIT_LAUNCHER"]) == ("5", "3", "3", "1")
    assert "CUDA_VISIBLE_DEVICES" not in child_environment(settled, 1, None)


# real runs

def test_a_sweep_ends_in_sealed_runs_with_their_executed_notebooks(undisturbed):
    root, tasks, text = undisturbed
    assert {t.state for t in tasks.values()} == {"sealed"} and "4 sealed" in text
    for task in tasks.values():
        run = load_run(task.run.folder)
        cells = json.loads((run.path/"notebook.ipynb").read_text())["cells"]
        assert any(c.get("execution_count") for c in cells) and any("injected-parameters" in c["metadata"].get("tags", []) for c in cells)
        assert not list(run.path.glob("state*")) and not list(run.path.glob(".l*")) and not (run.path/"launch.log").exists()
        assert str(root) not in (run.path/"notebook.ipynb").read_text() and str(Path.home())+"/" not in (run.path/"notebook.ipynb").read_text()
    assert (tasks["40_blend:blend"].run.folder/"final.csv").read_text().count("train-f") == 2


def test_sealed_runs_are_skipped_without_starting_anything(undisturbed, monkeypatch):
    root, _, _ = undisturbed
    def never(*args, **kwargs): raise AssertionError("a process was started")
    monkeypatch.setattr(sweep_module.subprocess, "Popen", never)
    before = sealed_results(root)
    tasks, text = go(PLAN, root)
    assert {t.state for t in tasks.values()} == {"skipped"} and "4 skipped" in text and sealed_results(root) == before


def test_a_run_in_the_launchers_environment_uses_this_python_one_thread_and_the_project_folder(project, monkeypatch):
    wrong = project/"kernels"/"python3"
    wrong.mkdir(parents=True)
    (wrong/"kernel.json").write_text(json.dumps(dict(argv=["/bin/false"], display_name="another Python", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(project))
    tasks, _ = go(dict(comp="lesson", runs=[dict(flow="50_ask")]), project)
    asked = json.loads((tasks["50_ask:ask"].run.path/"asked.json").read_text())
    assert asked == dict(python=sys.executable, threads="1", gpu=None, cwd=str(project))


def test_a_failing_cell_is_shown_others_go_on_and_dependants_do_not_start(project):
    runs = [dict(flow="10_make"), dict(flow="30_train", name="bad", folds=[0], params=dict(broken=True)), dict(flow="30_train", name="good", folds=[1]),
            dict(flow="40_blend", params=dict(inputs="10_make 30_train:bad"))]
    tasks, text = go(dict(comp="lesson", slots=2, runs=runs), project)
    assert {k: t.state for k, t in tasks.items()} == {"10_make:make": "sealed", "30_train:bad@0": "failed", "30_train:good@1": "sealed", "40_blend:blend": "not started"}
    for part in ("✗ 30_train:bad@0 failed", "if broken: raise RuntimeError", "RuntimeError: fold 0 is broken on purpose", ".partial/notebook.ipynb", "needs 30_train:bad@0"): assert part in text
    notebook = tasks["30_train:bad@0"].run.path/"notebook.ipynb"
    assert notebook.is_file() and "broken on purpose" in notebook.read_text()


def test_a_kernel_that_dies_and_a_flow_that_forgets_to_seal_are_failures(project):
    runs = [dict(flow="50_ask", name="die", params=dict(how="die")), dict(flow="50_ask", name="forget", params=dict(how="forget"))]
    tasks, text = go(dict(comp="lesson", slots=2, runs=runs), project)
    assert {t.state for t in tasks.values()} == {"failed"} and find_runs("lesson", root=project) == []
    assert "DeadKernelError" in text and "came to its end without run.seal()" in text


def test_explanation_of_a_killed_child(tmp_path):
    (tmp_path/"launch.log").write_text("Executing: 20%\rExecuting: 40%\nKilled")
    assert "killed by SIGKILL (by hand, or the machine is out of memory)" in explain_failure(tmp_path, -9)
    assert "Executing: 40%" in explain_failure(tmp_path, -9) and "exit code 3, no cell shows an error" in explain_failure(tmp_path, 3)


def test_a_damaged_sealed_run_is_not_built_on(project):
    write_flow(project, "10_plain", comp="lesson", name="plain")
    run = start_run("10_plain", "lesson", "plain", {}, root=project)
    (run.path/"table.csv").write_text("1")
    run.seal()
    (run.path/"table.csv").unlink()
    tasks, text = go(dict(comp="lesson", runs=[dict(flow="10_plain")]), project)
    assert tasks["10_plain:plain"].state == "failed" and "table.csv: expected 1 bytes, the file is missing" in text


def test_a_folder_that_another_process_works_in_is_left_alone(project):
    plan = plan_sweep(dict(comp="lesson", runs=[dict(flow="10_make")]), project)
    busy = start_run("10_make", "lesson", "make", dict(n_folds=2, seed=0), root=project)
    launch = Launch(project, {p.key: Task(p) for p in plan.runs}, 1, 1, [])
    task, = launch.tasks.values()
    assert advance(launch) and task.state == "waiting" and task.note == "another process works on it"
    busy.seal()
    assert not advance(launch) and task.state == "skipped"


# kills

SWEEP = """
name: killed
comp: lesson
slots: 2
runs:
  - {flow: 10_make}
  - {flow: 30_train, folds: [0, 1], params: {pause: 0.3}}
  - {flow: 40_blend}
"""


def launch_sweep(root):
    (root/"killed.yaml").write_text(SWEEP)
    env = {**os.environ, "CXRKIT_HOME": str(root)}
    return subprocess.Popen([sys.executable, "-c", "from cxrkit.cli import app; app()", "sweep", str(root/"killed.yaml")], cwd=root, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def family(process):
    try: return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess: return []


def gone(processes, seconds=20):
    "Whether all of these processes end by themselves."
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def disturb(root, dice):
    "Start the sweep and kill one of its processes after a random time; None if it had ended before, else what was killed."
    launcher, moment = launch_sweep(root), dice.uniform(.3, 8.)
    try:
        text, _ = launcher.communicate(timeout=moment)
        assert launcher.returncode == 0, text
        return None
    except subprocess.TimeoutExpired: pass
    children = family(launcher)
    victim = dice.choice([psutil.Process(launcher.pid), *children])
    try:
        kind = "launcher" if victim.pid == launcher.pid else "kernel" if "ipykernel" in " ".join(victim.cmdline()) else "child"
        victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess: kind = "nothing"
    launcher.communicate(timeout=240)
    assert gone(children), "an orphan survived"
    return kind


def check_kills(folder, times, seed):
    "Kill so often, in fresh projects whenever one is finished; every project ends with the bytes of an undisturbed one."
    dice, killed, quiet = random.Random(seed), [], write_project(folder/"quiet")
    assert launch_sweep(quiet).wait(timeout=240) == 0
    place = write_project(folder/"disturbed0")
    while len(killed) < times:
        kind = disturb(place, dice)
        if kind is None: place = write_project(folder/f"disturbed{len(killed)}")
        elif kind != "nothing": killed.append(kind)
    last = launch_sweep(place)
    text, _ = last.communicate(timeout=240)
    assert last.returncode == 0, text
    for place in folder.glob("disturbed*"):
        assert sealed_results(place) == sealed_results(quiet) and not list(place.rglob("*.partial"))
    return killed


def test_after_kills_the_same_command_gives_the_same_bytes(tmp_path):
    check_kills(tmp_path, 2, seed=1)


@pytest.mark.slow
def test_after_ten_kills_the_same_command_gives_the_same_bytes(tmp_path):
    killed = check_kills(tmp_path, 10, seed=2)
    assert len(killed) == 10 and len(set(killed)) > 1, killed


@pytest.mark.slow
def test_two_launchers_share_the_work(tmp_path):
    write_project(tmp_path)
    both = [launch_sweep(tmp_path) for _ in range(2)]
    texts = [p.communicate(timeout=240)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    assert len(find_runs("lesson", root=tmp_path)) == 4 and not list(tmp_path.rglob("*.partial"))


def test_an_edit_while_a_run_starts_gives_it_another_name(project):
    plan = plan_sweep(dict(comp="lesson", runs=[dict(flow="10_make")]), project)
    launch = Launch(project, {p.key: Task(p) for p in plan.runs}, 1, 1, [])
    task, = launch.tasks.values()
    advance(launch)
    assert task.state == "running"
    planned, notebook = task.run.run_id, project/"nbs"/"flow"/"10_make.ipynb"
    notebook.write_text(notebook.read_text().replace("(seed+1)*i % 7", "(seed+2)*i % 7"))
    while advance(launch): time.sleep(.1)
    assert task.state == "sealed" and task.run.run_id != planned and task.moves == 1
    assert [p.name for p in (project/"runs"/"lesson"/"10_make").iterdir()] == [task.run.run_id]


@pytest.mark.parametrize("file", sorted((Path(__file__).resolve().parents[1]/"sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_sweeps_of_the_project_are_valid(tmp_path, file):
    comp = next(line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("comp:"))
    (tmp_path/"data"/comp).mkdir(parents=True)
    plan = read_sweep(file, root=tmp_path)
    assert plan.comp == comp and len(plan.runs) > 3 and not (tmp_path/"runs").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_children_and_says_how_to_go_on(tmp_path):
    launcher = launch_sweep(write_project(tmp_path))
    until = time.monotonic()+60
    while len(children := family(launcher)) < 2 and launcher.poll() is None and time.monotonic() < until: time.sleep(.02) # a run and its kernel
    launcher.send_signal(signal.SIGINT)
    text, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 130 and "Stopped. What is sealed stays sealed" in text and gone(children)
    again = launch_sweep(tmp_path)
    text, _ = again.communicate(timeout=240)
    assert again.returncode == 0, text
