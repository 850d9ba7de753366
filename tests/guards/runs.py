"""Guards of runs and sweeps: each mistake is planted as its author made it, and the refusal must name it."""
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from cxrkit.compare import code_drift, fold_spread, lineage
from cxrkit.plan import SweepError, plan_sweep
from cxrkit.runs import RunCorrupt, find_runs, load_run, select, start_run

TRAIN = dict(comp="lesson", name="det", fold=0, inputs="20_folds", epochs=8, seed=0, tta="identity hflip")
BEGIN = "from cxrkit.provenance import gather_params\nfrom cxrkit.runs import start_run"
START = 'run = start_run("31_train", comp, name, gather_params("31_train", globals()), inputs, fold)\nrun.write_scores({"fold": fold, "epochs": epochs})\nrun.seal()'


def plant_notebook(path: Path, *cells: str, tagged: bool = True) -> Path:
    cells = [dict(cell_type="code", id=f"cell{i}", source=textwrap.dedent(s).strip(), outputs=[], execution_count=None,
                  metadata=dict(tags=["parameters"]) if tagged and i == 0 else {}) for i, s in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")), nbformat=4, nbformat_minor=5)))
    return path


def assignments(params: dict) -> str: return "\n".join(f"{k} = {v!r}" for k, v in params.items())


@pytest.fixture
def planted_project(tmp_path, monkeypatch):
    "Folds for five, and a training flow."
    for name in ("CXRKIT_LAUNCHER", "CXRKIT_RUN", "CXRKIT_HOME"): monkeypatch.delenv(name, raising=False)
    flows = tmp_path/"nbs"/"flow"
    plant_notebook(flows/"20_folds.ipynb", assignments(dict(comp="lesson", name="folds", n_folds=5)))
    plant_notebook(flows/"31_train.ipynb", assignments(TRAIN), BEGIN, START)
    plant_notebook(flows/"50_submit.ipynb", assignments(dict(comp="lesson", name="submit", inputs="31_train:det", tta="identity hflip")))
    start_run("20_folds", "lesson", "folds", dict(n_folds=5), root=tmp_path).seal()
    return tmp_path


def plant_run(root, fold=0, ap=.25, name="det", **given):
    run = start_run("31_train", "lesson", name, {k: v for k, v in (TRAIN|given).items() if k not in ("comp", "name", "fold", "inputs")}, "20_folds", fold, root)
    (run.path/"model.safetensors").write_text(f"epoch 49 of fold {fold} {given}")
    run.write_scores({"ap": ap, "epoch": 49})
    return run.seal()


def papermill(root, *words):
    "Plain papermill, as anybody types it (without a grammar of web addresses that jsonschema would build for 1.7 s)."
    env = {**os.environ, "CXRKIT_HOME": str(root)}
    code = "import sys; sys.modules['rfc3987_syntax'] = None; from papermill.cli import papermill; papermill()"
    return subprocess.run([sys.executable, "-c", code, "nbs/flow/31_train.ipynb", "out.ipynb", "-k", "python3", *words], cwd=root, env=env, capture_output=True, text=True)


def test_guard_16_submission_lists_views_models_and_scores(planted_project):
    "Submitted without test-time augmentation, unnoticed: what is behind a submission is a table."
    trained = [plant_run(planted_project, fold, ap=.25+.01*fold) for fold in range(2)]
    submission = start_run("50_submit", "lesson", "submit", dict(tta="identity"), "31_train:det", root=planted_project)
    behind = lineage(submission).set_index("run")
    assert behind.views.iloc[0] == 1 and behind.views.iloc[1] == 2, "predicted with fewer views than it was scored with"
    for run in trained:
        row = behind.loc[f"31_train/{run.run_id}"]
        sha = json.loads((run.path/"manifest.json").read_text())["files"]["model.safetensors"]["sha256"]
        assert row.model == sha[:12] and f"ap {run.scores['ap']}" in row.scores


def test_guard_19_folds_left_at_the_default_are_refused(planted_project):
    "trn_fold stayed at [0]: a sweep must say its folds, and the table says of which folds a number is."
    with pytest.raises(SweepError, match=re.escape("31_train: this flow works on one fold (its default is 0); say which: `folds: [0, 1]`")):
        plan_sweep(dict(comp="lesson", runs=[dict(flow="31_train")]), planted_project)
    plant_run(planted_project, 0)
    assert fold_spread(planted_project, flow="31_train").folds.tolist() == ["0 of 5"]


def test_guard_19_score_of_folds_from_different_splits_is_refused(planted_project):
    "The score was computed over folds of two different splits."
    plant_run(planted_project, 0)
    plant_notebook(planted_project/"nbs"/"flow"/"20_folds.ipynb", assignments(dict(comp="lesson", name="folds", n_folds=5, seed=1)))
    start_run("20_folds", "lesson", "folds", dict(n_folds=5, seed=1), root=planted_project).seal()
    plant_run(planted_project, 1)
    with pytest.raises(ValueError, match="31_train:det: the newest runs of its folds are not one experiment .*input 20_folds=20_folds/folds-"): select("31_train:det", "lesson", planted_project)


def test_guard_22_seed_is_part_of_a_run_and_repeats_show_their_spread(planted_project):
    ".2559 against .2512 and .2495 without a fixed seed: a repeat is another run, and the spread stands beside the mean."
    runs = [plant_run(planted_project, 0, ap=ap, seed=seed) for seed, ap in enumerate((.2559, .2512, .2495))]
    assert len({r.run_id for r in runs}) == 3
    row = fold_spread(planted_project, flow="31_train").iloc[0]
    assert (row.runs, row.ap) == (3, "0.2522 ± 0.0033")


def test_guard_29_another_checkpoint_in_the_folder_is_refused(planted_project):
    "The file of epoch 9 was put where epoch 49 had been."
    run = plant_run(planted_project)
    sealed = (run.path/"model.safetensors").read_text()
    (run.path/"model.safetensors").write_text(sealed.replace("epoch 49", "epoch 09"))
    with pytest.raises(RunCorrupt, match=r"model.safetensors: expected sha256 \w{12}…, got \w{12}….*sealed runs are never edited"): load_run(run.path)
    with pytest.raises(RunCorrupt, match="model.safetensors: expected sha256"): start_run("50_submit", "lesson", "submit", dict(tta="identity"), "31_train:det", root=planted_project)
    assert run.scores["epoch"] == 49


def test_guard_37_code_that_differs_from_the_training_code_is_named(planted_project):
    "The model class at inference was not the one that was trained."
    run = plant_run(planted_project)
    assert code_drift(run, planted_project) == {}
    plant_notebook(planted_project/"nbs"/"flow"/"31_train.ipynb", assignments(TRAIN), BEGIN, START+"\nmodel = 'another class'")
    assert code_drift(run, planted_project) == {"notebook": "changed"}
    plant_run(planted_project, 1)
    with pytest.warns(UserWarning, match="31_train:det: its folds were made by different versions of notebook"): select("31_train:det", "lesson", planted_project)


def test_guard_misspelt_parameter_stops_plain_papermill_and_the_launcher(planted_project):
    "papermill -p epohcs 30 only warns and trains with the default, exit code 0."
    done = papermill(planted_project, "-p", "epohcs", "30")
    assert done.returncode == 1 and "31_train has no parameter 'epohcs'; did you mean 'epochs'?" in done.stderr
    assert find_runs("lesson", "31_train", root=planted_project) == []
    with pytest.raises(SweepError, match="31_train has no parameter 'epohcs'; did you mean 'epochs'?"):
        plan_sweep(dict(comp="lesson", runs=[dict(flow="31_train", folds=[0], params=dict(epohcs=30))]), planted_project)


def test_guard_stripped_tag_stops_plain_papermill_and_the_launcher(planted_project):
    "nbdev_clean stripped the tag: papermill given fold=3 runs fold 0 and exits 0."
    plant_notebook(planted_project/"nbs"/"flow"/"31_train.ipynb", assignments(TRAIN), BEGIN, START, tagged=False)
    done = papermill(planted_project, "-p", "fold", "3")
    message = "31_train.ipynb: expected one code cell tagged 'parameters', got 0; without the tag papermill runs the defaults whatever it is given"
    assert done.returncode == 1 and message in done.stderr
    with pytest.raises(SweepError, match=re.escape(message)): plan_sweep(dict(comp="lesson", runs=[dict(flow="31_train", folds=[3])]), planted_project)


def test_guard_plain_papermill_ends_sealed_and_is_not_repeated(planted_project):
    "A run by hand is worth as much as one of a sweep; the second time it stops before it computes."
    done = papermill(planted_project, "-p", "fold", "3")
    assert done.returncode == 0, done.stderr
    run, = find_runs("lesson", "31_train", root=planted_project)
    assert load_run(run.path).scores == {"epochs": 8, "fold": 3} and run.fold == 3
    assert pd.notna(json.loads((run.path/"env.json").read_text())["seconds"])
    again = papermill(planted_project, "-p", "fold", "3")
    assert again.returncode == 1 and "RunSealed: already sealed: " in again.stderr
