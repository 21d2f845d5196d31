"""What a job writes: its parts, and next to them a folder with its spec, plan, status and events."""
