"""The command line: help that teaches, errors that are a sentence, exit codes that scripts can use."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tinyflows import write_flow, write_project

from cxrkit.runs import start_run

COMMANDS = ("toy", "cache", "folds", "sweep", "runs", "check")


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path)


@pytest.fixture
def cxrkit(project):
    "Type a command in the project's folder: (exit code, output)."
    def type_in(*words):
        env = {**os.environ, "CXRKIT_HOME": str(project), "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
        for name in ("FORCE_COLOR", "CXRKIT_LAUNCHER", "CXRKIT_RUN"): env.pop(name, None)
        done = subprocess.run([sys.executable, "-c", "from cxrkit.cli import app; app(prog_name='cxrkit')", *map(str, words)], cwd=project, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout+done.stderr
    return type_in


def seal(root, name, fold, score, **given):
    run = start_run("30_train", "lesson", name, dict(epochs=4, seed=0, pause=0., broken=False)|given, "10_make", fold, root)
    run.write_scores({"accuracy": score})
    return run.seal()


@pytest.fixture
def sealed(project, monkeypatch):
    for variable in ("CXRKIT_LAUNCHER", "CXRKIT_RUN", "CXRKIT_HOME"): monkeypatch.delenv(variable, raising=False)
    start_run("10_make", "lesson", "make", dict(n_folds=2, seed=0), root=project).seal()
    for fold, score in enumerate((.25, .75)): seal(project, "short", fold, score)
    seal(project, "long", 0, .5, epochs=8)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(cxrkit, command):
    code, text = cxrkit(command, "--help")
    assert code == 0 and f"$ cxrkit {command}" in text and "Default: ." not in text


def test_help_without_a_command_lists_all(cxrkit):
    code, text = cxrkit("--help")
    assert code == 0 and all(f" {c} " in text for c in COMMANDS)
    assert "Missing command" in cxrkit("nonsense", "x")[1] or cxrkit("nonsense")[0] == 2


def test_importing_the_command_line_is_light():
    heavy = {"torch", "pandas", "numpy", "papermill", "matplotlib", "omegaconf", "pydicom", "rich"}
    done = subprocess.run([sys.executable, "-c", f"import sys, cxrkit.cli; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout+done.stderr


@pytest.mark.parametrize("words, message", [
    (("sweep", "nowhere.yaml"), "FileNotFoundError: no sweep file nowhere.yaml"),
    (("cache", "toyy"), "ValueError: no competition is called 'toyy'; did you mean 'toy'?"),
    (("cache", "toy"), "no data folder"),
    (("folds", "toy", "--root", "elsewhere"), "no data folder"),
    (("check", "missing.csv", "missing.csv"), "FileNotFoundError: no file missing.csv"),
    (("sweep", "bad.yaml"), "30_train has no parameter 'epohcs'; did you mean 'epochs'?")], ids=str)
def test_mistakes_are_one_sentence_and_exit_code_2(cxrkit, project, words, message):
    (project/"bad.yaml").write_text("comp: lesson\nruns: [{flow: 10_make}, {flow: 30_train, folds: [0], params: {epohcs: 3}}]")
    code, text = cxrkit(*words)
    assert code == 2 and message in text and "Traceback" not in text


def test_debug_shows_the_traceback(cxrkit):
    code, text = cxrkit("--debug", "cache", "toyy")
    assert code not in (0, 2) and "Traceback" in text and "load_spec" in text


def test_sweep_dry_run_sweep_and_failure(cxrkit, project):
    (project/"s.yaml").write_text("comp: lesson\nvars: {broken: false}\nruns: [{flow: 10_make}, {flow: 30_train, folds: [0], params: {broken: '${vars.broken}'}}]")
    code, text = cxrkit("sweep", "s.yaml", "--dry-run")
    assert code == 0 and "to run" in text and "waits" in text and not (project/"runs").exists()
    code, text = cxrkit("sweep", "s.yaml", "vars.broken=true", "--slots", "1")
    assert code == 1 and "if broken: raise RuntimeError" in text and "sealed      10_make:make" in text
    code, text = cxrkit("sweep", "s.yaml", "--dry-run")
    assert code == 0 and [line.split()[1] for line in text.splitlines() if line.startswith(("10_", "30_"))] == ["sealed", "to"]


def test_runs_prints_ledger_and_spread(cxrkit, sealed):
    code, text = cxrkit("runs")
    assert code == 0 and not any(line.endswith(" ") for line in text.splitlines())
    lines = [line.split() for line in text.splitlines()]
    assert ["lesson", "·", "30_train"] in lines
    header = next(line for line in lines if line[:3] == ["name", "fold", "id"])
    assert header == ["name", "fold", "id", "epochs", "accuracy", "time", "sealed"]
    assert any(line[:1]+line[2:8] == ["short", "0", "1", "of", "2", "2", "0.5000"] or "0.5000 ± 0.3536" in " ".join(line) for line in lines)


def test_runs_behind_a_run(cxrkit, sealed, project):
    run_id = next((project/"runs"/"lesson"/"30_train").iterdir()).name
    text = cxrkit("runs", "--behind", run_id)[1]
    assert f"30_train/{run_id}" in text and "10_make/make-" in text
    assert "no sealed run is called 'short'" in cxrkit("runs", "--behind", "short")[1]


def test_runs_filters_and_markdown(cxrkit, sealed):
    text = cxrkit("runs", "--flow", "30_train", "--name", "long", "--markdown")[1]
    assert "### lesson · 30_train" in text and "| long | 0 |" in text and "short" not in text and "10_make" not in text
    assert cxrkit("runs", "--comp", "nothing")[1].startswith("No sealed run matches")


def test_check_accepts_a_valid_and_refuses_a_broken_submission(cxrkit, project):
    pytest.importorskip("cxrkit.submit")
    (project/"sample.csv").write_text("id,PredictionString\na_study,negative 1 0 0 1 1\nb_image,none 1 0 0 1 1\n")
    (project/"good.csv").write_text("id,PredictionString\na_study,typical 0.5 0 0 1 1\nb_image,opacity 0.9 10 10 50 60\n")
    (project/"bad.csv").write_text(",id,PredictionString\n0,a_study,typical 0.5 0 0 1 1\n1,b_image,none 1 0 0 1 1\n")
    code, text = cxrkit("check", "good.csv", "sample.csv")
    assert code == 0 and "This submission is valid" in text
    code, text = cxrkit("check", "bad.csv", "sample.csv")
    assert code == 2 and "Traceback" not in text and "id" in text


def test_toy_then_folds(cxrkit, project):
    "The shortest real path through the command line: files, then a flow run by papermill, then the ledger."
    code, text = cxrkit("toy", "data/toy", "--patients", "8", "--seed", "0")
    assert code == 0 and "radiographs of 8 patients (seed 0)" in text
    code, text = cxrkit("folds", "toy", "--n-folds", "2", "--name", "two")
    assert code == 0, text
    run, = (p for p in (project/"runs"/"toy"/"20_folds").iterdir())
    assert run.name.startswith("two-") and json.loads((run/"params.json").read_text())["n_folds"] == 2
    assert "sealed before" in cxrkit("folds", "toy", "--n-folds", "2", "--name", "two")[1]
    assert "two" in cxrkit("runs", "--comp", "toy")[1]
