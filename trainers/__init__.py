"""Both training stages of AlignGPT, from raw image-text pairs to a trained model. Lazy: the CLI starts at once."""

import importlib


_EXPORTS = {
    "AlignGPTDataCollator": "collator",
    "AlignGPTInstructConfig": "instruct_config",
    "AlignGPTInstructTrainer": "instruct_trainer",
    "DummyImageCallback": "dummy_image",
    "AlignGPTPretrainConfig": "pretrain_config",
    "AlignGPTPretrainTrainer": "pretrain_trainer",
    "ScoreConfig": "scoring.config",
    "load_rows": "data.load",
    "score_dataset": "scoring.run",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
