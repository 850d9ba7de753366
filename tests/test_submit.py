"""Parsing, checking and writing submissions: exact numbers, planted mistakes, whole files or none."""
import io
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrkit.parsing import parse_rows
from cxrkit.submit import SubmissionError, check_submission, infer_grammar, parse_submission, read_predictions, write_submission

SIIM = SimpleNamespace(name="siim", labels={"study": ("negative", "typical"), "image": ("none",)}, box_labels=("opacity",), grammar=("label", "score", "x1", "y1", "x2", "y2"))
RSNA = SimpleNamespace(name="rsna", labels={"image": ("opacity", "normal")}, box_labels=("opacity",), grammar=("score", "x", "y", "w", "h"))
SAMPLE = pd.DataFrame({"id": ["s1_study", "a_image", "b_image"], "PredictionString": ["negative 1 0 0 1 1", "none 1 0 0 1 1", "none 1 0 0 1 1"]})
GOOD = SAMPLE.assign(PredictionString=["negative .2 0 0 1 1 typical .8 0 0 1 1", "none .3 0 0 1 1 opacity .7 10 20 300 400", "none 1 0 0 1 1"])
IMAGES = pd.DataFrame({"image_id": ["a", "b"], "height": [500, 300], "width": [400, 600]})

numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1), st.integers(-10**20, 10**20))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(numbers, st.sampled_from(["{!r}", "{:.6f}", "{:.3e}", "{:g}", "{:.17g}", "{:.25f}"])), min_size=1, max_size=12))
def test_numbers_are_read_as_python_reads_them(pairs):
    words = [form.format(value) for value, form in pairs]
    values = parse_rows([" ".join(words)], 1).values[:, 0]
    assert values.tolist() == [float(w) for w in words]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["opacity 1 2", "näh .5 3", "x 1e-3 -4"]), max_size=4), max_size=6), st.sampled_from([" ", "  ", "\t", " \n "]))
def test_rows_and_labels_survive_any_white_space(rows, space):
    texts = [space.join(w for words in row for w in words.split()) for row in rows]
    words = parse_rows([space+t+space for t in texts], 3, 0)
    assert words.counts.tolist() == [3*len(r) for r in rows]
    flat = [p.split() for r in rows for p in r]
    assert [words.labels[int(c)] for c in words.values[:, 0]] == [p[0] for p in flat]
    assert words.values[:, 1:].tolist() == [[float(p[1]), float(p[2])] for p in flat]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_refused_or_read(text):
    try: rows = read_predictions(pd.DataFrame({"id": ["a"], "p": [text]}), SIIM.grammar)
    except SubmissionError: return
    assert len(rows)*6 == len(text.split()) or not text.isascii() or any(ord(c) < 32 for c in text)


@pytest.mark.parametrize("word", ["nan", "inf", "1_000", "--1", "1e", "0x1p3", "١", "1,5", "None"])
def test_words_that_are_no_numbers_are_named(word):
    with pytest.raises(SubmissionError) as e: check_submission(GOOD.assign(PredictionString=["", f"opacity .5 1 2 {word} 4", ""]), SAMPLE)
    assert "finite" in str(e.value) or f"x2 is {word!r}, expected a number" in str(e.value) and "a_image" in str(e.value)


def test_siim_tables_there_and_back():
    cls_preds, box_preds = parse_submission(GOOD, SIIM)
    assert cls_preds[["level", "unit_id", "label", "prob"]].to_numpy().tolist() == [["study", "s1", "negative", .2], ["study", "s1", "typical", .8], ["image", "a", "none", .3], ["image", "b", "none", 1.]]
    assert box_preds[["image_id", "label", "score", "x1", "y1", "x2", "y2"]].to_numpy().tolist() == [["a", "opacity", .7, 10., 20., 300., 400.]]
    for table, other in zip(parse_submission(GOOD, SIIM), parse_submission(GOOD)): pd.testing.assert_frame_equal(table, other)


