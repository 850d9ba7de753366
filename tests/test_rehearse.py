"""The rehearsal: its environment, its sandbox, its verdicts; and one rehearsal from trained runs to the report (slow)."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cxrkit.hidden import DAMAGE, make_test_set, mutate, new_sample, plan_images
from cxrkit.rehearse import Outcome, Packages, Scene, Stage, all_scenes, check_late, check_result, extrapolate, last_error, quick_scenes, tell_scene, with_clock, write_report
from cxrkit.sandbox import Sandbox, namespace_command, run_in
from cxrkit.spec import load_spec
from tinysubmit import write_competition, write_radiograph

ROOT = Path(__file__).resolve().parents[1]
SPEC = load_spec("siim_covid19")


# ---- test sets

@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=2000, max_size=5000), st.integers(0, 2**32-1))
def test_mutations_are_repeatable_and_never_fail(data, seed):
    first, again = (mutate(data, np.random.default_rng(seed)) for _ in range(2))
    assert first == again and len(first) <= len(data)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 5))
def test_hidden_sets_have_the_asked_size_and_new_unique_ids(sizes, n, seed):
    images = pd.DataFrame([(f"i{s}_{k}", f"s{s}", "x.dcm") for s, m in enumerate(sizes) for k in range(m)], columns=["image_id", "study_id", "path"])
    plan = plan_images(images, n, seed)
    assert len(plan) == n and plan.image_id.is_unique and not set(plan.image_id) & set(images.image_id)
    assert (plan.groupby("study_id").old_study.nunique() == 1).all()
    sample = pd.DataFrame({"id": [*(f"{s}_study" for s in images.study_id.unique()), *(f"{i}_image" for i in images.image_id)], "PredictionString": ""})
    made = new_sample(sample, SPEC, plan, grow=2)
    assert made["id"].is_unique and set(made["id"]) >= {f"{i}_image" for i in plan.image_id} | {f"{s}_study" for s in plan.study_id}
    assert len(made) == n+plan.study_id.nunique()+4


def test_the_public_files_are_never_touched(tmp_path):
    import hashlib
    root = write_competition(tmp_path/"data")
    before = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.dcm")}
    make_test_set(root, SPEC, tmp_path/"hidden", 30, 1, tuple(DAMAGE)+("mutated",)*10, grow=3)
    shutil.rmtree(tmp_path/"hidden")
    assert {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.dcm")} == before


def test_flat_competitions_keep_their_layout(tmp_path):
    spec = load_spec("rsna_pneumonia")
    for k in range(3): write_radiograph(tmp_path/"data"/"stage_2_test_images"/f"p{k}.dcm", k)
    pd.DataFrame({"patientId": ["p0", "p1", "p2"], "PredictionString": ""}).to_csv(tmp_path/"data"/"stage_2_sample_submission.csv", index=False)
    made = make_test_set(tmp_path/"data", spec, tmp_path/"hidden", 7, 1, ("cut",))
    assert len(list((tmp_path/"hidden"/"stage_2_test_images").glob("*.dcm"))) == 7 and made.rows == 7 and len(made.cannot) == 1


# ---- sandbox

needs_namespaces = pytest.mark.skipif(not namespace_command(), reason="namespaces are not permitted here")


def inside(tmp_path, code, inputs=None, **kw):
    return run_in(Sandbox(inputs or {}, str(tmp_path/"working"), unshare=namespace_command(), **kw), [sys.executable, "-c", code], 120)


@needs_namespaces
def test_children_are_in_the_sandbox_too(tmp_path):
    code = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', \"import socket; socket.create_connection(('192.0.2.1', 80), 2)\"], capture_output=True, text=True).stderr)"
    outcome = inside(tmp_path, code)
    assert outcome.code == 0 and "unreachable" in outcome.text


@needs_namespaces
def test_lent_packages_and_inputs_cannot_be_written(tmp_path):
    for name in ("data", "lent"): (tmp_path/name).mkdir()
    (tmp_path/"data"/"a").write_text("a")
    code = f"""
for path in ('/kaggle/input/x/b', '/kaggle/input/x/a', {str(tmp_path/'lent'/'c')!r}):
    try: open(path, 'w'); print('written', path)
    except OSError as e: print(e.strerror)
