"""Logged mistakes on the way to Kaggle, each planted as its author made it: the number is that of the log."""
import json
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cxrkit.image import Image
from cxrkit.manifest import FINGERPRINT, MANIFEST, ManifestError, read_manifest, tell_models, version_gaps, write_manifest
from cxrkit.models import PackageError, check_fold_sets, check_models, describe_model, load_networks, package_models, read_truth, score_weights
from cxrkit.provenance import sha256_file
from cxrkit.runs import RunCorrupt, load_run
from cxrkit.spec import load_spec
from cxrkit.wheels import WheelError, check_wheels, resolve
from fakeruns import write_project, write_weights

IMAGE = Image("py312", "3.12", packages={"numpy": "2.0.2", "torch": "2.10.0+cu128", "timm": "1.0.26"})


@pytest.fixture
def project(tmp_path) -> dict:
    made = write_project(tmp_path/"project")
    made["packed"] = tmp_path/"project"/"kaggle_datasets"/"models"
    made["manifest"], made["scores"] = package_models("toy", owner="alice", load=False, root=made["root"])
    return made


def edit_manifest(folder: Path, change) -> None:
    "Edit a package's manifest and make its fingerprint agree, as a careful hand would."
    manifest = json.loads((folder/MANIFEST).read_text())
    change(manifest)
    write_manifest(folder, manifest["kind"], {n: e.get("name", n) for n, e in manifest["files"].items()}, {k: v for k, v in manifest.items() if k not in ("format", "kind", "files")})


