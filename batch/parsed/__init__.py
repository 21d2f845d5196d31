"""Typed columns of generated JSON: the types that a JSON schema gives, and texts read into them."""
