"""ScienceQA accuracy."""
