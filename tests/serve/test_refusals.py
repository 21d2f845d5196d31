"""Requests that the endpoint refuses: by the field's name, in OpenAI's format, before anything runs."""

from functools import reduce
from typing import Any

import pytest
from http_calls import MODEL, call, events
from served import Served

USER = {"role": "user", "content": "hello"}
IMAGE = {
    "role": "user",
    "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def tool(name: str, parameters: Any = None) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOL = tool("add")
DEEP: Any = reduce(lambda inner, _: {"a": inner}, range(300), 1)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "tools: is not supported: chats have tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type",
         "response_format.type: must be 'text', 'json_object' or 'json_schema', is 'xml'"),
        ({"response_format": {"type": "regex"}}, "response_format.type",
         "response_format.type: 'regex' is not supported: structured_outputs.regex is"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema",
         "response_format.json_schema: is required where type is 'json_schema'"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format.json_schema",
         "response_format.json_schema: has no effect where type is 'json_object'; write type 'json_schema'"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema",
         "response_format.schema: is not a field that this endpoint has; did you mean 'json_schema'?"),
        ({"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
         "response_format.json_schema.shema", "response_format.json_schema.shema: is not a field that this endpoint has"
         "; did you mean 'schema'?"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format",
         'response_format: json_schema: Unimplemented keys: ["not"]'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "b" * 300_000}}}},
         "response_format", "response_format: json_schema has 300,008 bytes; at most 262,144 are allowed"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice",
         "structured_outputs.choice: is one of several constraints (regex, choice); a text obeys one, give one"),
        ({"structured_outputs": {"regex": "(a)\\1"}}, "structured_outputs",
         "structured_outputs: regex at character 4: backreferences are not supported"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs",
         "structured_outputs: regex at character 1: unclosed group"),
        ({"structured_outputs": {"choice": ["\ud800"]}}, "structured_outputs", "structured_outputs: choice "),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "structured_outputs: json_schema is not JSON: "),
        ({"structured_outputs": {"json": {"enum": [DEEP]}}}, "structured_outputs", "structured_outputs: json_schema"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs",
         'structured_outputs: grammar at line 1, column 8: unknown name: "nothing"'),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag",
         "structured_outputs.structural_tag: is not supported: structured_outputs.grammar can have a text around its"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern",
         "structured_outputs.whitespace_pattern: is not supported: JSON is compact; the schema itself may have "),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs",
         "structured_outputs: response_format constrains the text already; a text obeys one, give one"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "ignore_eos: must be false"),
        ({"guided_json": {}}, "guided_json", "guided_json: is not supported: its newer name is "),
        ({"best_of": 3}, "best_of", "best_of: must be 1 or n (1), is 3; every sample is returned"),
        ({"best_of": 3, "n": 2}, "best_of", "best_of: must be 1 or n (2), is 3"),
        ({"suffix": "end"}, "suffix", "suffix: is not supported: this endpoint continues a prompt"),
        ({"temprature": 0}, "temprature", "temprature: is not a field that this endpoint has; did you mean 'temp"),
        ({"max_new_tokens": 5}, "max_new_tokens", "max_new_tokens: is not a field that this endpoint has; did you "),
        ({"zzz": 0}, "zzz", "zzz: is not a field that this endpoint has; /docs lists the fields there are"),
        ({"extra_body": {"top_k": 5}}, "extra_body", "extra_body: is an argument of the openai package"),
        ({"store": 0}, "store", "store: is not supported: this endpoint stores nothing"),
        ({"stream_options": {"continuous": True}}, "stream_options.continuous",
         "stream_options.continuous: is not a field that this endpoint has; did you mean 'continuous_usage_stats'?"),
        ({"stream_options": [1]}, "stream_options", "stream_options: must be an object, is [1]"),
        ({"temperature": -1}, "temperature", "temperature: must be a number, between 0.0 and 10.0, is -1.0"),
        ({"temperature": "0"}, "temperature", "temperature: must be a number, is '0'"),
        ({"top_p": 0}, "top_p", "top_p: must be above 0 (use temperature 0 for greedy), is 0"),
        ({"n": 0}, "n", "n: must be a whole number, between 1 and 128, is 0"),
        ({"n": True}, "n", "n: must be a whole number, is true"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens: must be a whole number"),
        ({"max_tokens": 2.5}, "max_tokens", "max_tokens: must be a whole number, is 2.5"),
        ({"logprobs": 21}, "logprobs", "logprobs: must be a whole number, between 0 and 20, is 21"),
        ({"logprobs": 21, "echo": True}, "logprobs", "logprobs: must be a whole number, between 0 and 20, is 21"),
        ({"seed": 2**70}, "seed", "seed: must be a whole number"),
        ({"stop": ""}, "stop", "stop: must be a list of strings that are not empty, is ['']"),
        ({"stop": [1]}, "stop[0]", "stop[0]: must be text, is 1"),
        ({"stop": 1}, "stop", "stop: must be text or a list of texts, is 1"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5", "logit_bias.5: must be a number, is '1'"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "logit_bias: keys are token ids, 'five' is not one"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias: bias of token 5 must be between -100 and 100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "logit_bias: the model's token ids end at"),
        ({"min_tokens": 20}, "min_tokens", "min_tokens: must be at most max_tokens (16), is 20"),
        ({"prompt": []}, "prompt", "prompt: the list is empty"),
        ({"prompt": ""}, "prompt", "the prompt is empty: it has no tokens"),
        ({"prompt": [[]]}, "prompt", "the prompt has no tokens; it needs at least 1."),
        ({"prompt": [5, -1]}, "prompt", "the prompt has token id -1; this model's go from 0 to"),
        ({"prompt": [5, "a"]}, "prompt[1]", "prompt[1]: must be a whole number, is 'a'"),
        ({"prompt": ["a", 5]}, "prompt[1]", "prompt[1]: must be text, is 5"),
        ({"prompt": [[5], "a"]}, "prompt[1]", "prompt[1]: must be a list, is 'a'"),
        ({"prompt": [True]}, "prompt", "prompt: must be text, token ids, or a list of either, is [True]"),
        ({"prompt": {"a": 1}}, "prompt", "prompt: must be text, token ids, or a list of either, is {'a': 1}"),
        ({"model": None}, "model", "model: must be text, is null"),
        ({"prompt": "\ud800"}, "prompt", "the prompt is not valid Unicode at character 0"),
        ({"max_tokens": 10**20}, "max_tokens", "needs 100,000,000,000,000,000,001 tokens (prompt 1 + max_tokens 100,"),
        ({"max_tokens": 2000, "prompt": [5] * 60}, "prompt", "needs 2,060 tokens (prompt 60 + max_tokens 2,000)"),
        ({"max_tokens": 5000}, "max_tokens", "needs 5,001 tokens (prompt 1 + max_tokens 5,000); this model holds 2"),
        ({"stream": True, "echo": True, "logprobs": 1}, "echo", "echo with logprobs is not supported in a stream"),
    ],
)  # fmt: skip
def test_completions(local: Served, fields: dict[str, Any], param: str | None, message: str) -> None:
    reply = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": [5]} | fields)
    assert reply.status == 400
    assert reply.error["message"].startswith(message) and reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error" and reply.error["code"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "messages must be a list that is not empty"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content: is required"),
        ({"messages": USER}, "messages", "messages: must be a list, is {'role': 'user', 'content': 'hello'}"),
        ({"messages": ["hello"]}, "messages[0]", "messages[0]: must be an object, is 'hello'"),
        ({"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[1].role",
         "messages[1].role: 'tool' is not supported: this model's chat template shows no calls of tools"),
        ({"messages": [USER | {"role": "User"}]}, "messages[0].role",
         "messages[0].role: must be 'system', 'developer', 'user', 'assistant' or 'tool', is 'User'"),
        ({"messages": [USER, IMAGE]}, "messages[1].content[1].type",
         "messages[1].content[1].type: 'image_url' is not supported: the model reads text parts only"),
        ({"messages": [USER | {"content": ["hello"]}]}, "messages[0].content[0]",
         "messages[0].content[0]: must be an object, is 'hello'"),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "messages[0].content[0].text",
         "messages[0].content[0].text: is required"),
        ({"messages": [USER | {"content": []}]}, "messages[0].content",
         "messages[0].content: must not be empty, is []"),
        ({"messages": [USER | {"content": None}]}, "messages[0].content",
         "messages[0].content: must be text or a list of text parts, is null"),
        ({"messages": [USER | {"contnet": "a"}]}, "messages[0].contnet",
         "messages[0].contnet: is not a field that this endpoint has; did you mean 'content'?"),
        ({"messages": [USER | {"role": "assistant", "tool_calls": [CALL]}]}, "messages[0].tool_calls",
         "messages[0].tool_calls: is not supported: this model's chat template shows no calls of tools"),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages[0].tool_calls",
         "messages[0].tool_calls: are of answers: only an assistant's message has them"),
        ({"messages": [USER | {"tool_call_id": "c"}]}, "messages[0].tool_call_id",
         "messages[0].tool_call_id: is the id of a call: only a tool's message has it"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id",
         "messages[1].tool_call_id: is required: the id of the call whose result this is"),
        ({"tools": [TOOL]}, "tools",
         "tools: without tool_choice is not supported: this model's chat template knows no tools; set tool_choice to"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice",
         "tool_choice: 'auto' is not supported: this model's chat template knows no tools; set tool_choice to"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice: needs tools; the request has none"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice",
         "tool_choice: must be 'none', 'auto' or 'required', is 'always'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
         "tool_choice.function.name", "tool_choice.function.name: 'sub' is not one of the tools: add"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type",
         "tool_choice.type: 'allowed_tools' is not supported: give those tools alone, and 'auto' or 'required'"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type",
         "tools[0].type: 'custom' is not supported: the input of a custom tool is free text; use a function"),
        ({"tools": [TOOL, TOOL], "tool_choice": "required"}, "tools[1].function.name",
         "tools[1].function.name: 'add' is the name of an earlier tool too"),
        ({"tools": [tool("a b")], "tool_choice": "required"}, "tools[0].function.name",
         "tools[0].function.name: must be 1 to 64 letters, digits, _ or -, is 'a b'"),
        ({"tools": [TOOL, tool("sub", {"type": "array"})], "tool_choice": "required"}, "tools[1].function.parameters",
         "tools[1].function.parameters: must be the schema of an object, has the type 'array'"),
        ({"tools": [TOOL, tool("sub", {"not": {}})], "tool_choice": "required"}, "tools[1].function.parameters",
         'tools[1].function.parameters: json_schema: Unimplemented keys: ["not"]'),
        ({"tools": [tool(f"t{i}") for i in range(129)], "tool_choice": "required"}, "tools",
         "tools: must be at most 128, are 129"),
        ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format",
         "response_format: tools constrains the text already; a text obeys one, give one"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens",
         "max_tokens: is 4, and max_completion_tokens, its newer name, is 5; give one"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens: must be a whole number"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs: needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 30}, "top_logprobs", "top_logprobs: must be a whole number, between 0 and"),
        ({"logprobs": 2}, "logprobs", "logprobs: must be true or false, is 2"),
        ({"service_tier": "standard"}, "service_tier", "service_tier: must be 'auto', "),
        ({"functions": [{"name": "f"}]}, "functions", "functions: is not supported: tools and tool_choice are its"),
        ({"temperature": DEEP}, "temperature", "temperature: must be a number, is "),
        ({"messages": [USER | {"content": "a " * 3000}]}, "messages", "needs "),
        ({"max_completion_tokens": 10**20}, "max_completion_tokens", "needs 100,000,000,000,000,0"),
        ({"max_tokens": 2048}, "max_tokens", "needs 2,0"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "reasoning_effort: is not supported: this model's chat tem"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking",
         "chat_template_kwargs.enable_thinking: the chat template never reads 'enable_thinking', nor any other"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "chat_template_kwargs: must be an object, is [1]"),
    ],
)  # fmt: skip
def test_chats(local: Served, fields: dict[str, Any], param: str | None, message: str) -> None:
    reply = call(f"{local.url}/v1/chat/completions", {"model": MODEL, "messages": [USER]} | fields)
    assert reply.status == 400, reply
    assert reply.error["message"].startswith(message) and reply.error["param"] == param


