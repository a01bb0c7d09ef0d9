"""How long properties are looked for: briefly and the same every time, or ``make fuzz FUZZ=<examples of each>``.

Nothing is written into the tree: no database of examples, and Hypothesis's own tables go to the system's temporary
folder.
"""

import os
import tempfile

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "fscil-hypothesis"))

from hypothesis import HealthCheck, settings

LONG = os.environ.get("FUZZ")

settings.register_profile("quick", max_examples=20, derandomize=True, deadline=None, database=None)
settings.register_profile(
    "long",
    max_examples=int(LONG or 1),
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("long" if LONG else "quick")
