"""Document and check a pruned directory: its model card, its origin, its verification."""
