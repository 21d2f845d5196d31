"""The job spec: YAML in, one validated JobSpec or every mistake out."""

from batch.spec.job_spec import JobSpec, load_spec

__all__ = ["JobSpec", "load_spec"]
