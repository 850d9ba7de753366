"""Build the models dataset here: `python kaggle_datasets/models/build.py COMP [BLEND]`, the same as `cxrkit package models`."""
import sys
from pathlib import Path

from cxrkit.manifest import tell_models
from cxrkit.models import package_models

here = Path(__file__).resolve().parent
manifest, scores = package_models(sys.argv[1] if len(sys.argv) > 1 else "toy", blend=sys.argv[2] if len(sys.argv) > 2 else "", out=here, root=here.parents[1])
print(tell_models(manifest))
