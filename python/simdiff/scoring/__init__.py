"""The calibration pass: read the hidden states of a model and write scores.json."""
