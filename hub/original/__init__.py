"""The authors' checkpoints, read and written."""
