"""Everything that meets the Hub: the authors' checkpoints, publishing, the demo, benchmarks."""
