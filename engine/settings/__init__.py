"""Read settings as users write them: YAML text, `--set` overrides and sizes, with messages for mistakes.

Job specs, the endpoint's arguments and HTTP bodies share them. No torch; types.py and reader.py need pydantic.
"""
