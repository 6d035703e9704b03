"""What a run found, for people: tables for the terminal and README, one HTML page, curves.  Reads rows, never a model."""
