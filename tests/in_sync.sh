#!/usr/bin/env bash
# Exported code must be what the notebooks say: export from nothing, clean, and look whether git sees a difference.
set -euo pipefail
cd "$(dirname "$0")/.."
find cxrkit -name '*.py' ! -name '__init__.py' -delete
.venv/bin/nbdev_export
.venv/bin/nbdev_clean
changes=$(git status --porcelain -- nbs cxrkit)
if [ -n "$changes" ]; then
  echo "Notebooks and exported code differ. Run 'make sync', look at the difference, commit it:"
  echo "$changes"
  exit 1
fi
echo "Exports are in sync."
