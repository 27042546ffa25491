"""GQA accuracy."""
