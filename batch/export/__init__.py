"""Export the rows of a job to other formats."""
