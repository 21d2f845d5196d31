"""The job spec: read YAML, and return one validated JobSpec or report every mistake."""

from moray.batch.spec.job_spec import JobSpec, load_spec

__all__ = ["JobSpec", "load_spec"]
