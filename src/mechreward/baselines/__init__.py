"""Prior art, reproduced."""
