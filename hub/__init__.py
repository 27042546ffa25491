"""Everything that meets the Hub: the authors' checkpoints, publishing, the demo, benchmarks. Lazy, as the trainers."""

import importlib


_EXPORTS = {
    "convert_checkpoint": "original.convert",
    "export_original": "original.export",
    "publish": "publishing.model",
    "publish_dataset": "publishing.dataset",
    "push_space": "demo.space",
    "run_benchmarks": "evaluation.runner",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