def wheel(shelf: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> Path:
    path = shelf/f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"+"".join(f"Requires-Dist: {r}\n" for r in requires))
        z.writestr(f"{name}-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        z.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return path


class Finder:
    "A detector that draws a box around each grey level but black."
    config = SimpleNamespace(task="detector", size=(256, 256), labels=("opacity",))

    def eval(self): return self
    def parameters(self): return iter(())

    def predict(self, batch):
        rows = []
        for image_id, image in zip(batch["image_id"], batch["image"][:, 0].numpy()):
            for level in sorted({*image.ravel().tolist()}-{0}):
                y, x = (image == level).nonzero()
                rows.append((image_id, "opacity", level/255, x.min(), y.min(), x.max()+1, y.max()+1))
        return pd.DataFrame(rows, columns=["image_id", "label", "score", "x1", "y1", "x2", "y2"])


def paint(images: pd.DataFrame, boxes: pd.DataFrame) -> dict:
    "A cache in which every box of the truth has a grey level of its own."
    cache = {r.image_id: np.zeros((256, 256), np.uint8) for r in images.itertuples()}
    sizes = images.set_index("image_id")
    for k, r in enumerate(boxes.itertuples()):
        x, y = 256/sizes.width[r.image_id], 256/sizes.height[r.image_id]
        cache[r.image_id][round(r.y1*y):round(r.y2*y), round(r.x1*x):round(r.x2*x)] = 100+k % 150
    return cache


def test_guard_09_tta_boxes_not_flipped_back_when_packaging(project, monkeypatch):
    "The packed weights, predicted with the packed views by code that forgets to flip the boxes back, are not worth what the ledger says."
    import cxrkit.dicom, cxrkit.predict
    manifest, spec = project["manifest"], load_spec("toy")
    manifest = manifest | {"models": [m for m in manifest["models"] if m["task"] == "detector"]}
    truth = read_truth(manifest, project["root"])
    cache = paint(truth["images"], truth["boxes"])
    monkeypatch.setattr(cxrkit.predict, "load_task", lambda path: Finder())
    monkeypatch.setattr(cxrkit.dicom, "open_cache", lambda folder, size: cache)
    table = pd.DataFrame([{"model": m["name"], "fold": m["fold"], "ledger": 0.} for m in manifest["models"]]+[{"model": "blend", "fold": pd.NA, "ledger": 0.}])
    again = lambda table, **kw: score_weights(project["packed"], manifest, truth, spec, table, project["root"], **kw)
    honest = again(table, tolerance=2.)
    assert honest.from_weights[:-1].min() > .9
    again(table.assign(ledger=honest.from_weights))
    monkeypatch.setattr(cxrkit.predict, "unview_boxes", lambda boxes, *rest: boxes)
    with pytest.raises(PackageError, match=r"not worth what the ledger says .opacity fold 0: ledger 0\.\d+|ledger 1\.0+, from weights 0\.\d+"): again(table.assign(ledger=honest.from_weights))


def test_guard_15_library_versions_clash_when_packaging(tmp_path):
    "effdet wants another timm than the image has; and weights meet another effdet than they were trained with."
    wheel(tmp_path, "effdet", "0.4.1", "timm>=1.0.30")
    with pytest.raises(WheelError, match=r"effdet 0.4.1 depends on timm>=1.0.30: that would change the image's timm==1.0.26"):
        resolve(["effdet"], IMAGE, ("--no-index", "--find-links", str(tmp_path)))
    assert version_gaps({"timm": "1.0.31", "effdet": "0.4.1"}, {"timm": "0.6.13", "effdet": "0.3.0"}) == ["effdet: trained with 0.4.1, here is 0.3.0", "timm: trained with 1.0.31, here is 0.6.13"]


def test_guard_16_submitted_without_tta_when_packaging(project):
    "Views are part of the package and are printed with hashes and the expected score; dropping them by hand breaks the fingerprint."
    said = tell_models(project["manifest"])
    entry = project["manifest"]["models"][0]
    assert re.search(rf"study +0 +7 +256×256 +2 +{entry['oof']:.4f}  {entry['sha256'][:12]}", said)
    assert f"expected siim_map {project['manifest']['cv']['overall']:.4f}" in said
    path = project["packed"]/MANIFEST
    path.write_text(path.read_text().replace('"identity",\n    "hflip"', '"identity"'))
    with pytest.raises(ManifestError, match="two versions are mixed, or one was edited"): read_manifest(project["packed"])


def test_guard_17_trained_at_384_fed_512(project):
    "The size in the manifest is edited; the weights' own header says what they were trained at."
    def change(manifest): manifest["models"][0]["size"] = [512, 512]
    edit_manifest(project["packed"], change)
    with pytest.raises(PackageError, match=r"size: the manifest says \[512, 512\], the file \[256, 256\]"): check_models(project["packed"], project["root"], load=False)


def test_guard_17_another_normalisation(project):
    def change(manifest): manifest["models"][0]["mean"] = [.5]
    edit_manifest(project["packed"], change)
    with pytest.raises(PackageError, match=r"mean: the manifest says \[0.5\], the file \[0.449\]"): check_models(project["packed"], project["root"], load=False)


def test_guard_19_train_fold_left_at_zero(project):
    "One fold is packed, the score is of both."
    assert project["manifest"]["folds"] == {"run": project["manifest"]["folds"]["run"], "n_folds": 2, "packed": [0, 1]}
    with pytest.raises(PackageError, match=r"31_train_det:opacity: expected folds 0 to 1, one run each, got \[0\]"): check_fold_sets([r for r in project["models"] if r.name != "opacity" or r.fold == 0], 2)
    with pytest.raises(PackageError, match=r"expected folds 0 to 1, one run each, got \[0, 0, 1\]"): check_fold_sets([*project["models"], project["models"][0]], 2)


def test_guard_29_weights_of_an_earlier_epoch_under_the_same_name(project):
    "In the sealed run; in the resealed run; in the packed folder. Each time the name of the run or file is in the message."
    run = project["models"][0]
    meta = {"comp": "toy", "fold": 0, "epoch": 6, "metric": "siim_map", "score": run.scores["siim_map"]-.2, "versions": {}}
    old = run.path/"model.safetensors"
    write_weights(old, project["manifest"]["models"][0]["config"], meta, 5)
    with pytest.raises(RunCorrupt, match="model.safetensors: expected"): package_models("toy", load=False, root=project["root"])
    manifest = json.loads((run.path/"manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"sha256": sha256_file(old), "bytes": old.stat().st_size}
    card = json.loads((run.path/"prediction.json").read_text()) | {"sha256": sha256_file(old), "epoch": 6}
    (run.path/"prediction.json").write_text(json.dumps(card))
    manifest["files"]["prediction.json"] = {"sha256": sha256_file(run.path/"prediction.json"), "bytes": (run.path/"prediction.json").stat().st_size}
    (run.path/"manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=rf"{run.run_id}: the weights are of epoch 6 .*, the best was epoch 7"): describe_model(load_run(run.path))
    entry = project["manifest"]["models"][1]
    shutil.copy(old, project["packed"]/entry["file"])
    with pytest.raises(ManifestError, match=f"{entry['file']} .expected"): check_models(project["packed"], project["root"], load=False)
    edit_manifest(project["packed"], lambda manifest: None)
    with pytest.raises(PackageError, match=f"{entry['file']}: epoch: the manifest says 7, the file 6; fold: .*another model under the same name"): check_models(project["packed"], project["root"], load=False)


def test_guard_29_score_of_the_packed_files_is_recomputed(project):
    "Predictions beside the weights are of a worse model than the ledger's score is of."
    path = project["packed"]/"cls_preds.parquet"
    table = pd.read_parquet(path)
    table.assign(prob=1-table.prob).to_parquet(path)
    edit_manifest(project["packed"], lambda manifest: None)
    with pytest.raises(PackageError, match=r"not worth what the ledger says .study fold 0: ledger 0\.\d+, recomputed 0\.\d+"): check_models(project["packed"], project["root"], load=False)


def test_guard_32_wheels_that_would_not_install(tmp_path):
    "The wheelhouse is rehearsed for the image: another Python, a missing dependency, a package built for a newer glibc, an archive."
    good, lock = wheel(tmp_path, "pylibjpeg", "2.0", "numpy>=2.0", "codec"), ""
    with pytest.raises(WheelError, match="pylibjpeg needs codec, but codec is neither in the image nor among the wheels"): check_wheels({good.name: good}, lock, ["pylibjpeg"], IMAGE)
    home = wheel(tmp_path, "codec", "1.0", tag="cp311-cp311-manylinux_2_28_x86_64")
    with pytest.raises(WheelError, match="codec-1.0-cp311-cp311-manylinux_2_28_x86_64.whl: not for Python 3.12"): check_wheels({good.name: good, home.name: home}, lock, ["pylibjpeg"], IMAGE)
    right = wheel(tmp_path, "codec", "1.0", tag="cp312-cp312-manylinux_2_28_x86_64")
    pins = "".join(f"{n}=={v} --hash=sha256:{sha256_file(p)}\n" for n, v, p in (("pylibjpeg", "2.0", good), ("codec", "1.0", right)))
    assert set(check_wheels({good.name: good, right.name: right}, pins, ["pylibjpeg"], IMAGE)["where"]) == {"shipped", "image"}
    with pytest.raises(WheelError, match="no wheel of extra==1.0"): check_wheels({good.name: good, right.name: right}, pins+f"extra==1.0 --hash=sha256:{'0'*64}\n", ["pylibjpeg"], IMAGE)


def test_guard_37_network_of_training_differs_from_that_of_inference(tmp_path):
    "Weights of one backbone under the name of another: every network is built from its packed file before anything leaves."
    from cxrkit.classifier import ClassifierConfig, build_classifier
    from cxrkit.weights import save_weights
    task = build_classifier(ClassifierConfig("test_efficientnet", 64, ("negative", "typical")))
    save_weights(task, tmp_path/"good.safetensors", {"epoch": 1})
    load_networks(tmp_path, {"models": [{"file": "good.safetensors", "backbone": "test_efficientnet"}]})
    task.net.extra = __import__("torch").nn.Linear(2, 2) # the class had one layer more when it was trained
    save_weights(task, tmp_path/"bad.safetensors", {"epoch": 1})
    with pytest.raises(PackageError, match=r"bad.safetensors: cannot be loaded as the test_efficientnet .*unexpected: .*extra"): load_networks(tmp_path, {"models": [{"file": "bad.safetensors", "backbone": "test_efficientnet"}]})


def test_guard_37_failed_package_cannot_be_uploaded(project):
    "A package whose networks do not load has no fingerprint, and without one nothing is uploaded."
    from cxrkit.upload import upload_package
    with pytest.raises(PackageError, match="cannot be loaded as the test_efficientnet"): package_models("toy", root=project["root"])
    assert not (project["packed"]/FINGERPRINT).exists()
    with pytest.raises(ManifestError, match="no fingerprint.json"): upload_package(project["packed"])