open('/kaggle/working/d', 'w')
"""
    outcome = inside(tmp_path, code, {"x": str(tmp_path/"data")}, frozen=(str(tmp_path/"lent"),))
    assert outcome.text.splitlines() == ["Read-only file system"]*3 and (tmp_path/"working"/"d").exists()
    assert not Path("/kaggle").exists()


@needs_namespaces
def test_the_environment_of_the_caller_stays_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy")
    outcome = inside(tmp_path, "import os; print(sorted(os.environ), os.path.expanduser('~'))", env={"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    assert "KAGGLE_KEY" not in outcome.text and "PROXY" not in outcome.text and "KAGGLE_KERNEL_RUN_TYPE" in outcome.text and os.path.expanduser("~") not in outcome.text.split("]")[1]


# ---- verdicts

@pytest.fixture
def judged(tmp_path):
    "Judge a made-up run."
    stage = Stage(SPEC, tmp_path, Packages({}, {}, (), frozenset()), "", "", tmp_path, tmp_path, ())
    sample = pd.DataFrame({"id": ["s_study", "a_image", "b_image"], "PredictionString": ["negative 1 0 0 1 1", "none 1 0 0 1 1", "none 1 0 0 1 1"]})
    from cxrkit.hidden import TestSet

    def judge(facts=None, failed=(), submission=sample, code=0, text="", must="ab", cannot="", missing=0, **kw):
        if submission is not None: submission.to_csv(tmp_path/"submission.csv", index=False)
        if facts is not None: (tmp_path/"submit.json").write_text(json.dumps({"images": 2, "predicted": 2-len(failed), "unreadable": len(failed), "too_late": 0, "levels": {"everything": 2}, "rows": {"image": {"filled": 2, "default": 0}}} | facts))
        pd.DataFrame({"image_id": list(failed), "file": "x", "reason": "y"}).to_csv(tmp_path/"failures.csv", index=False)
        tests = TestSet(tmp_path, 2, 3, frozenset(must), frozenset(cannot), missing)
        return {c: ok for c, ok, _ in check_result(Scene("x", "old", **kw), stage, tests, Outcome(code, 1., 1, text, "kernel"), sample, tmp_path)}
    return judge


def test_a_good_run_passes(judged): assert all(judged({}).values())
def test_a_notebook_that_raised_fails(judged): assert judged({}, code=1) == {"runs to its end": False}
def test_no_file_fails(judged): assert judged({}, submission=None) == {"valid submission": False}
def test_a_row_too_few_fails(judged): assert judged({}, submission=pd.DataFrame({"id": ["s_study"], "PredictionString": ["negative 1 0 0 1 1"]})) == {"valid submission": False}
def test_a_good_file_that_kept_its_default_fails(judged): assert not judged({}, failed="a")["every good file predicted"]
def test_images_that_were_too_late_fail_where_there_was_time(judged): assert not judged({"too_late": 1, "predicted": 1})["every good file predicted"]
def test_a_broken_file_that_was_predicted_fails(judged): assert not judged({}, must="a", cannot="b")["every broken file kept its default"]
def test_a_broken_file_that_kept_its_default_passes(judged): assert all(judged({}, failed="b", must="a", cannot="b").values())
def test_ghosts_have_to_keep_their_default(judged): assert not judged({}, missing=2)["ids without a file kept their default"]


def test_too_little_time_has_to_cost_something(judged):
    late = dict(short=.4, params={"hours": .01})
    assert judged({"too_late": 0, "total_seconds": 30.}, **late) == {"valid submission": True, "gave something up": False, "ended in time": True}
    assert judged({"too_late": 1, "total_seconds": 40.}, **late) == {"valid submission": True, "gave something up": True, "ended in time": False}


def test_the_error_of_a_notebook_is_found_in_papermills_words():
    text = "Executing\nTraceback (most recent call last):\n  File x\npapermill.exceptions.PapermillExecutionError: \n----\nNotReady: no wheels dataset is attached (attached are: none)\n\n"
    assert last_error(text).startswith("NotReady: no wheels dataset")
    assert last_error("") == "no output"


def test_scenes_cover_both_layouts_every_kind_of_file_and_every_dataset():
    scenes = all_scenes(20)
    assert {s.layout for s in scenes} == {"old", "new"} and {s.without for s in scenes} == {"", "code", "wheels", "models"}
    assert {d for s in scenes for d in s.damage} == set(DAMAGE) and any(s.grow for s in scenes) and any(s.n == 1 for s in scenes) and any(not s.rerun for s in scenes)
    assert [s.short > 0 for s in scenes].index(True) > 2, "a limit needs a measurement before it"
    assert len({s.name for s in scenes}) == len(scenes) and len(quick_scenes(20)) == 2


def test_a_failed_scene_is_told_with_its_reason(tmp_path):
    row = dict(scene="one image", layout="old", images=1, predicted=0, seconds=3., rate=None, memory_gb=.5, output_mb=0., network="kernel", passed=False, checks=[("runs to its end", False, "exit code 1: KeyError: 'x'")])
    assert "FAIL" in tell_scene(row) and "KeyError: 'x'" in tell_scene(row)
    text = write_report(tmp_path, {"competition": "toy"}, [row], pd.DataFrame(columns=["what", "image", "here"]), ()).read_text()
    assert "| one image |" in text and "**NO**" in text and "KeyError" in text


# ---- all of it

@pytest.mark.slow
@pytest.mark.xdist_group("flows")
def test_rehearsal_of_a_trained_blend(tmp_path):
    "Toy, tiny sweep, `cxrkit rehearse --quick`: exit 0 and a report; with a model missing from the package, exit 1."
    from test_flows import make_project, run_cxrkit
    home = make_project(tmp_path/"project")
    for name in ("setup.py", "cxrkit", "kaggle_datasets"):
        source = ROOT/name
        shutil.copytree(source, home/name, ignore=shutil.ignore_patterns("__pycache__", "*.whl", "manifest.json", "fingerprint.json")) if source.is_dir() else shutil.copy(source, home/name)
    run_cxrkit(home, "sweep", str(ROOT/"tests"/"tiny_sweep.yaml"))
    done = subprocess.run([sys.executable, "-c", "import typer; from cxrkit.cli_rehearse import register; app = typer.Typer(); register(app); app.callback()(lambda: None); app()", "rehearse", "toy", "--quick"],
                          cwd=home, env={**os.environ, "CXRKIT_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]+done.stderr[-3000:]
    assert "All 3 passed" in done.stdout and len(list((home/"runs"/"rehearsal").glob("*/report.md"))) == 1
