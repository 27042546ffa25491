"""Models and data sets on their way to the Hub: checks, cards, upload."""
