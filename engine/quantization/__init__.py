"""Weights of few bits: what they are, how a model's weights become them, and how they are published."""
