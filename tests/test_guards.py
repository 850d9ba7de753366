"""The logged mistakes, by number: each is planted as its author made it, and refused with a message that names the cause.

The tests lie in tests/guards/, one file a part of the kit; this file is where they are collected, and where a missing one shows.
"""
import re

from guards.test_guards_dicom import *
from guards.test_guards_folds import *
from guards.test_guards_models import *
from guards.test_guards_package import *
from guards.test_guards_runs import *
from guards.test_guards_scores import *
from guards.test_guards_train import *

NEEDED = {*range(1, 9), *range(10, 16), *range(17, 29), 30, *range(34, 41)}


def test_every_guard_has_its_test():
    have = {int(m[1]) for name in globals() if (m := re.match(r"test_guard_(\d+)_", name))}
    assert not NEEDED-have, f"guards without a test: {sorted(NEEDED-have)}"
