"""The logged mistakes, by number: each is planted as its author made it, and refused with a message that names the cause.

`pytest tests/test_guards.py -k guard_07` runs number 7. The tests are written in tests/guards/, one file a part of the kit, and collected here; a number without a test shows.
"""
import re

import pytest

PARTS = ("dicom", "folds", "models", "package", "runs", "scores", "submit", "train")
for part in PARTS: pytest.register_assert_rewrite(f"guards.{part}")

from guards.dicom import *
from guards.folds import *
from guards.models import *
from guards.package import *
from guards.runs import *
from guards.scores import *
from guards.submit import *
from guards.train import *

NEEDED = {*range(1, 44), 45}


def test_every_guard_has_its_test():
    have = {int(name.split("_")[2]) for name in globals() if re.match(r"test_guard_\d+_", name)}
    assert not NEEDED-have, f"guards without a test: {sorted(NEEDED-have)}"


def test_no_test_hides_another():
    "Two parts with a test of one name would be one test here; a name equal to a fixture's would hide the fixture."
    from pathlib import Path
    texts = [(Path(__file__).parent/"guards"/f"{part}.py").read_text() for part in PARTS]
    names = [name for text in texts for name in re.findall(r"^(?:def |class )?(\w+)(?:\(| ?=)", text, re.M)]
    mine = {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.M)+re.findall(r"^@pytest\.fixture.*\ndef (\w+)", text, re.M)}
    assert len(mine) > 100
    assert not (twice := sorted(name for name in mine if names.count(name) > 1)), f"defined twice: {twice}"
