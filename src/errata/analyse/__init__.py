"""What an edit rests on, as numbers and plots: `errata.analyse.keys`."""
