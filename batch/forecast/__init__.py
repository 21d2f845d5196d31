"""Forecast a job before it runs: its tokens from a sample of its rows, its memory, time and price."""
