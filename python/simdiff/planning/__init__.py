"""Make plans from scores, with evaluations where wanted, and tell how sure they are."""
