"""The logged mistakes, by number: each is planted as its author made it, and refused with a message that names the cause.

The tests lie in tests/guards/, one file a part of the kit; here a number without a test shows.
"""
import re
from pathlib import Path

NEEDED = {*range(1, 9), *range(10, 16), *range(17, 29), 30, *range(34, 41)}


def test_every_guard_has_its_test():
    text = "\n".join(p.read_text() for p in (Path(__file__).parent/"guards").glob("test_guards_*.py"))
    have = {int(number) for number in re.findall(r"^def test_guard_(\d+)_", text, re.M)}
    assert not NEEDED-have, f"guards without a test: {sorted(NEEDED-have)}"
