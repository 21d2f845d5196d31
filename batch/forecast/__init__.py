"""What a job will take, before it is run: tokens from a sample of its rows, memory, time and price."""
