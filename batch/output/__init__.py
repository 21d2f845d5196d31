"""What a job writes: parts, and beside them its folder of spec, plan, status and events."""
