"""Build the code dataset here: `python kaggle_datasets/code/build.py`, the same as `cxrkit package code`."""
from pathlib import Path

from cxrkit.package import package_code

here = Path(__file__).resolve().parent
manifest = package_code(here, root=here.parents[1])
print(f"{here.name}: {', '.join(manifest['files'])}")
