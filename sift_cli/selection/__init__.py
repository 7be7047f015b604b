"""Which entries are trained: a score, a scope in which entries compete, and a budget."""
