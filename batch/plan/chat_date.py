"""Fix the date that a job's chat template may ask for, so that a job that is resumed tomorrow, or retried on another
machine, has the prompts of its first day."""

from datetime import date

from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import read_component
from moray.batch.plan.model_info import read_chat_template
from moray.batch.spec import JobSpec
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.errors import Problem, SpecError
from moray.engine.text.chat_template import reads_clock


def find_chat_template(spec: JobSpec, model: ModelSource) -> tuple[str, str]:
    """Return the name of the file with the job's chat template, and the template; both empty where there is none."""
    if spec.template.chat != "auto":
        return "template.chat", spec.template.chat
    return read_chat_template(model) or ("", "")


def resolve_date(spec: JobSpec, model: ModelSource) -> JobSpec:
    """Return the spec with the date of its chats, where their template asks for one: the date of the job in the output
    folder if there is one, else today's.

    Raises SpecError where the spec gives a date that the template does not ask for.
    """
    has_clock = spec.input.kind == "messages" and reads_clock(find_chat_template(spec, model)[1])
    if spec.template.date != "today":
        if not has_clock:
            message = f"the chat template does not ask for the date; drop it, is {spec.template.date!r}"
            raise SpecError([Problem("template.date", message)])
        return spec
    if not has_clock:
        return spec
    day = read_component(OutputFolder(spec.output.path), "template.date") or date.today().isoformat()
    return spec.model_copy(update={"template": spec.template.model_copy(update={"date": day})})
