"""Settings of all tests. Set before transformers is imported, which reads them once."""

import os

import pytest
from PIL import ImageFile


# nothing in the tests needs the Hub: a try to reach it is a mistake that should show at once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def cut_images_are_errors(monkeypatch):
    """lmms-eval switches Pillow's check off for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
