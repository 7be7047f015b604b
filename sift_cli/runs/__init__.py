"""A run and its folder: the session it works on, and every file that it writes."""
