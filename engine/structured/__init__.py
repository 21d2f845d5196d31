"""Describe what completions must obey, and find mistakes in it. Pure, except that llguidance is asked for mistakes."""
