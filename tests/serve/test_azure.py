"""/score, in Azure ML's schema."""

from typing import Any

import pytest
from http_calls import MODEL, Reply, call
from served import Served

SUM = "The sum of 86 and 16 is"


def score(local: Served, inputs: Any, **parameters: Any) -> Reply:
    body = {"input_data": {"input_string": inputs, "parameters": parameters}}
    return call(f"{local.url}/score", body)


def test_the_sample_request(local: Served) -> None:
    reply = score(local, ["the meaning of life is"], temperature=0.5, top_p=0.5, max_new_tokens=100, do_sample=True)
    (answer,) = reply.json
    assert reply.status == 200 and answer.keys() == {"0"} and answer["0"].startswith("the meaning of life is")


def test_one_object_an_input_in_order(local: Served) -> None:
    assert score(local, [SUM, "CEMENT reversed is"]).json == [{"0": f"{SUM} 102"}, {"0": "CEMENT reversed is TNEMEC"}]
    assert score(local, [SUM], return_full_text=False).json == [{"0": " 102"}]
    assert call(f"{local.url}/score", {"input_data": {"input_string": [SUM]}}).json == [{"0": f"{SUM} 102"}]


def test_chats(local: Served) -> None:
    chat = [{"role": "user", "content": "Add 86 and 16."}]
    assert score(local, [chat, chat]).json == [{"0": "102"}, {"0": "102"}]
    assert score(local, chat).json == [{"0": "102"}]


def test_null_is_the_default(local: Served) -> None:
    nulls = dict.fromkeys(("temperature", "top_k", "max_new_tokens", "do_sample", "stop", "seed", "num_beams"))
    assert score(local, [SUM], num_beams=1, **{k: v for k, v in nulls.items() if k != "num_beams"}).json == [
        {"0": f"{SUM} 102"}
    ]
    assert score(local, [SUM], top_k=-1, **{k: v for k, v in nulls.items() if k != "top_k"}).status == 200


def test_without_do_sample_temperature_means_nothing(local: Served) -> None:
    assert score(local, [SUM], temperature=5.0).json == [{"0": f"{SUM} 102"}]


def test_the_same_seed_gives_the_same_text(local: Served) -> None:
    texts = [score(local, ["In"], do_sample=True, temperature=2.0, seed=seed).json for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ([], {}, "input_data.input_string: the list is empty"),
        (["a"], {"num_beams": 4}, "input_data.parameters.num_beams: is not supported: this endpoint samples"),
        (
            ["a"],
            {"max_tokens": 4},
            "input_data.parameters.max_tokens: is not a field that this endpoint has; did you mean",
        ),
        (["a"], {"temperature": "1"}, "input_data.parameters.temperature: must be a number, is '1'"),
        (
            ["a"],
            {"max_new_tokens": -3},
            "input_data.parameters.max_new_tokens: must be a whole number, 0 or more, is -3",
        ),
        (
            [[{"role": "user", "content": "a"}]],
            {"return_full_text": True},
            "input_data.parameters.return_full_text: a chat",
        ),
        (
            "a",
            {},
            "input_data.input_string: must be a list of prompts, a list of chats, or one chat: a list of messages, is",
        ),
        (["a", 5], {}, "input_data.input_string[1]: must be text, is 5"),
        ([[{"role": "tool", "content": "a"}]], {}, "input_data.input_string[0][0].role: 'tool' is not supported"),
        ([{"role": "user"}], {}, "input_data.input_string[0].content: is required"),
        ([""], {}, "the prompt is empty"),
    ],
)
def test_refusals(local: Served, inputs: Any, parameters: dict[str, Any], message: str) -> None:
    reply = score(local, inputs, **parameters)
    assert reply.status == 400 and reply.error["message"].startswith(message)
    assert reply.error["param"].startswith("input_data.")
    assert MODEL not in reply.text


def test_too_many_new_tokens_are_refused_by_their_name(local: Served) -> None:
    reply = score(local, ["a"], max_new_tokens=10**20)
    assert (reply.status, reply.error["param"]) == (400, "input_data.parameters.max_new_tokens")
