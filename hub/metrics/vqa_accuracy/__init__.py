"""VQA accuracy (VQAv2, TextVQA, VizWiz)."""