def test_what_asks_for_nothing_is_taken(local: Served) -> None:
    nothing = {
        "tools": [], "response_format": {"type": "text"}, "tool_choice": "auto", "store": False, "suffix": None,
        "stop": None, "seed": None, "user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "temperature": None,
    }  # fmt: skip
    body = {"model": MODEL, "messages": [USER], "max_tokens": 2} | nothing
    assert call(f"{local.url}/v1/chat/completions", body).status == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{", "invalid_json"), (b"", "invalid_json"), (b"[1]", "invalid_json"), (b"\xff", "invalid_json")],
)
def test_bodies_that_are_none(local: Served, body: bytes, code: str) -> None:
    reply = call(f"{local.url}/v1/completions", body)
    assert (reply.status, reply.error["code"]) == (400, code)


def test_paths_and_methods_that_are_not_there(local: Served) -> None:
    assert (call(f"{local.url}/v2").status, call(f"{local.url}/v2").error["code"]) == (404, "not_found")
    reply = call(f"{local.url}/v1/completions")
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")


def test_a_stream_that_cannot_begin_is_refused_by_its_status(local: Served) -> None:
    body = {"model": MODEL, "prompt": [10**6], "stream": True}
    assert call(f"{local.url}/v1/completions", body).status == 400


def test_a_request_that_is_refused_in_part_runs_in_no_part(local: Served) -> None:
    before = local.endpoint.engine.stats().free_blocks
    reply = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": [[5], [10**6], [6]], "max_tokens": 1000})
    assert reply.status == 400
    end = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": [5], "max_tokens": 1, "stream": True})
    assert len(events(end.text)) >= 1
    assert local.endpoint.engine.num_seqs == 0 and local.endpoint.engine.stats().free_blocks == before


def test_a_bug_shows_no_stack_trace(local: Served, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def bug(prompt: str) -> list[int]:
        raise KeyError(prompt)

    monkeypatch.setattr(local.endpoint, "encode_prompts", bug)
    reply = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": "my secret"})
    assert (reply.status, reply.error["type"], reply.error["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in reply.text and "Traceback" not in reply.text
    assert "KeyError" in caplog.text and "secret" not in caplog.text
