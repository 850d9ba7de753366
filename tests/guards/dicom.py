"""Guards 2, 17, 18 and 31 of the cache: the mistake as its author made it, and the refusal."""
import cv2
import numpy as np
import pandas as pd
import pytest

from cxrkit.dicom import Policy, build_cache, check_policy, open_cache, rehearse_decoding


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(4): cv2.imwrite(str(folder/f"{i}.png"), cv2.GaussianBlur(rng.integers(0, 256, (90, 120), np.uint8), (0, 0), 3))
    return pd.DataFrame([dict(image_id=f"i{i}", study_id=f"s{i}", patient_id=f"p{i}", path=str(folder/f"{i}.png"), split="train" if i < 2 else "test") for i in range(4)])


def built(images, out, size, policy="percentile"):
    build_cache(images, out, size, policy=policy, workers=1, backend="thread", progress=False)
    return open_cache(out)


def test_guard_02_validation_images_scaled_another_way(images, tmp_path):
    "Training images were scaled, validation images were not: AUC .5. Here scaling belongs to the cache, and is compared."
    train = built(images[:2], tmp_path/"train", 64)
    valid = built(images[2:], tmp_path/"valid", 64, "minmax")
    assert train["i0"].dtype == valid["i2"].dtype == np.uint8
    with pytest.raises(ValueError, match="validation images: the images were made by another policy: scaling is 'minmax', expected 'percentile'; build the cache with the expected policy"):
        check_policy(valid.policy, train.policy, "validation images")
    check_policy(built(images[2:], tmp_path/"again", 64).policy, train.policy)
    with pytest.raises(ValueError, match="holds another cache .*policy"): build_cache(images[:2], tmp_path/"train", 64, policy="minmax", progress=False)


def test_guard_02_model_fed_images_that_were_scaled_another_way(images, tmp_path):
    "The policy goes into the weights' file; predicting from another cache is refused, and so is packing for a submission that would scale like another cache."
    from cxrkit.classifier import ClassifierConfig, build_classifier
    from cxrkit.models import describe_blend
    from cxrkit.package import PackageError
    from cxrkit.predict import load_task, predict_table
    from cxrkit.weights import load_meta, save_weights
    from fakeruns import write_project, write_weights
    train, other = built(images, tmp_path/"train", 64), built(images, tmp_path/"other", 64, Policy(clahe=2.))
    save_weights(build_classifier(ClassifierConfig("test_efficientnet", (64, 64), ("none", "some"))), tmp_path/"model.safetensors", {"policy": train.policy})
    task = load_task(tmp_path/"model.safetensors").eval()
    assert len(predict_table(task, train.images, train, "identity")[0]) == 2*len(images)
    with pytest.raises(ValueError, match="predict: the images were made by another policy: clahe is 2.0, expected 0.0"): predict_table(task, other.images, other, "identity")
    project = write_project(tmp_path/"project")
    run = project["models"][0]
    assert describe_blend(project["blend"], project["models"])["cache"]["policy"] == train.policy
    meta = load_meta(run.path/"model.safetensors")
    write_weights(run.path/"model.safetensors", meta.pop("config"), meta | {"policy": other.policy}, 0)
    with pytest.raises(PackageError, match=f"{run.run_id}: the images were made by another policy: clahe is 0.0, expected 2.0.*train it again"): describe_blend(project["blend"], project["models"])


def test_guard_17_classifier_trained_at_384_and_fed_512(images, tmp_path):
    "LB .187 instead of .194: a model of 384 pixels got images of 512."
    built(images, tmp_path/"c", 512)
    with pytest.raises(ValueError, match="expected size 384x384, the cache holds 512x512; images are never rescaled silently"): open_cache(tmp_path/"c", 384)


def test_guard_18_one_of_two_models_at_another_size_in_the_cache(images, tmp_path):
    "LB .393 instead of .399: one model of the ensemble ran at 384 instead of 512. With both sizes in the cache each model asks for its own."
    built(images, tmp_path/"c", [384, (512, 640)])
    assert open_cache(tmp_path/"c", 384)["i0"].shape == (384, 384)
    assert open_cache(tmp_path/"c", (512, 640))["i0"].shape == (512, 640)
    with pytest.raises(ValueError, match="expected size 640x512, the cache holds 384x384, 512x640"): open_cache(tmp_path/"c", (640, 512))


def test_guard_31_submission_that_runs_out_of_time_while_decoding(images):
    "The loop was fine on the public files and timed out on 32,000 hidden ones. A rehearsal multiplies before it counts."
    with pytest.raises(ValueError, match=r"decoding 32,000 images would take .* h, 1e-06 h are allowed; use more workers, a smaller size or Policy\(detail='fast'\)"):
        rehearse_decoding(images, 64, 32_000, 1e-6, workers=2)
    estimate = rehearse_decoding(images, 64, 32_000, 9, workers=2)
    assert 0 < estimate["hours_expected"] < 9 and estimate["decoders"] == {"OpenCV libpng": 4}
