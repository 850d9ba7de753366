"""Push, follow and submit with the real client against the loopback Kaggle, which leaves sources out, keeps the internet on, and forgets."""
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cxrkit.cli_kaggle import pinned_image, register
from cxrkit.client import Client, KaggleError
from cxrkit.image import choose_image
from cxrkit.kernel import KernelSpec, Push, follow_push, freeze_probe, load_push, push_kernel, save_push, stage_notebook, submit_push
from cxrkit.manifest import METADATA
from cxrkit.package import pack_folder
from kaggle_server import Dataset, KaggleServer, Version
from tinyflows import write_flow

ROOT = Path(__file__).resolve().parents[1]
REF = "alice/cxrkit-submit"


@pytest.fixture
def kaggle():
    with KaggleServer() as server:
        server.run_kernel = lambda save: {"submission.csv": b"id,PredictionString\na,none 1 0 0 1 1\n", "report.json": json.dumps({"push_id": pushed_id(save)}).encode()}
        yield server
        assert server.escapes == []


@pytest.fixture
def client(kaggle, tmp_path) -> Client:
    return Client(kaggle.environment(tmp_path/"home"), say=lambda text: None, pause=.05, grace=.4, patience=900.)


@pytest.fixture
def notebook(tmp_path) -> Path:
    "A submit notebook of two cells."
    write_flow(tmp_path, "50_submit", comp="toy", push_id="", limit=9.)
    return tmp_path/"nbs"/"flow"/"50_submit.ipynb"


def pushed_id(save: dict) -> str:
    found = re.search(r"push_id = '(\w+)'", save["text"])
    return found[1] if found else ""


def kept(root: Path, **changes) -> Push:
    "A push that was followed and checked."
    push = Push(REF, 3, "abc", "runs/kaggle/cxrkit-submit/v3", "0"*64, {}, "siim-covid19-detection", status="checked", sha256="ab"*32)
    (root/push.folder).mkdir(parents=True, exist_ok=True)
    return save_push(replace(push, **changes), root)


def test_push_follow_submit(kaggle, client, notebook, tmp_path):
    packed = tmp_path/"wheels"
    packed.mkdir()
    (packed/METADATA).write_text(json.dumps({"id": "alice/cxrkit-wheels", "title": "cxrkit wheels", "licenses": [{"name": "other"}]}))
    (tmp_path/"a-1-py3-none-any.whl").write_bytes(b"a")
    pack_folder(packed, "wheels", {"a-1-py3-none-any.whl": tmp_path/"a-1-py3-none-any.whl"}, {"images": {}})
    kaggle.datasets["alice/cxrkit-wheels"] = Dataset({"isPrivate": True}, [Version({p.name: p.read_bytes() for p in packed.iterdir() if p.name != METADATA})])
    spec = KernelSpec(REF, "t4", ("alice/cxrkit-wheels",), "siim-covid19-detection", docker_image="gcr.io/kaggle-gpu-images/python@sha256:"+"cd"*32)
    push = push_kernel(notebook, spec, client, {"comp": "siim_covid19"}, {"alice/cxrkit-wheels": packed}, root=tmp_path)
    save = kaggle.kernels[REF].saves[0]
    assert (save["enableInternet"], save["isPrivate"], save["enableGpu"], save["machineShape"], save["dockerImage"]) == (False, True, True, "NvidiaTeslaT4", spec.docker_image)
    assert "comp = 'siim_covid19'" in save["text"] and push.docker_image == spec.docker_image and push.version == 1 and len(push.sources["alice/cxrkit-wheels"]) == 64
    checked = []
    push = follow_push(push, client, checked.append, root=tmp_path)
    assert push.status == "checked" and checked[0].read_bytes().startswith(b"id,PredictionString")
    push = submit_push(push, "first try", client, root=tmp_path)
    assert push.submission == 1000 and load_push("cxrkit-submit", root=tmp_path) == push
    row, = kaggle.submissions
    assert (row["kernel"], row["version"], row["fileName"]) == (REF, 1, "submission.csv") and row["description"] == f"first try [cxrkit-submit v1 {push.sha256[:8]}]"
    with pytest.raises(KaggleError, match="has been submitted already"): submit_push(push, "again", client, root=tmp_path)


@pytest.mark.parametrize("fault, words", [
    ("push_error", "Maximum batch GPU session count"), ("keeps_internet", "the internet is on"), ("silent_model_source", r"model_sources: sent \['a/b/pyTorch/c/1'\], Kaggle has \[\]")])
def test_push_that_is_not_what_was_sent_is_refused(fault, words, kaggle, client, notebook, tmp_path):
    kaggle.fault(fault)
    with pytest.raises(KaggleError, match=words): push_kernel(notebook, KernelSpec(REF, models=("a/b/pyTorch/c/1",)), client, root=tmp_path)


