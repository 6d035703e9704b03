"""The subjects nearest to the one that is edited: half of them for training, half of them to watch."""
