"""`python -m fxopt.ir.schema` writes the JSON Schema of plans to `docs/plan.schema.json`."""

from __future__ import annotations

import sys
from pathlib import Path

from .plan import Plan
from .store import write_text

if __name__ == "__main__":
    write_text(Path(*sys.argv[1:2] or ["docs/plan.schema.json"]), Plan.schema_text())
