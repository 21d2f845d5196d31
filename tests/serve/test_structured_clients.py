"""Libraries that ask for objects, unchanged: each gets one that obeys its model.

The libraries beside the openai package are no dependencies of the development: without them their tests are skipped.
"""

import asyncio
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from http_calls import MODEL
from pydantic import BaseModel, Field
from served import Served

ASK: list[Any] = [{"role": "user", "content": "Describe Ada, who is 36 and likes tea."}]


class Drink(BaseModel):
    """Something to drink."""

    name: Literal["tea", "coffee"]
    is_hot: bool


class Person(BaseModel):
    """A person, with what they like."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=150)
    drinks: list[Drink] = Field(max_length=2)


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, which nothing else here needs")


@pytest.fixture(scope="module")
def client(local: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{local.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_openai_package_parses_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Person, max_tokens=100, seed=1)
    assert isinstance(answer.choices[0].message.parsed, Person)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Person, max_tokens=5)


def test_the_openai_package_parses_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, response_format=Person, max_tokens=100, seed=1
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        message = stream.get_final_completion().choices[0].message
    assert isinstance(message.parsed, Person) and message.content == text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Person"}}])
def test_the_openai_package_parses_calls(client: openai.OpenAI, choice: Any) -> None:
    tools = [openai.pydantic_function_tool(Person), openai.pydantic_function_tool(Drink)]
    fields: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": tools, "tool_choice": choice}
    answer = client.chat.completions.parse(**fields, max_tokens=120, seed=2)
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Person if isinstance(choice, dict) else Person | Drink)
    with client.chat.completions.stream(**fields, max_tokens=120, seed=2) as stream:
        assert any(event.type == "tool_calls.function.arguments.done" for event in stream)
        streamed = stream.get_final_completion().choices[0]
    (again,) = streamed.message.tool_calls or []
    assert again.function.parsed_arguments == call.function.parsed_arguments
    assert streamed.finish_reason == answer.choices[0].finish_reason


def test_a_call_of_the_async_client_sent_back_is_refused_where_no_template_shows_it(local: Served) -> None:
    async def ask() -> openai.BadRequestError:
        async with openai.AsyncOpenAI(base_url=f"{local.url}/v1", api_key="any", max_retries=0) as client:
            fields: dict[str, Any] = {"model": MODEL, "tools": [openai.pydantic_function_tool(Drink)]}
            fields |= {"tool_choice": "required", "max_tokens": 60}
            message = (await client.chat.completions.create(messages=ASK, **fields)).choices[0].message
            assert message.tool_calls
            result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(messages=[*ASK, message.model_dump(), result], **fields)
            return refused.value

    assert asyncio.run(ask()).param == "messages[1].tool_calls"


@pytest.mark.slow
@needs("instructor")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "TOOLS_STRICT"])
def test_instructor(client: openai.OpenAI, mode: str) -> None:
    import instructor

    patched = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
    person = patched.chat.completions.create(
        model=MODEL, messages=ASK, response_model=Person, max_tokens=200, max_retries=0
    )
    assert isinstance(person, Person)


@pytest.mark.slow
@needs("pydantic_ai")
@pytest.mark.filterwarnings("ignore")
def test_pydantic_ai(local: Served) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{local.url}/v1", api_key="any"))
    agent = Agent(model, output_type=Person, model_settings={"max_tokens": 200})
    assert isinstance(agent.run_sync(ASK[0]["content"]).output, Person)


@pytest.mark.slow
@needs("langchain_openai")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_langchain(local: Served, method: Any) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=f"{local.url}/v1", api_key="any", max_tokens=200, max_retries=0)  # type: ignore[call-arg,arg-type]
    assert isinstance(model.with_structured_output(Person, method=method).invoke(ASK[0]["content"]), Person)