def test_source_that_kaggle_leaves_out_is_an_error_that_keeps_the_version(kaggle, client, notebook, tmp_path):
    kaggle.datasets["alice/cxrkit-code"] = Dataset({}, [Version({"a": b"a"})])
    kaggle.fault("invalid_source")
    with pytest.raises(KaggleError, match="left out .*alice/cxrkit-code"): push_kernel(notebook, KernelSpec(REF, datasets=("alice/cxrkit-code",)), client, root=tmp_path)
    assert load_push("cxrkit-submit", root=tmp_path).version == 1


def test_missing_and_other_datasets_stop_the_push(kaggle, client, notebook, tmp_path):
    with pytest.raises(KaggleError, match="alice/cxrkit-code: not there"): push_kernel(notebook, KernelSpec(REF, datasets=("alice/cxrkit-code",)), client, root=tmp_path)
    kaggle.datasets["alice/cxrkit-code"] = Dataset({}, [Version({"a": b"a"}, polls=99)])
    with pytest.raises(KaggleError, match="is blobs_received, not ready"): push_kernel(notebook, KernelSpec(REF, datasets=("alice/cxrkit-code",)), client, root=tmp_path)
    assert REF not in kaggle.kernels


def test_run_that_fails_says_why(kaggle, client, notebook, tmp_path):
    push = push_kernel(notebook, KernelSpec(REF, "cpu"), client, root=tmp_path)
    assert kaggle.kernels[REF].saves[0].get("enableGpu") in (None, False)
    kaggle.kernels[REF].polls = 0
    kaggle.fault("kernel_fails")
    with pytest.raises(KaggleError, match="Notebook Threw Exception"): follow_push(push, client, root=tmp_path)


def test_output_of_the_version_before_is_not_taken(kaggle, client, notebook, tmp_path):
    first = push_kernel(notebook, KernelSpec(REF), client, root=tmp_path)
    second = push_kernel(notebook, KernelSpec(REF), client, root=tmp_path)
    assert (first.version, second.version) == (1, 2) and first.push_id != second.push_id
    kaggle.fault("output_lag", 1)
    assert follow_push(second, client, root=tmp_path).status == "complete"
    kaggle.fault("output_lag", 99)
    with pytest.raises(KaggleError, match="it is another version's"): follow_push(replace(second, pushed=0.), client, root=tmp_path)


def test_missing_result_names_what_is_there(kaggle, client, notebook, tmp_path):
    kaggle.run_kernel = lambda save: {"report.json": json.dumps({"push_id": pushed_id(save)}).encode()}
    push = push_kernel(notebook, KernelSpec(REF), client, root=tmp_path)
    with pytest.raises(KaggleError, match="left no submission.csv .it left: report.json."): follow_push(push, client, root=tmp_path)


def test_result_that_fails_its_check_is_not_submitted(kaggle, client, notebook, tmp_path):
    def check(path): raise ValueError("columns: expected id, PredictionString")
    push = push_kernel(notebook, KernelSpec(REF, competition="siim-covid19-detection"), client, root=tmp_path)
    with pytest.raises(ValueError, match="columns"): follow_push(push, client, check, root=tmp_path)
    push = load_push("cxrkit-submit", root=tmp_path)
    with pytest.raises(KaggleError, match="is complete, not checked"): submit_push(push, "anyway", client, root=tmp_path)
    assert kaggle.submissions == []


def test_submission_that_is_refused_or_lost_is_no_success(kaggle, client, notebook, tmp_path):
    push_kernel(notebook, KernelSpec(REF), client, root=tmp_path)
    kaggle.fault("submit_refused")
    with pytest.raises(KaggleError, match="used all your submissions"): submit_push(kept(tmp_path, version=1), "one", client, root=tmp_path)
    kaggle.fault("submit_lost")
    with pytest.raises(KaggleError, match="no submission .* is in the list"): submit_push(kept(tmp_path, version=1), "one", client, root=tmp_path)
    assert load_push("cxrkit-submit", 3, root=tmp_path).status == "checked"


def test_submission_already_in_the_list_is_not_made_twice(kaggle, client, tmp_path):
    push = kept(tmp_path)
    kaggle.submissions.append({"ref": 77, "description": f"x [cxrkit-submit v3 {push.sha256[:8]}]", "competition": "siim-covid19-detection", "fileName": "submission.csv", "status": "PENDING", "date": "2026-11-20T12:00:00.000Z"})
    assert submit_push(push, "x", client, root=tmp_path).submission == 77 and len(kaggle.submissions) == 1


@pytest.fixture
def project(kaggle, tmp_path, monkeypatch) -> Path:
    "A project on the command line of a user who is logged in to the loopback Kaggle, in a world where waiting takes no time."
    for name, value in kaggle.environment(tmp_path/"home").items(): monkeypatch.setenv(name, value)
    monkeypatch.setenv("CXRKIT_HOME", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path/"kaggle_datasets").mkdir()
    shutil.copytree(ROOT/"kaggle_datasets"/"wheels", tmp_path/"kaggle_datasets"/"wheels", ignore=shutil.ignore_patterns("*.whl", "manifest.json", "fingerprint.json"))
    return tmp_path


