"""`aurora serve` over HTTP as any client has it: a real server in this process, a tiny model with random weights."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import subprocess
import sys
import time

import pytest
from asking import served
from kit import TINY, in_process
from malformed import CHAT, MALFORMED, TEXT
from serving import TOKEN, Client, at_once, server, write_model

from aurora_train.errors import UserError

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "seed": 1}
LONG = HELLO | {"max_tokens": 200, "temperature": 0}  # the likeliest tokens of this model do not end it
ONCE = {"prompt": "Once", "max_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def running(model):
    with server(model, waiting=200) as (started, ask):
        yield started, ask


@pytest.fixture(scope="module")
def ask(running):
    return running[1]


def chat(ask, **fields) -> dict:
    answer = ask.post(CHAT, HELLO | fields)
    assert answer.status == 200, answer.body
    return answer.body


def text_of(events: list) -> str:
    """The text of a streamed chat, whose events have to be complete."""
    assert events[-1] == "[DONE]" and events[0]["choices"][0]["delta"]["role"] == "assistant"
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return "".join(choice["delta"].get("content", "") for choice in choices)


# ---- what is answered


def test_a_stream_is_the_answer_in_pieces_and_a_seed_gives_it_again(ask):
    whole = chat(ask)
    assert whole["object"] == "chat.completion" and whole["model"] == "tiny" and whole["id"].startswith("chatcmpl-")
    choice, used = whole["choices"][0], whole["usage"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"] <= used["prompt_tokens"] + 12
    events = ask.events(CHAT, HELLO | {"stream_options": {"include_usage": True}})
    assert text_of(events) == choice["message"]["content"]
    assert events[-2]["choices"] == [] and events[-2]["usage"] == used
    assert len({chat(ask, seed=seed)["choices"][0]["message"]["content"] for seed in range(4)}) > 1
    drawn = {chat(ask, seed=None)["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(drawn) > 1, "without a seed every answer has its own"


def test_what_changes_no_answer_is_ignored(ask):
    plain = chat(ask)["choices"]
    more = {"user": "me", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "logit_bias": {}, "tools": [],
            "n": None, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "parallel_tool_calls": True,
            "max_completion_tokens": 12, "modalities": ["text"]}  # fmt: skip
    assert chat(ask, **more)["choices"] == plain
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert chat(ask, messages=parts)["choices"] == plain


def test_an_answer_ends_before_a_stop_whether_it_is_streamed_or_not(ask):
    whole = chat(ask, max_tokens=60)["choices"][0]["message"]["content"]
    stop = whole[20:23]
    before = whole[: whole.index(stop)]
    for stops in (stop, ["never there", stop]):
        choice = chat(ask, max_tokens=60, stop=stops)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (before, "stop")
    assert text_of(ask.events(CHAT, HELLO | {"max_tokens": 60, "stop": stop})) == before


def test_log_probabilities_are_those_of_the_tokens_and_their_bytes_are_the_text(ask):
    asked = {"logprobs": True, "top_logprobs": 3, "temperature": 0}
    choice = chat(ask, **asked)["choices"][0]
    told = choice["logprobs"]["content"]
    for one in told:
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] == max(t["logprob"] for t in one["top_logprobs"])
        assert one["token"] == one["top_logprobs"][0]["token"] and len(one["top_logprobs"]) == 3
        assert sum(math.exp(t["logprob"]) for t in one["top_logprobs"]) <= 1 + 1e-6
    said = bytes(byte for one in told for byte in one["bytes"])
    assert said.decode(errors="replace") == choice["message"]["content"]
    streamed = [c["logprobs"]["content"] for e in ask.events(CHAT, HELLO | asked)[:-1] for c in e["choices"]
                if c["logprobs"]]  # fmt: skip
    assert [one for part in streamed for one in part] == told
    older = ask.post(TEXT, ONCE | {"logprobs": 2, "temperature": 0}).body["choices"][0]
    columns = older["logprobs"]
    assert {len(column) for column in columns.values()} == {len(columns["tokens"])}
    assert all(len(top) == 2 and max(top.values()) == own for top, own in
               zip(columns["top_logprobs"], columns["token_logprobs"], strict=True))  # fmt: skip
    assert columns["text_offset"][0] == 0 and columns["text_offset"] == sorted(columns["text_offset"])
    assert ask.post(TEXT, ONCE | {"logprobs": 0}).body["choices"][0]["logprobs"]["top_logprobs"][0] == {}


def test_several_prompts_and_answers_are_those_of_one_at_a_time(ask):
    many = ask.post(TEXT, ONCE | {"prompt": ["Once", "Twice"], "n": 2}).body
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in many["choices"]]
    assert texts[0::2] == [ask.post(TEXT, ONCE | {"prompt": p}).body["choices"][0]["text"] for p in ("Once", "Twice")]
    assert texts[0] != texts[1], "two answers to one prompt are drawn apart"
    used = many["usage"]
    assert used["prompt_tokens"] == sum(
        ask.post(TEXT, ONCE | {"prompt": p}).body["usage"]["prompt_tokens"] for p in ("Once", "Twice"))  # fmt: skip
    streamed = [""] * 4
    for event in ask.events(TEXT, ONCE | {"prompt": ["Once", "Twice"], "n": 2})[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts
    echoed = ask.post(TEXT, ONCE | {"echo": True}).body["choices"][0]["text"]
    assert echoed == "Once" + texts[0]


def test_a_prompt_of_ids_is_taken_as_it_is(ask):
    one = ask.post(TEXT, ONCE | {"prompt": [0, 50, 51]}).body
    assert one["usage"]["prompt_tokens"] == 3
    two = ask.post(TEXT, ONCE | {"prompt": [[0, 50, 51], [0, 60]]}).body
    assert two["choices"][0]["text"] == one["choices"][0]["text"] and len(two["choices"]) == 2


def test_fifty_streams_at_once_are_the_answers_of_one_at_a_time(ask):
    asked = [HELLO | {"messages": [{"role": "user", "content": "word " * (n % 9 + 1)}], "seed": n} for n in range(50)]
    alone = [ask.post(CHAT, body).body["choices"][0]["message"]["content"] for body in asked]
    assert at_once(lambda body: text_of(ask.events(CHAT, body)), asked) == alone and len(set(alone)) > 25


def test_an_answer_keeps_to_its_schema_or_expression(ask):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99},
                                               "kind": {"enum": ["cat", "dog"]}},
              "required": ["age", "kind"], "additionalProperties": False}  # fmt: skip
    for seed in range(3):
        form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
        choice = chat(ask, response_format=form, max_tokens=80, seed=seed)["choices"][0]
        found = json.loads(choice["message"]["content"])
        assert found.keys() == {"age", "kind"} and 0 <= found["age"] <= 99 and choice["finish_reason"] == "stop"
        streamed = text_of(ask.events(CHAT, HELLO | {"response_format": form, "max_tokens": 80, "seed": seed}))
        assert streamed == choice["message"]["content"]
    form = {"type": "regex", "pattern": "[a-c]{3}-\u20ac[0-9]{2}"}
    content = ask.post(TEXT, ONCE | {"response_format": form, "max_tokens": 40}).body["choices"][0]["text"]
    assert re.fullmatch(form["pattern"], content)
    for bad in ({"type": "regex", "pattern": "(a"}, {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}):
        refused = ask.post(CHAT, HELLO | {"response_format": bad})
        assert refused.status == 400 and refused.error["param"] == "response_format", refused.body


def test_without_llguidance_the_command_that_installs_it_is_named(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)  # what Python does where it is not installed
    refused = ask.post(CHAT, HELLO | {"response_format": {"type": "json_object"}})
    assert refused.status == 501 and "pip install 'aurora_train[constrain]'" in refused.error["message"]


def test_the_model_is_listed_with_its_licence_and_its_length(ask):
    listed = ask("GET", "/v1/models").body["data"]
    assert [one["id"] for one in listed] == ["tiny"] and listed[0]["licence"] == "apache-2.0"
    assert listed[0]["context_length"] == 256 and listed[0]["chat"] is True
    assert ask("GET", "/v1/models/tiny").body == listed[0] and ask("GET", "/v1/models/other").status == 404


# ---- what is refused


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_a_malformed_request_is_refused_with_a_reason_and_the_field(ask, number):
    path, body, param = MALFORMED[number]
    answer = ask.post(path, body)
    assert 400 <= answer.status < 500, answer.body
    assert len(answer.error["message"]) > 10 and answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == param, answer.error


def test_there_are_a_hundred_of_them_and_after_all_the_server_answers(ask):
    assert len(MALFORMED) >= 100
    assert chat(ask)["choices"] and ask("GET", "/health").body == {"status": "ok"}
    assert ask.metric("aurora_answers_open") == 0


def test_a_misspelt_field_is_named_with_the_one_that_was_meant(ask):
    assert "`temperature`" in ask.post(CHAT, HELLO | {"temprature": 1}).error["message"]


@pytest.mark.parametrize(
    "method,path,body,headers,status,says",
    [
        ("GET", "/v2/models", None, {}, 404, "there is no /v2/models"),
        ("GET", CHAT, None, {}, 405, "takes no GET"),
        ("POST", CHAT, b"{}", {"Content_Type": "text/plain"}, 415, "Content-Type: application/json"),
        ("POST", CHAT, b" " * ((16 << 20) + 1), {}, 413, "16 MiB"),
        ("GET", "/v1/models", None, {"Host": "evil.example"}, 403, "not called 'evil.example'"),
        ("GET", "/", None, {"Host": "evil.example:8000"}, 403, "--allow-host"),
        ("GET", "/metrics", None, {"Host": ""}, 403, "not called ''"),
        ("POST", CHAT, HELLO, {"Origin": "https://evil.example"}, 403, "a page of https://evil.example"),
        ("POST", CHAT, HELLO, {"Origin": "null"}, 403, "a page of null"),
        ("POST", CHAT, HELLO, {"Origin": "http://localhost:1"}, 403, "a page of http://localhost:1"),
    ],
)
def test_a_stranger_and_a_wrong_address_are_refused(ask, method, path, body, headers, status, says):
    answer = ask(method, path, body, **headers)
    assert answer.status == status and says in answer.error["message"]


def test_the_page_asks_from_its_own_origin_and_may_reach_nothing_else(ask):
    page = ask("GET", "/")
    assert page.status == 200 and b"<script>" in page.body
    assert b"http" not in page.body.replace(b"http://www.w3.org", b""), "it takes nothing from elsewhere"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in (f"localhost:{ask.port}", f"127.0.0.1:{ask.port}", f"[::1]:{ask.port}", "LOCALHOST"):
        assert ask.post(CHAT, HELLO | {"max_tokens": 1}, Host=name, Origin=f"http://{name}").status == 200


def test_only_the_token_opens_a_server_that_has_one(model):
    with server(model, TOKEN, hosts=("box.lab",)) as (_, ask):
        for given in (None, "Bearer ", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"):
            for path in ("/v1/models", "/metrics", CHAT, "/nowhere"):
                answer = ask("GET", path, Authorization=given)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert TOKEN not in json.dumps(answer.body)
        assert ask("GET", "/").status == ask("GET", "/health").status == 200
        assert ask("GET", "/v1/models", Authorization=f"Bearer {TOKEN}", Host="box.lab:80").status == 200


# ---- slots


def test_a_client_that_leaves_frees_its_slot(ask):
    gone = ask.metric('aurora_answers_total{reason="left"}') if "left" in _metrics(ask) else 0
    for stream in (True, False):
        asked = json.dumps(LONG | {"stream": stream, "n": 4}).encode()
        with socket.create_connection(("127.0.0.1", ask.port)) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(asked)}\r\n\r\n".encode() + asked)
            if stream:
                assert b"200" in connection.recv(100)
            else:
                _until(lambda: ask.metric("aurora_answers_open") == 4)
        _until(lambda: ask.metric("aurora_answers_open") == 0)
    assert ask.metric('aurora_answers_total{reason="left"}') > gone
    assert chat(ask)["choices"], "and others take it"


def _metrics(ask) -> str:
    return ask("GET", "/metrics").body.decode()


def _until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline


def test_who_finds_no_room_is_told_when_to_come_again(model):
    with server(model, waiting=0) as (_, ask):
        with ask.open("POST", CHAT, LONG | {"n": 4, "stream": True}) as first:
            first.readline()
            second = ask.post(CHAT, HELLO)
            assert (second.status, second.error["code"]) == (429, "server_busy") and int(second.headers["retry-after"])
            assert ask.post(CHAT, HELLO | {"n": 5}).status == 400, "which will never have room"


def test_the_end_of_a_server_ends_its_streams_with_a_reason(model):
    with server(model) as (started, ask):
        with ask.open("POST", CHAT, LONG | {"stream": True}) as stream:
            stream.readline()
            started.close()
            last = [line for line in stream.read().decode().split("\n") if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        with pytest.raises(OSError):
            ask("GET", "/health")


# ---- the command


def test_the_verb_says_how_to_ask_and_ends_at_a_signal(model, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = {}

    def asks(place):
        ask = Client(int(place.rpartition(":")[2]))
        found["models"] = ask("GET", "/v1/models").body["data"][0]["id"]
        with contextlib.suppress(OSError):
            found["chat"] = ask.post(CHAT, HELLO).status

    assert served(["serve", str(model), "--slots", "4", "--length", "256"], asks) == 0
    assert found == {"models": "tiny", "chat": 200}
    said = capsys.readouterr().err
    for told in ('base_url="http://127.0.0.1:', "curl http://127.0.0.1:", "4 slots of 256 tokens"):
        assert told in said


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["--host", "0.0.0.0"], "--token-file FILE with a secret"),
        (["--length", "9000"], "the model was made for 8,192 tokens"),
        (["--memory", "1MB"], "fewer --slots"),
        (["--memory", "90000TB"], "there is no room for 90"),
        (["--memory", "much"], "a size such as"),
        (["--weights", "int3"], "int3"),
        (["--template", "missing.jinja"], "missing.jinja"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_message(model, arguments, says, capsys):
    assert in_process("serve", model, "--port", "0", *arguments) == 2
    assert says in capsys.readouterr().err


def test_there_is_no_room_beside_a_run_whose_plan_takes_it(tmp_path):
    from aurora_train.machine.profile import this_machine
    from aurora_train.serve.room import refuse_without, training_here

    run, machine = tmp_path / "arm", this_machine()
    run.mkdir()
    (run / "config.yaml").write_text("recipe: language_model\n")
    (run / "plan.json").write_text(json.dumps({"platform": "cpu", "predicted_bytes": machine.memory.total}))
    holds = "import fcntl, sys; f = open('arm/.lock', 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holds], cwd=tmp_path, stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        assert run in [held.folder for held in training_here(machine)]
        with pytest.raises(UserError, match="arm is training, and its plan holds"):
            refuse_without(1000, None, machine)
        process.stdin.close()
    assert run not in [held.folder for held in training_here(machine)]
    refuse_without(1000, None, machine)


@pytest.mark.slow
def test_a_run_that_exceeds_a_limit_is_not_served_unless_that_is_overridden(tmp_path, corpus, shared_cache, capsys,
                                                                             monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    (tmp_path / "limited.py").write_text(
        '"""Language, held to a limit."""\nfrom language_model import Recipe as Base\n\n\nclass Recipe(Base):\n'
        '    def exceeded(self, scores):\n        return ["bits_per_byte is 9, and the limit is 1"]\n'
    )
    config = TINY.format(corpus=corpus).replace("recipe: language_model", "recipe: limited.py")
    (tmp_path / "limited.yaml").write_text(config.replace("steps: 40", "steps: 2"))
    asked = ("train", "limited.yaml", "--run", "run", "evaluate.final=false", "samples.count=0", "--quiet")
    assert in_process(*asked) in (0, 4)
    assert in_process("serve", "run", "--port", "0") == 4
    assert "bits_per_byte is 9, and the limit is 1" in capsys.readouterr().err
    found = {}

    def asks(place):
        ask = Client(int(place.rpartition(":")[2]))
        found["text"] = ask.post(TEXT, {"prompt": "def ", "max_tokens": 4}).status
        found["chat"] = ask.post(CHAT, HELLO).error["message"]

    assert served(["serve", "run", "--override-limits", "at home", "--slots", "1", "--length", "64"], asks) == 0
    assert found["text"] == 200 and "no chat template" in found["chat"]
    assert "limit overridden" in capsys.readouterr().err
