"""Whether a text is a chat template at all, by the language that transformers renders them in: Jinja with loop controls
and blocks named generation."""

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class _Generation(Extension):
    """`{% generation %}` marks what the model says, for those who train it; what stands in it is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own shape

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def find_template_mistake(text: str) -> str | None:
    """Where Jinja stops to understand a template; None where it does not."""
    try:
        Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).compile(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None
