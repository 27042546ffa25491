"""Rows from any source: LLaVA JSON, CSV, parquet, folders, the Hub, streams."""
