"""Runs: names that depend on what decides a result and on nothing else; sealing that is all or nothing."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tinyflows import write_flow, write_notebook

from cxrkit import provenance, runs
from cxrkit.compare import fold_spread, lineage, markdown_table, n_folds_of
from cxrkit.provenance import RunCorrupt, check_params, code_hashes, content_hash, file_table, strip_comments
from cxrkit.runs import RunBusy, RunSealed, find_runs, ledger, load_run, plan_run, select, start_run

PARAMS = dict(comp="lesson", name="a", fold=0, inputs="20_folds", epochs=8, lr=1e-3, seed=0, workers=0)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("CXRKIT_LAUNCHER", "CXRKIT_RUN", "CXRKIT_HOME"): monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path):
    "A project with two flows and a sealed run of the first."
    write_flow(tmp_path, "20_folds", comp="lesson", name="folds", n_folds=3, seed=0)
    write_flow(tmp_path, "30_train", **PARAMS)
    make_folds(tmp_path)
    return tmp_path


def make_folds(root, **given):
    run = start_run("20_folds", "lesson", "folds", dict(n_folds=3, seed=0)|given, root=root)
    (run.path/"folds.csv").write_text(f"folds {given}")
    return run.seal()


def train(root, fold=0, name="a", score=.5, **given):
    run = start_run("30_train", "lesson", name, dict(epochs=8, lr=1e-3, seed=0)|given, "20_folds", fold, root)
    (run.path/"model.safetensors").write_text(f"{fold} {given}")
    run.write_scores({"ap": score})
    return run.seal()


def planned_id(root, **given):
    params = PARAMS|given
    own = {k: params.pop(k) for k in ("comp", "name", "fold", "inputs")}
    return plan_run("30_train", own["comp"], own["name"], params, own["inputs"], own["fold"], root).run_id


# names

@pytest.mark.parametrize("change", [dict(epochs=9), dict(lr=2e-3), dict(seed=1), dict(name="b"), dict(fold=1)], ids=str)
def test_what_decides_the_result_changes_the_name(project, change):
    assert planned_id(project, **change) != planned_id(project)


def test_speed_and_order_do_not_change_the_name(project):
    assert planned_id(project, workers=8) == planned_id(project)
    params = dict(seed=0, lr=.001, epochs=8)
    assert plan_run("30_train", "lesson", "a", params, "20_folds", 0, project).run_id == planned_id(project)
    assert plan_run("30_train", "lesson", "a", params, select("20_folds:folds", "lesson", project), 0, project).run_id == planned_id(project)


def test_the_name_is_the_same_in_another_folder(project, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    write_flow(other, "20_folds", comp="lesson", name="folds", n_folds=3, seed=0)
    write_flow(other, "30_train", **PARAMS)
    make_folds(other)
    assert planned_id(other) == planned_id(project)


def test_another_content_of_an_input_changes_the_name_and_a_repetition_does_not(project):
    before, folds = planned_id(project), find_runs("lesson", "20_folds", root=project)[0]
    for path in sorted(folds.folder.iterdir()): path.unlink()
    folds.folder.rmdir()
    time.sleep(.01)
    make_folds(project)
    assert planned_id(project) == before, "the same results sealed a second time are the same input"
    make_folds(project, seed=1)
    assert planned_id(project) != before


def test_a_changed_default_and_the_same_value_given_are_the_same_run(project):
    before = planned_id(project, epochs=12)
    write_flow(project, "30_train", **PARAMS|dict(epochs=12))
    assert planned_id(project, epochs=12) == before


def test_files_named_by_parameters_count_by_content(tmp_path):
    write_flow(tmp_path, "10_cache", comp="lesson", name="cache", root="")
    for place in ("data/lesson", "elsewhere"):
        (tmp_path/place).mkdir(parents=True)
        (tmp_path/place/"train.csv").write_text("id\n1\n")
    name = lambda root: plan_run("10_cache", "lesson", "cache", dict(root=root), root=tmp_path).run_id
    assert name("") == name("elsewhere") == name(str(tmp_path/"elsewhere"))
    before = name("elsewhere")
    (tmp_path/"elsewhere"/"train.csv").write_text("id\n2\n")
    assert name("elsewhere") != before
    with pytest.raises(FileNotFoundError, match="no data folder .*nowhere"): name("nowhere")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["x = 1", "y = '# no comment'", "def f(a):\n    return a", "z = '''\n# text\n\nmore'''", "w = f'{x:#x}'"]), min_size=1, max_size=6), st.data())
def test_comments_never_change_the_code_and_code_always_does(lines, data):
    source = "\n".join(lines)
    commented = "\n".join(data.draw(st.sampled_from([f"{line}   # a remark" if "\n" not in line else line, f"# a remark\n{line}", line])) for line in lines)
    assert strip_comments(commented) == strip_comments(source)
    assert strip_comments(source+"\nx = 2") != strip_comments(source)


def test_an_edit_invalidates_exactly_the_flows_that_reach_it(tmp_path):
    package = tmp_path/"package"
    package.mkdir()
    for module, source in {"a": "", "b": "from . import a", "c": "from .b import thing", "d": "import cxrkit.a", "e": "def f():\n    from cxrkit.b import g"}.items():
        (package/f"{module}.py").write_text(source+"\n")
    flows = {f: write_notebook(tmp_path/f"{f}.ipynb", "comp = 'lesson'", f"from cxrkit.{f} import x\n%matplotlib inline") for f in "abcde"}
    before = {f: code_hashes(n, "lesson", package) for f, n in flows.items()}
    (package/"b.py").write_text("from . import a\nchanged = True\n")
    after = {f: code_hashes(n, "lesson", package) for f, n in flows.items()}
    assert {f for f in flows if before[f] != after[f]} == {"b", "c", "e"}
    assert set(before["c"]) == {"notebook", "cxrkit.a", "cxrkit.b", "cxrkit.c"}


def test_the_real_flows_reach_what_they_use(project_folder):
    notebook = project_folder/"nbs"/"flow"/"31_train_det.ipynb"
    if not notebook.is_file(): pytest.skip("the flow is not there yet")
    reached = set(code_hashes(notebook, "toy"))
    assert {"cxrkit.detector", "cxrkit.train", "cxrkit.boxes", "cxrkit.comps.toy", "notebook"} <= reached
    assert not {"cxrkit.cli", "cxrkit.sweep", "cxrkit.submit", "cxrkit.package"} & reached


@pytest.mark.parametrize("given, message", [(dict(epochs=8.5), "expected int as in epochs = 8, got float 8.5"), (dict(epochs=True), "got bool True"),
                                            (dict(name=3), "expected str"), (dict(lr=float("nan")), "NaN"), (dict(epochs=[1]), "got list"), (dict(epoch=1), "did you mean 'epochs'")], ids=str)
def test_parameters_of_another_type_or_name_are_refused(given, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")): check_params(PARAMS, given, "30_train")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a:b", "a@1", "../a", ".hidden", "x.partial", 3])
def test_names_that_would_confuse_are_refused(project, name):
    with pytest.raises(ValueError, match="expected"): planned_id(project, name=name)


@pytest.mark.parametrize("fold, message", [(3, r"fold 3 is out of range: 20_folds/folds-\w+ has 3 folds, numbered 0 to 2"), (-1, "fold: expected"), (True, "got bool"), (1.0, "got float")])
def test_folds_that_do_not_exist_are_refused(project, fold, message):
    with pytest.raises(ValueError, match=message): planned_id(project, fold=fold)


# sealing

def test_sealed_folder_holds_its_manifest_and_nothing_temporary(project):
    run = start_run("30_train", "lesson", "a", dict(epochs=8, lr=1e-3, seed=0), "20_folds", 0, project)
    assert run.path.name.endswith(".partial") and not run.sealed
    for name in ("state.pt", "state_1.pt", ".half-written", "launch.log"): (run.path/name).write_text("x")
    (run.path/"deep").mkdir()
    (run.path/"deep"/"image.bin").write_text("y")
    run.write_scores({"ap": {"opacity": .25, "none": float("nan")}})
    run.seal()
    assert run.sealed and run.path == run.folder
    assert {p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file()} == {"params.json", "env.json", "scores.json", "notebook.ipynb", "manifest.json", "deep/image.bin"}
    manifest = json.loads((run.path/"manifest.json").read_text())
    assert set(manifest["files"]) == {"params.json", "env.json", "scores.json", "notebook.ipynb", "deep/image.bin"}
    assert load_run(run.path).scores == {"ap/none": None, "ap/opacity": .25}
    with pytest.raises(RunSealed, match="only once"): run.seal()


def test_environment_names_no_machine_and_no_user(project):
    text = (train(project).path/"env.json").read_text()
    assert not any(x in text for x in (str(Path.home())+"/", str(project), sys.prefix))
    assert set(json.loads(text)) == {"python", "platform", "gpu", "threads", "packages", "seconds", "started"}


def test_a_crash_before_the_rename_leaves_no_run(project, monkeypatch):
    def crash(*args): raise KeyboardInterrupt
    monkeypatch.setattr(runs.os, "rename", crash)
    with pytest.raises(KeyboardInterrupt): train(project)
    monkeypatch.undo()
    assert find_runs("lesson", "30_train", root=project) == []
    with pytest.raises(FileNotFoundError, match="no sealed run of lesson matches"): select("30_train:a", "lesson", project)
    assert train(project).sealed


def test_a_full_disk_leaves_no_run_and_no_half_manifest(project, monkeypatch):
    real = provenance.os.fsync
    def full(fd):
        if "manifest" in os.readlink(f"/proc/self/fd/{fd}"): raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)
    monkeypatch.setattr(provenance.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"): train(project)
    monkeypatch.undo()
    partial, = (project/"runs"/"lesson"/"30_train").iterdir()
    assert partial.name.endswith(".partial") and not list(partial.glob("*manifest*")) and find_runs("lesson", "30_train", root=project) == []


@pytest.mark.parametrize("harm, message", [
    (lambda p: (p/"model.safetensors").write_bytes(b"1 {\"}"), r"model.safetensors: expected \d+ bytes, got \d+|model.safetensors: expected sha256"),
    (lambda p: (p/"model.safetensors").write_text((p/"model.safetensors").read_text().replace("0", "9")), r"model.safetensors: expected sha256 \w{12}…, got \w{12}…"),
    (lambda p: (p/"scores.json").unlink(), r"scores.json: expected \d+ bytes, the file is missing"),
    (lambda p: (p/"better.bin").write_text("x"), "better.bin: not in the manifest, added after sealing"),
    (lambda p: (p/"manifest.json").write_text("{"), "manifest.json is not readable"),
    (lambda p: (p/"manifest.json").write_text("{\"format\": 9}"), "expected format 1, got 9")], ids=["size", "byte", "missing", "extra", "manifest", "format"])
def test_a_changed_run_is_refused_by_name(project, harm, message):
    run = train(project)
    harm(run.path)
    with pytest.raises(RunCorrupt, match=message): load_run(run.path)


def test_a_changed_input_is_refused_before_anything_runs(project):
    folds = find_runs("lesson", "20_folds", root=project)[0].path/"folds.csv"
    folds.write_text(folds.read_text().replace("f", "F"))
    with pytest.raises(RunCorrupt, match="folds.csv: expected sha256"): train(project)


def test_editors_leave_hidden_files_that_do_not_matter(project):
    run = train(project)
    (run.path/".ipynb_checkpoints").mkdir()
    (run.path/".ipynb_checkpoints"/"notebook-checkpoint.ipynb").write_text("{}")
    assert load_run(run.path).run_id == run.run_id


@pytest.mark.parametrize("scores", [dict(ap=float("inf")), dict(ap="high"), dict(ap=[1])], ids=str)
def test_scores_are_numbers(project, scores):
    run = start_run("30_train", "lesson", "a", dict(epochs=8, lr=1e-3, seed=0), "20_folds", 0, project)
    with pytest.raises(ValueError, match="score ap: expected a finite number"): run.write_scores(scores)


# one process a folder

HOLD = """
import sys, time
from cxrkit.runs import start_run
run = start_run("30_train", "lesson", "a", dict(epochs=8, lr=1e-3, seed=0), "20_folds", 0, sys.argv[1])
(run.path/"state.pt").write_text("half way")
(run.path/".model-123").write_text("half written")
print("started", flush=True)
time.sleep(60)
"""


def test_two_processes_never_share_a_folder_and_a_killed_one_leaves_no_lock(project):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(project)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "started\n"
    with pytest.raises(RunBusy, match=f"process {other.pid} is working in this folder"): train(project)
    other.send_signal(signal.SIGKILL)
    other.wait()
    run = start_run("30_train", "lesson", "a", dict(epochs=8, lr=1e-3, seed=0), "20_folds", 0, project)
    assert (run.path/"state.pt").read_text() == "half way", "a training finds its state"
    assert not (run.path/".model-123").exists(), "a half-written file is cleared away"


# finding

def test_select_takes_the_newest_of_each_fold(project):
    old = [train(project, f) for f in (0, 1, 2)]
    assert [r.run_id for r in select("30_train:a", "lesson", project)] == [r.run_id for r in old]
    assert select(f"30_train/{old[1].run_id}", "lesson", project) == [old[1]]
    assert select("30_train@2", "lesson", project) == [old[2]]


def test_select_refuses_mixtures_ambiguity_and_nonsense(project):
    train(project, 0), train(project, 1), train(project, 0, epochs=12)
    with pytest.raises(ValueError, match=r"not one experiment \(a-f0-\w+: epochs=12; a-f1-\w+: epochs=8\)"): select("30_train:a", "lesson", project)
    train(project, 0, name="b")
    with pytest.raises(ValueError, match="could mean 30_train:a, 30_train:b; add the name"): select("30_train", "lesson", project)
    with pytest.raises(FileNotFoundError, match="matches '30_train:bb'"): select("30_train:bb", "lesson", project)
    with pytest.raises(ValueError, match="selector '30_train:a:b'"): select("30_train:a:b", "lesson", project)


def test_select_refuses_folds_trained_on_different_folds_tables(project):
    train(project, 0)
    make_folds(project, seed=1)
    train(project, 1)
    with pytest.raises(ValueError, match="not one experiment .*input 20_folds="): select("30_train:a", "lesson", project)


def test_select_says_when_folds_were_made_by_different_code(project):
    train(project, 0)
    notebook = write_flow(project, "30_train", **PARAMS)
    edited = json.loads(notebook.read_text())
    edited["cells"].append(dict(edited["cells"][0], source="print('edited')", metadata={}))
    notebook.write_text(json.dumps(edited))
    train(project, 1)
    with pytest.warns(UserWarning, match="different versions of notebook"): select("30_train:a", "lesson", project)


# the ledger

def test_ledger_shows_what_differs_and_the_spread(project):
    for fold, score in enumerate((.5, .6, .7)): train(project, fold, score=score)
    train(project, 0, name="long", score=.4, epochs=20)
    table = ledger(project, flow="30_train")
    assert table.attrs == dict(params=["epochs"], scores=["ap"])
    assert table.columns.tolist() == ["comp", "flow", "name", "fold", "id", "epochs", "ap", "seconds", "sealed"]
    assert table.fold.tolist() == [0, 1, 2, 0] and table.epochs.tolist() == [8, 8, 8, 20]
    spread = fold_spread(project, flow="30_train")
    assert spread[["name", "folds", "runs", "ap"]].to_numpy().tolist() == [["a", "0 1 2 of 3", 3, "0.6000 ± 0.1000"], ["long", "0 of 3", 1, "0.4000"]]
    assert "0.6000 ± 0.1000" in markdown_table(spread)
    assert ledger(project, comp="nothing").empty and fold_spread(project, comp="nothing").empty


def test_lineage_and_ledger_survive_a_deleted_input(project):
    run = train(project)
    assert n_folds_of(run) == 3 and len(lineage(run)) == 2
    shutil.rmtree(project/"runs"/"lesson"/"20_folds")
    assert n_folds_of(run) is None and len(lineage(run)) == 1
    assert fold_spread(project, flow="30_train").folds.tolist() == ["0"]


def test_content_is_what_a_run_found_and_not_how_it_went(project):
    run = train(project)
    manifest = json.loads((run.path/"manifest.json").read_text())
    assert content_hash(file_table(run.path)) == manifest["content"]
    (run.path/"env.json").write_text("{}")
    assert content_hash(file_table(run.path)) == manifest["content"]
    (run.path/"scores.json").write_text("{}")
    assert content_hash(file_table(run.path)) != manifest["content"]
