"""lmms-eval's own task modules."""

import importlib.util
import os
from pathlib import Path


def lmms_task(path):
    """A module of lmms-eval's tasks, whose folders are no packages throughout."""
    import lmms_eval

    os.environ.setdefault("OPENAI_API_KEY", "none")
    file = Path(lmms_eval.__file__).parent / "tasks" / path
    spec = importlib.util.spec_from_file_location(f"lmms_{file.parent.name}_{file.stem}".replace("-", "_"), file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
