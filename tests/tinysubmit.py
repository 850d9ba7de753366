"""What tests of the submission share: a small competition, random networks packed as a models dataset, a wheel of this code, and a stage to run them on."""
import json
import shutil
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
METRIC = {"classifier": "siim_map", "detector": "siim_map"}
VERSIONS = ("torch", "timm", "effdet")


def write_radiograph(path: Path, seed: int, syntax: str = "explicit", shape: tuple = (220, 280)) -> Path:
    "A soft phantom, different for each seed."
    from cxrkit.dicomwrite import write_dicom
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:shape[0], :shape[1]]
    image = 1500+1200*np.sin((x+9*seed)/40)*np.cos(y/50)+rng.normal(0, 40, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_dicom(path, image.clip(0, 4095).astype(np.uint16), syntax, 12)


def write_competition(root: Path, n_studies: int = 4) -> Path:
    "A test folder in SIIM's layout, the first study with two images, and its sample submission."
    images = [(f"study{i}", f"image{i}") for i in range(n_studies)]+[("study0", "image0b")]
    for k, (study, image) in enumerate(images):
        write_radiograph(root/"test"/study/"series"/f"{image}.dcm", k, ("explicit", "jpeg-lossless", "j2k")[k % 3])
    rows = [(f"{s}_study", "negative 1 0 0 1 1") for s in dict.fromkeys(s for s, _ in images)]+[(f"{i}_image", "none 1 0 0 1 1") for _, i in images]
    pd.DataFrame(rows, columns=["id", "PredictionString"]).to_csv(root/"sample_submission.csv", index=False)
    return root


def make_tasks(folds: int = 1, size: int = 96):
    "Random networks for every part of SIIM: (name, fold, level, task)."
    import torch

    from cxrkit.classifier import ClassifierConfig, build_classifier
    from cxrkit.detector import DetectorConfig, build_detector
    from cxrkit.spec import load_spec
    labels, made = load_spec("siim_covid19").labels, []
    for fold in range(folds):
        torch.manual_seed(fold)
        made += [("study", fold, "study", build_classifier(ClassifierConfig("test_efficientnet", size=size, labels=labels["study"], head="multiclass"))),
                 ("none", fold, "image", build_classifier(ClassifierConfig("test_efficientnet", size=size, labels=("none",), head="binary"))),
                 ("opacity", fold, "", build_detector(DetectorConfig("tf_efficientdet_lite0", size=128)))]
    return made


def pack_models(folder: Path, folds: int = 1, **kw) -> dict:
    "A models dataset of random networks, as cxrkit.models packs trained ones; returns its manifest."
    from importlib.metadata import version

    from cxrkit.manifest import write_manifest
    from cxrkit.weights import file_sha256, save_weights
    folder.mkdir(parents=True)
    entries, versions = [], {n: version(n) for n in VERSIONS}
    for name, fold, level, task in make_tasks(folds, **kw):
        meta = {"epoch": 7, "fold": fold, "metric": METRIC[task.config.task], "score": .4, "versions": versions}
        file = f"{name}-f{fold}-0123abcd.safetensors"
        save_weights(task, folder/file, meta)
        config = json.loads(json.dumps(asdict(task.config)))
        same = {k: config[k] for k in ("task", "backbone", "size", "labels", "mean", "std", "in_chans")}
        entries.append({**same, **meta, "file": file, "run": f"3x_train/{Path(file).stem}", "name": name, "level": level, "views": ["identity", "hflip"], "oof": .4, "sha256": file_sha256(folder/file), "config": config}
                       | ({"fuse": "wbf", "fuse_iou": .55} if task.config.task == "detector" else {}))
    facts = {"comp": "siim_covid19", "models": entries, "blend": {"run": "40_blend/x", "method": "wbf", "iou": .55, "power": .3, "none_label": "none"},
             "cv": {"metric": "siim_map", "direction": "max", "overall": .4, "labels": {"none": .4}, "folds": list(range(folds))},
             "cache": {"run": "10_cache/x", "policy": {"scaling": "percentile"}}, "folds": {"run": "20_folds/x", "n_folds": folds, "packed": list(range(folds))}}
    return write_manifest(folder, "models", {e["file"]: e["file"] for e in entries}, facts)


def rewrite(folder: Path, change) -> None:
    "Change the manifest of a packed dataset, and make the rest agree with it: what somebody does who edits by hand."
    from cxrkit.manifest import read_manifest, write_manifest
    manifest = read_manifest(folder)
    change(manifest)
    facts = {k: v for k, v in manifest.items() if k not in ("format", "kind", "files")}
    write_manifest(folder, manifest["kind"], {n: e.get("name", n) for n, e in manifest["files"].items()}, facts)


def pack_code(folder: Path) -> None:
    "A wheel of the modules as they are, without a build."
    from cxrkit.manifest import write_manifest
    folder.mkdir(parents=True)
    name = "cxrkit-0.1.0-0test-py3-none-any.whl"
    with zipfile.ZipFile(folder/name, "w") as file:
        for path in sorted((ROOT/"cxrkit").rglob("*.py")): file.write(path, str(path.relative_to(ROOT)))
        info = "cxrkit-0.1.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: cxrkit\nVersion: 0.1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\nBuild: 0test\n")
        file.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in [*file.namelist(), f"{info}/RECORD"]))
    write_manifest(folder, "code", {name: name}, {"commit": "f"*40, "version": "0.1.0", "wheel": name})


def make_stage(desk: Path, folds: int = 1):
    "Everything a scene needs, with the environment of Kaggle's image."
    from cxrkit.environment import ask_python, make_environment, rehearsal_wheels
    from cxrkit.image import choose_image
    from cxrkit.provenance import flow_notebook
    from cxrkit.rehearse import Packages, Stage
    from cxrkit.sandbox import namespace_command
    from cxrkit.spec import load_spec
    from cxrkit.wheels import submission_requirements
    image = choose_image("py312-torch2.10", ROOT/"kaggle_datasets"/"wheels")
    pack_code(desk/"code")
    pack_models(desk/"models", folds)
    wheels, names, _ = rehearsal_wheels(None, image, submission_requirements(ROOT), desk/"wheels")
    python, _ = make_environment(image, desk/"venv", set(names))
    packages = Packages({"code": desk/"code", "wheels": wheels, "models": desk/"models"}, {k: f"me/cxrkit-{k}" for k in ("code", "wheels", "models")}, (), frozenset(names))
    data = write_competition(desk/"data")
    return Stage(load_spec("siim_covid19"), data, packages, python, ask_python()["site"], flow_notebook("50_submit", ROOT), desk/"out", namespace_command(), 1.)


def with_models(stage, name: str):
    "A stage whose models dataset is a copy that may be spoilt; returns stage and folder."
    folder = stage.out.parent/name
    shutil.copytree(stage.packages.folders["models"], folder)
    return replace(stage, packages=replace(stage.packages, folders=stage.packages.folders | {"models": folder}), out=stage.out/name), folder
