"""Build the wheels dataset here: `python kaggle_datasets/wheels/build.py [IMAGE …]`, the same as `cxrkit package wheels`."""
import sys
from pathlib import Path

from cxrkit.wheels import package_wheels

here = Path(__file__).resolve().parent
manifest = package_wheels(sys.argv[1:] or None, here, root=here.parents[1])
for name, image in manifest["images"].items(): print(f"{name}: {len(image['wheels'])} wheels, locked in {image['lock']}")
