"""A small project with sealed runs whose predictions are made up: no training, the real folder layout, seconds instead of minutes."""
import json
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.blend import fuse_boxes, gate_boxes, mean_predictions
from cxrkit.metrics import score
from cxrkit.photometry import Policy
from cxrkit.predict import spec_part
from cxrkit.provenance import sha256_file, write_json
from cxrkit.runs import Run, load_manifest, load_run, seal_folder
from cxrkit.spec import load_spec
from cxrkit.tables import check_table, write_table

SPEC = load_spec("toy")


def make_truth(n: int = 24, seed: int = 0) -> dict[str, pd.DataFrame]:
    "Images (one a study), labels, boxes and folds of a made-up competition."
    rng = np.random.default_rng(seed)
    ids = [f"i{k:02}" for k in range(n)]
    images = pd.DataFrame({"image_id": ids, "study_id": [f"s{k:02}" for k in range(n)], "patient_id": [f"p{k:02}" for k in range(n)],
                           "path": [f"{i}.dcm" for i in ids], "height": 200, "width": 300, "split": "train"})
    classes = [SPEC.labels["study"][k % 4] for k in range(n)]
    labels = [("study", s, c, float(c == mine)) for s, mine in zip(images.study_id, classes) for c in SPEC.labels["study"]]
    labels += [("image", i, "none", float(c == "negative")) for i, c in zip(ids, classes)]
    boxes = [(i, "opacity", x, y, x+60, y+50, None) for i, c in zip(ids, classes) if c != "negative" for x, y in [rng.uniform(60, 100, 2)]]
    folds = pd.DataFrame({"image_id": ids, "patient_id": images.patient_id, "fold": [k//4 % 2 for k in range(n)]})
    return {"images": check_table(images, "images"), "labels": check_table(pd.DataFrame(labels, columns=["level", "unit_id", "label", "value"]), "labels"),
            "boxes": check_table(pd.DataFrame(boxes, columns=["image_id", "label", "x1", "y1", "x2", "y2", "rater"]), "boxes"), "folds": check_table(folds, "folds")}


def seal(root: Path, flow: str, name: str, fold: int | None, params: dict, inputs: list[Run], write) -> Run:
    "Write a run folder with `write(folder, run_id)` and seal it as the launcher would."
    run_id = name+("" if fold is None else f"-f{fold}")+f"-{zlib.crc32(json.dumps([flow, name, fold, params], sort_keys=True).encode()):08x}"
    partial = root/"runs"/"toy"/flow/f"{run_id}.partial"
    partial.mkdir(parents=True)
    write_json(partial/"params.json", params | {"comp": "toy", "name": name, "fold": fold})
    write_json(partial/"env.json", {"seconds": 1.})
    write(partial, run_id)
    built_on = [dict(run=f"{r.flow}/{r.run_id}", content=load_manifest(r.folder)["content"]) for r in inputs]
    return load_run(seal_folder(partial, dict(format=1, run_id=run_id, comp="toy", flow=flow, name=name, fold=fold, inputs=built_on, code={})))


def write_weights(path: Path, config: dict, meta: dict, seed: int):
    "A few random numbers, with the meta data that training writes."
    from safetensors.numpy import save_file
    numbers = {"w": np.random.default_rng(seed).normal(size=64).astype(np.float32)}
    save_file(numbers, path, metadata={"cxrkit": json.dumps({"config": config, **meta}, sort_keys=True)})


def finish_model(folder: Path, run_id: str, config: dict, fold: int, found, preds, coverage, kind: str, views: list[str]):
    "The files that a training leaves, with an epoch log whose best row is the one in the weights."
    value = found.overall
    meta = {"comp": "toy", "fold": fold, "epoch": 7, "metric": found.metric, "score": round(value-.01, 6), "versions": {"torch": "2.13.0", "timm": "1.0.31", "effdet": "0.4.1"}}
    write_weights(folder/"model.safetensors", config, meta, fold)
    pd.DataFrame({"epoch": [6, 7, 8], found.metric: [value-.2, meta["score"], value-.1]}).to_csv(folder/"log.csv", index=False)
    write_table(preds, folder/f"{kind}.parquet", kind)
    write_table(coverage, folder/"coverage.parquet", "coverage")
    write_json(folder/"prediction.json", {"task": config["task"], "backbone": config["backbone"], "size": config["size"], "labels": config["labels"], "views": views,
                                          "n_views": len(views), "sha256": sha256_file(folder/"model.safetensors"), **{k: meta[k] for k in ("comp", "fold", "epoch", "metric", "score")}})
    write_json(folder/"scores.json", found.as_dict())


def train_fake(root: Path, truth: dict, cache: Run, folds: Run, flow: str, name: str, level: str | None, fold: int, noise: float = .3, size: int = 256) -> Run:
    "One fold of one model that guesses near the truth."
    rng = np.random.default_rng([fold, len(name), round(noise*100)])
    spec, mine = spec_part(SPEC, level), truth["folds"][truth["folds"].fold == fold]
    images = truth["images"][truth["images"].image_id.isin(mine.image_id)]

    def write(folder, run_id):
        coverage = mine[["image_id", "fold"]].assign(run_id=run_id)
        if level is None:
            boxes = truth["boxes"][truth["boxes"].image_id.isin(mine.image_id)]
            preds = boxes.drop(columns="rater").assign(run_id=run_id, fold=fold, score=rng.uniform(.3, 1, len(boxes)))
            preds[["x1", "x2"]] += rng.normal(0, 20*noise, (len(preds), 1))
            preds = check_table(preds, "box_preds")
            found = score(spec, truth["labels"], boxes, None, preds, coverage, images)
            config = {"task": "detector", "backbone": "tf_efficientdet_d0", "size": [size, size], "labels": ["opacity"], "mean": [.449], "std": [.226], "in_chans": 3}
        else:
            units = images.study_id if level == "study" else images.image_id
            rows = truth["labels"][(truth["labels"].level == level) & truth["labels"].unit_id.isin(units)]
            preds = check_table(rows.drop(columns="value").assign(run_id=run_id, fold=fold, prob=np.clip(rows.value*.6+.2+rng.normal(0, noise, len(rows)), 0, 1)), "cls_preds")
            found = score(spec, truth["labels"], truth["boxes"], preds, None, coverage, images)
            config = {"task": "classifier", "backbone": "test_efficientnet", "size": [size, size], "labels": list(SPEC.labels[level]), "head": "binary", "mean": [.449], "std": [.226], "in_chans": 3}
        finish_model(folder, run_id, config, fold, found, preds, check_table(coverage, "coverage"), "box_preds" if level is None else "cls_preds", ["identity", "hflip"])
    params = {"level": level or "", "noise": noise, "size": size} | ({"fuse": "wbf", "fuse_iou": .55} if level is None else {})
    return seal(root, flow, name, fold, params, [cache, folds], write)


def blend_fake(root: Path, truth: dict, cache: Run, folds: Run, models: list[Run], name: str = "blend", power: float = .4) -> Run:
    "The blend of some models, scored as the flow 40_blend scores it."
    def write(folder, run_id):
        read = lambda kind: pd.concat([pd.read_parquet(r.path/f"{kind}.parquet") for r in models if (r.path/f"{kind}.parquet").is_file()])
        final = mean_predictions(read("cls_preds"))
        coverage = pd.concat([pd.read_parquet(r.path/"coverage.parquet") for r in models])
        fused = fuse_boxes(read("box_preds"), "nms", .55, coverage=coverage)
        none = final[(final.level == "image") & (final.label == "none")]
        result = score(SPEC, truth["labels"], truth["boxes"], final, gate_boxes(fused, none, power), truth["folds"], truth["images"])
        write_json(folder/"blend.json", dict(method="nms", iou=.55, power=power, none_label="none", models=[f"{r.flow}/{r.run_id}" for r in models]))
        write_json(folder/"scores.json", result.as_dict())
    return seal(root, "40_blend", name, None, {}, [cache, folds, *models], write)


def write_project(root: Path, n_folds: int = 2) -> dict:
    "Cache, folds, three models of two folds each, their blend; and the folder that `package_models` looks for."
    truth = make_truth()
    policy = asdict(Policy())

    def write_cache(folder, run_id):
        for name in ("images", "labels", "boxes"): write_table(truth[name], folder/f"{name}.parquet", name)
        (folder/"cache").mkdir()
        write_json(folder/"cache"/"cache.json", {"policy": policy})
    cache = seal(root, "10_cache", "cache", None, {"sizes": "256", "policy": "percentile"}, [], write_cache)
    folds = seal(root, "20_folds", "folds", None, {"n_folds": n_folds}, [cache], lambda folder, run_id: write_table(truth["folds"], folder/"folds.parquet", "folds"))
    plan = [("30_train_cls", "study", "study"), ("30_train_cls", "none", "image"), ("31_train_det", "opacity", None)]
    models = [train_fake(root, truth, cache, folds, flow, name, level, fold) for flow, name, level in plan for fold in range(n_folds)]
    blend = blend_fake(root, truth, cache, folds, models)
    metadata = json.loads((Path(__file__).parents[1]/"kaggle_datasets"/"models"/"dataset-metadata.json").read_text())
    (root/"kaggle_datasets"/"models").mkdir(parents=True)
    write_json(root/"kaggle_datasets"/"models"/"dataset-metadata.json", metadata)
    return {"truth": truth, "cache": cache, "folds": folds, "models": models, "blend": blend, "root": root}
