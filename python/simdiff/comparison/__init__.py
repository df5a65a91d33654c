"""Compare criteria of one model at several numbers of removed layers."""
