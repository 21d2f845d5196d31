"""The real-time endpoint: the engine behind Ray Serve. See docs/serving.md."""
