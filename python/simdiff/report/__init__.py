"""The report of a run: plots over depth and one self-contained HTML page."""