def command(*words: str):
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, words, catch_exceptions=False)


def test_probe_command_ends_in_a_sheet_that_is_pinned(kaggle, project):
    (project/"nbs"/"flow").mkdir(parents=True)
    shutil.copy(ROOT/"nbs"/"flow"/"60_probe.ipynb", project/"nbs"/"flow")
    probe = {"format": 1, "packages": {"numpy": "2.0.2", "torch": "2.10.0+cu128"}, "mounts": [], "python": "3.12.12", "glibc": "2.35", "git_commit": "f00d",
             "cores": 4, "memory_gb": 29.0, "gpus": ["Tesla T4"], "run_type": "Batch", "rerun": False}
    kaggle.run_kernel = lambda save: {"probe.json": json.dumps(probe | {"push_id": pushed_id(save)}).encode()}
    done = command("probe")
    assert done.exit_code == 0 and "image-probe.txt" in done.output and "alice/cxrkit-probe version 1" in done.output
    image = choose_image(None, project/"kaggle_datasets"/"wheels")
    assert image.name == "probe" and image.facts["docker_image"].startswith("gcr.io/kaggle-gpu-images/python@sha256:")
    pack_folder(project/"kaggle_datasets"/"wheels", "wheels", {}, {"images": {"probe": {"facts": image.facts}}}, owner="alice")
    assert (pinned_image(project, "t4"), pinned_image(project, "cpu")) == (image.facts["docker_image"], "")


def test_push_and_submit_commands(kaggle, project, notebook):
    "Three datasets attached with the competition's data; the sample checks the result; the checked version is submitted."
    for kind in ("code", "wheels", "models"):
        folder = project/"kaggle_datasets"/kind
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT/"kaggle_datasets"/kind/METADATA, folder)
        pack_folder(folder, kind, {}, {"images": {}}, owner="alice")
        kaggle.datasets[f"alice/cxrkit-{kind}"] = Dataset({}, [Version({p.name: p.read_bytes() for p in folder.iterdir() if p.name != METADATA})])
    sample = project/"data"/"siim_covid19"/"sample_submission.csv"
    sample.parent.mkdir(parents=True)
    sample.write_text("id,PredictionString\na_image,none 1 0 0 1 1\nb_study,negative 1 0 0 1 1\n")
    kaggle.run_kernel = lambda save: {"submission.csv": sample.read_bytes(), "report.json": json.dumps({"push_id": pushed_id(save)}).encode()}
    done = command("push", "--comp", "siim_covid19")
    assert done.exit_code == 0 and "the submission is valid: rows 2" in done.output and "Next: cxrkit submit --name cxrkit-submit --version 1" in done.output
    saved = kaggle.kernels[REF].saves[0]
    assert saved["datasetDataSources"] == ["alice/cxrkit-code", "alice/cxrkit-wheels", "alice/cxrkit-models"] and saved["competitionDataSources"] == ["siim-covid19-detection"]
    done = command("submit", "-m", "five folds")
    assert done.exit_code == 0 and "submitted, number 1000" in done.output and kaggle.submissions[0]["version"] == 1


def test_staged_notebook_gets_parameters_and_refuses_unknown_ones(notebook, tmp_path):
    staged, push_id = stage_notebook(notebook, tmp_path/"stage", KernelSpec(REF), {"limit": 3})
    cells = json.loads(staged.read_text())["cells"]
    at = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    assert cells[at+1]["source"].splitlines() == ["# Parameters", "limit = 3", f"push_id = '{push_id}'"]
    with pytest.raises(ValueError, match="did you mean 'limit'"): stage_notebook(notebook, tmp_path/"stage", KernelSpec(REF), {"limt": 3})


def test_probe_notebook_runs_and_becomes_a_sheet(tmp_path):
    "The probe's own cells, run here, written as if by Kaggle."
    cells = ["".join(c["source"]) for c in json.loads((ROOT/"nbs"/"flow"/"60_probe.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    space = {}
    exec("\n".join([cells[0], f"out = {str(tmp_path)!r}; push_id = 'p1'", *cells[1:]]), space)
    probe = json.loads((tmp_path/"probe.json").read_text())
    assert probe["push_id"] == "p1" and "packaging" in probe["packages"] and probe["glibc"]
    with pytest.raises(KaggleError, match="ran at home"): freeze_probe(tmp_path, tmp_path)
    (tmp_path/"probe.json").write_text(json.dumps(probe | {"run_type": "Batch", "python": "3.12.11", "glibc": "2.35"}))
    freeze_probe(tmp_path, tmp_path, "gcr.io/x@sha256:ab")
    image = choose_image(None, tmp_path)
    assert (image.name, image.python, image.packages["packaging"], image.facts["docker_image"]) == ("probe", "3.12", probe["packages"]["packaging"], "gcr.io/x@sha256:ab")
