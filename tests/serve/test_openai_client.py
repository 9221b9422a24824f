"""OpenAI's own client against a real server: what it insists on is what users' programs insist on."""

from __future__ import annotations

import json

import pytest
from serving import TOKEN, server, write_model

openai = pytest.importorskip("openai", reason="needs the package openai, which the extra [parity] has")
pytestmark = pytest.mark.slow

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with server(write_model(tmp_path_factory.mktemp("served")), TOKEN) as (started, _):
        with openai.OpenAI(base_url=f"{started.url}/v1", api_key=TOKEN) as client:
            yield client


def chat(client, **asked):
    return client.chat.completions.create(model="tiny", messages=HELLO, **{"max_tokens": 12, "seed": 1} | asked)


def test_a_chat_its_stream_and_its_seed(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content == chat(client).choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    with client.chat.completions.stream(model="tiny", messages=HELLO, max_tokens=12, seed=1) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "content.delta"]
    assert snapshots[-1] == said


def test_logprobs_stop_and_several_answers(client):
    answer = chat(client, logprobs=True, top_logprobs=2, n=2, temperature=0)
    for choice in answer.choices:
        told = choice.logprobs.content
        assert bytes(byte for one in told for byte in one.bytes).decode(errors="replace") == choice.message.content
        assert all(len(one.top_logprobs) == 2 for one in told)
    whole = answer.choices[0].message.content
    cut = chat(client, temperature=0, stop=[whole[3:5]]).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == whole[: whole.index(whole[3:5])]


def test_completions_of_several_prompts(client):
    asked = {"model": "tiny", "max_tokens": 8, "seed": 2, "logprobs": 1}
    both = client.completions.create(prompt=["Once", "Twice"], **asked)
    for index, prompt in enumerate(("Once", "Twice")):
        alone = client.completions.create(prompt=prompt, **asked).choices[0]
        assert (alone.text, alone.logprobs) == (both.choices[index].text, both.choices[index].logprobs)
    streamed = client.completions.create(prompt="Once", stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in streamed) == both.choices[0].text


def test_an_answer_is_parsed_into_the_type_that_was_asked_for(client):
    pytest.importorskip("llguidance")
    from pydantic import BaseModel

    class Pet(BaseModel):
        age: int
        tame: bool

    asked = {"model": "tiny", "messages": HELLO, "response_format": Pet, "max_tokens": 60, "seed": 3}
    parsed = client.chat.completions.parse(**asked).choices[0].message
    assert isinstance(parsed.parsed, Pet) and json.loads(parsed.content).keys() == {"age", "tame"}


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(client, temperature=3)
    with pytest.raises(openai.NotFoundError, match="'tiny', and not 'gpt-4o'"):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_a_stream_that_the_server_ends_raises_with_the_reason(tmp_path):
    with server(write_model(tmp_path)) as (started, _):
        with openai.OpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=0) as client:
            stream = chat(client, stream=True, max_tokens=200, temperature=0)
            next(iter(stream))
            started.close()
            with pytest.raises(openai.APIError, match="the server is ending"):
                list(stream)
            with pytest.raises(openai.APIConnectionError):
                chat(client)
