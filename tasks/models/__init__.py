"""Networks that more than one task can use."""
