"""Settings of all tests. Set before transformers is imported, which reads them once."""

import os


# nothing in the tests needs the Hub: a try to reach it is a mistake that should show at once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
