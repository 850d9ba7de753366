"""The whole path with real papermill runs: toy DICOMs → cache → folds → trainings → blend → checked submission."""
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLES = ("cls_preds.parquet", "box_preds.parquet", "coverage.parquet", "scores.json", "folds.parquet", "submission.csv", "blend.json")


def make_project(folder: Path, patients: int = 12) -> Path:
    "A project folder with the flows of this clone and a small toy competition."
    (folder/"data").mkdir(parents=True)
    shutil.copytree(ROOT/"nbs"/"flow", folder/"nbs"/"flow")
    shutil.copy(ROOT/"settings.ini", folder)
    run_cxrkit(folder, "toy", str(folder/"data"/"toy"), "--patients", str(patients), "--seed", "0")
    return folder


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from cxrkit.cli import app; app()", *words]


def environment(home: Path) -> dict:
    return {**os.environ, "CXRKIT_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_cxrkit(home: Path, *words: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*words), cwd=home, env=environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]+done.stderr[-3000:]
    return done


def final_tables(home: Path) -> dict[str, str]:
    "Hash of every table that a sealed run of the sweep has written."
    return {str(p.relative_to(home)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted((home/"runs").rglob("*")) if p.name in TABLES and ".partial" not in str(p)}


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    home, started = make_project(tmp_path_factory.mktemp("project")), time.monotonic()
    run_cxrkit(home, "sweep", str(ROOT/"tests"/"tiny_sweep.yaml"))
    (home/"seconds.txt").write_text(str(time.monotonic()-started))
    return home


@pytest.mark.xdist_group("flows")
def test_every_run_is_sealed_with_its_tables(swept):
    runs = [json.loads(p.read_text()) for p in sorted((swept/"runs").rglob("manifest.json"))]
    assert sorted(r["flow"] for r in runs) == sorted(["10_cache", "20_folds", *["30_train_cls"]*4, *["31_train_det"]*2, "40_blend", "50_submit"])
    assert not list((swept/"runs").rglob("*.partial"))
    for run in runs:
        assert "notebook.ipynb" in run["files"] and "params.json" in run["files"] and "env.json" in run["files"]
        if run["flow"].startswith("3"): assert {"model.safetensors", "coverage.parquet", "scores.json", "log.csv"} <= set(run["files"])


@pytest.mark.xdist_group("flows")
def test_executed_notebooks_are_kept_with_their_outputs(swept):
    notebook = json.loads(next((swept/"runs").rglob("40_blend/*/notebook.ipynb")).read_text())
    assert any(c.get("outputs") for c in notebook["cells"])


@pytest.mark.xdist_group("flows")
def test_submission_is_valid_and_answers_every_id(swept):
    from cxrkit.submit import check_submission
    submission = next((swept/"runs").rglob("submission.csv"))
    sample = swept/"data"/"toy"/"sample_submission.csv"
    assert check_submission(submission, sample)["rows"] == len(pd.read_csv(sample))
    done = run_cxrkit(swept, "check", str(submission), str(sample))
    assert str(len(pd.read_csv(sample))) in done.stdout


@pytest.mark.xdist_group("flows")
def test_second_sweep_has_nothing_to_do(swept):
    before = {p: p.stat().st_mtime_ns for p in (swept/"runs").rglob("manifest.json")}
    started = time.monotonic()
    run_cxrkit(swept, "sweep", str(ROOT/"tests"/"tiny_sweep.yaml"))
    assert {p: p.stat().st_mtime_ns for p in (swept/"runs").rglob("manifest.json")} == before


@pytest.mark.xdist_group("flows")
def test_ledger_lists_the_runs(swept):
    text = run_cxrkit(swept, "runs", "--markdown").stdout
    assert "31_train_det" in text and "opacity" in text and "|" in text


@pytest.mark.xdist_group("flows")
def test_scores_are_those_of_the_blend(swept):
    text = run_cxrkit(swept, "scores", "toy", "--markdown").stdout
    table = pd.read_csv(next((swept/"runs"/"toy"/"40_blend").glob("*/scores.csv")))
    for row in table.itertuples(): assert f"| {row.label} | {row.value:.3f}".rstrip("0").rstrip(".") in text
    assert "mean" in text
    done = subprocess.run(command("scores", "rsna_pneumonia"), cwd=swept, env=environment(swept), capture_output=True, text=True)
    assert done.returncode == 2 and "no sealed 40_blend of rsna_pneumonia" in done.stdout+done.stderr


@pytest.mark.xdist_group("flows")
def test_plain_papermill_ends_sealed_and_refuses_a_misspelt_parameter(swept):
    papermill = [sys.executable, "-m", "papermill", "nbs/flow/20_folds.ipynb", str(swept/"out.ipynb"), "-p", "comp", "toy", "-p", "n_folds", "3"]
    done = subprocess.run([*papermill, "-p", "name", "three"], cwd=swept, env=environment(swept), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sealed = next((swept/"runs"/"toy"/"20_folds").glob("three-*"))
    assert pd.read_parquet(sealed/"folds.parquet").fold.nunique() == 3 and (sealed/"manifest.json").is_file()
    done = subprocess.run([*papermill, "-p", "nmae", "four"], cwd=swept, env=environment(swept), capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'name'" in done.stderr


def kill_and_finish(home: Path, kills: int, rng: random.Random, most: float) -> int:
    "Start the sweep, kill -9 its launcher or its whole process group at a random moment, `kills` times unless it ends before; then let it finish."
    killed = 0
    for _ in range(kills):
        sweep = subprocess.Popen(command("sweep", str(ROOT/"tests"/"tiny_sweep.yaml")), cwd=home, env=environment(home),
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try: sweep.wait(timeout=rng.uniform(2, most))
        except subprocess.TimeoutExpired:
            os.killpg(sweep.pid, signal.SIGKILL) if rng.random() < .5 else os.kill(sweep.pid, signal.SIGKILL)
            killed += 1
            sweep.wait()
    run_cxrkit(home, "sweep", str(ROOT/"tests"/"tiny_sweep.yaml"))
    return killed


@pytest.mark.slow
@pytest.mark.xdist_group("flows")
def test_ten_kills_leave_the_same_tables(swept, tmp_path):
    "kill -9 at ten random moments, sometimes of the launcher alone; the tables end byte-identical to the undisturbed sweep's."
    home = make_project(tmp_path/"killed")
    assert kill_and_finish(home, 10, random.Random(0), max(4, float((swept/"seconds.txt").read_text())/6)) == 10
    expected = {k: v for k, v in final_tables(swept).items() if "/three-" not in k}
    assert len(expected) >= 16
    assert final_tables(home) == expected
