import pytest

from moray.batch.spec.template import PromptTemplate


def test_columns_and_braces() -> None:
    template = PromptTemplate("Q: {question} ({{id}} {id})\nA {question}:")
    assert template.columns == ("question", "id")
    assert template.render({"question": "{x}?", "id": 7}) == "Q: {x}? ({id} 7)\nA {x}?:"


def test_a_column_with_a_space_in_its_name() -> None:
    assert PromptTemplate("{my column}").render({"my column": "a"}) == "a"


def test_null_in_a_column() -> None:
    with pytest.raises(ValueError, match=r"^column 'a' is null in this row$"):
        PromptTemplate("{a}").render({"a": None})
