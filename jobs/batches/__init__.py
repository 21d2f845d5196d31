"""The batches of the OpenAI Batch API: their files and records in a store, and what runs them."""
