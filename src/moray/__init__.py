"""Batch inference and serving of mixture-of-experts language models on Ray."""
