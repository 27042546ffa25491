"""What the trainers and the Hub side both need, and neither owns: files written whole, locks."""