def test_rsna_boxes_are_corner_and_size():
    submission = pd.DataFrame({"patientId": ["a", "b"], "PredictionString": ["0.5 10 20 100 50 0.25 0 0 1 1", np.nan]})
    cls_preds, box_preds = parse_submission(submission, RSNA)
    assert len(cls_preds) == 0 and box_preds.label.tolist() == ["opacity"]*2
    assert box_preds[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == [[10, 20, 110, 70], [0, 0, 1, 1]]
    sample = submission.assign(PredictionString="0.5 0 0 100 100")
    assert infer_grammar(sample) == RSNA.grammar
    assert check_submission(submission, sample, RSNA).to_dict() == {"rows": 2, "empty_rows": 1, "predictions": 2}
    with pytest.raises(SubmissionError, match="width and height above 0"): check_submission(submission.assign(PredictionString="0.5 10 20 0 50"), sample)
    with pytest.raises(SubmissionError, match="boxes inside their image"): check_submission(submission.assign(PredictionString=["0.5 350 20 100 50", ""]), sample, RSNA, IMAGES)


def test_a_good_file_is_described():
    report = check_submission(GOOD, SAMPLE, SIIM, IMAGES)
    assert report.to_dict() == {"at_border": 0, "rows": 3, "empty_rows": 0, "predictions": 5, "negative": 1, "none": 2, "opacity": 1, "typical": 1}


def test_order_of_ids_does_not_matter():
    check_submission(GOOD.iloc[::-1], SAMPLE, SIIM)


@pytest.mark.parametrize("strings, message", [
    (["negative .2 0 0 1 1 typical .8 0 0 1", "", ""], "row 0 (id 's1_study'): 11 words are not a multiple of 6"),
    (["", "1 .7 10 20 300 400", ""], "a label, not a number: class codes must be written as the competition's names"),
    (["", "Opacity .7 10 20 300 400", ""], "one of the labels negative, none, opacity, typical"),
    (["opacity .7 10 20 300 400", "", ""], "labels of level 'study' (negative, typical) on ids that end in _study"),
    (["", "negative .7 0 0 1 1", ""], "labels of level 'image' (none, opacity) on ids that end in _image"),
    (["", "opacity 1.7 10 20 300 400", ""], "scores within 0…1"),
    (["", "opacity -0.1 10 20 300 400", ""], "scores within 0…1"),
    (["", "opacity .7 10 20 5 400", ""], "x1 < x2 and y1 < y2"),
    (["", "opacity .7 20 10 450 300", ""], "boxes inside their image"),
    (["", "opacity .7 -9 10 50 300", ""], "boxes inside their image")])
def test_bad_predictions_are_named(strings, message):
    with pytest.raises(SubmissionError) as e: check_submission(GOOD.assign(PredictionString=strings), SAMPLE, SIIM, IMAGES)
    assert message in str(e.value)


def test_a_refused_submission_leaves_the_old_file(tmp_path):
    path = write_submission(GOOD, tmp_path/"submission.csv", SAMPLE, SIIM, IMAGES)
    before = path.read_bytes()
    with pytest.raises(SubmissionError): write_submission(GOOD.assign(PredictionString="opacity"), path, SAMPLE, SIIM)
    with pytest.raises(SubmissionError): write_submission(GOOD.reset_index(), path, SAMPLE, SIIM)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["submission.csv"]
    assert pd.read_csv(io.BytesIO(before)).equals(GOOD)


def test_files_are_checked_like_tables(tmp_path):
    GOOD.to_csv(tmp_path/"with_index.csv")
    SAMPLE.to_csv(tmp_path/"sample.csv", index=False)
    with pytest.raises(SubmissionError, match="written with the index"): check_submission(tmp_path/"with_index.csv", tmp_path/"sample.csv")
    with pytest.raises(SubmissionError, match="submission: no file"): check_submission(tmp_path/"none.csv", tmp_path/"sample.csv")
    GOOD.to_csv(tmp_path/"good.csv", index=False)
    assert check_submission(str(tmp_path/"good.csv"), str(tmp_path/"sample.csv"), SIIM)["rows"] == 3
