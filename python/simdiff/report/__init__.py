"""Pages, charts and terminal tables for people."""
