"""Files of checkpoints, read without trusting them.  Knows no architecture."""
