"""The server of JSON lines, by real sockets: every bad request is an answer, and the next one is served."""

from __future__ import annotations

import base64
import contextlib
import json
import select
import socket
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from asking import Client

from aurora_train.errors import UserError
from aurora_train.serve import lines
from aurora_train.serve.address import LOCAL, Address, address
from aurora_train.serve.lines import LineServer

TOKEN = "0123456789abcdef"


def connect():
    """A client's function: the sum of all values that it was sent since the beginning."""
    total = 0.0

    def respond(request):
        nonlocal total
        if "x" not in request:
            raise UserError("there is no `x`", where="request", hint="x: numbers")
        if isinstance(request["x"], str):
            raise ValueError("a mistake of the recipe")
        total += float(np.sum(request["x"]))
        answer = {"total": total, "double": 2 * np.asarray(request["x"], np.float32)}
        return answer | ({"warnings": [f"large: {total}"]} if total > 100 else {})

    return respond


@pytest.fixture
def server():
    with contextlib.closing(LineServer(connect, Address())) as server:
        yield server


def test_what_a_client_sent_before_is_remembered_for_it_alone_until_a_reset(server):
    one, other = Client(server.place), Client(server.place)
    assert one(x=[1, 2])["total"] == 3 and one(x=[1])["total"] == 4
    assert other(x=[5], id="a") == {"id": "a", "total": 5, "double": [10]}
    assert one(reset=True) == {"reset": True} and one(x=[1])["total"] == 1
    assert one(reset=True, x=[7])["total"] == 7
    summary = server.latencies.summary()
    assert summary["answers"] == 6 and summary["refused"] == 0
    assert 0 < summary["latency_ms_p50"] <= summary["latency_ms_p99"] < 5000


def encoded(array: np.ndarray) -> dict:
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


def test_arrays_come_back_in_the_form_they_were_sent_and_to_the_bit(server):
    sent = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    answer = Client(server.place)(x=encoded(sent))["double"]
    assert (answer["dtype"], answer["shape"]) == ("float32", [3, 2])
    assert base64.b64decode(answer["base64"]) == (2 * sent).tobytes()


BAD = {
    b"nonsense": "one line of JSON", b"[1]": "JSON object", b"\xff\xfe": "one line of JSON", b'{"y": 1}': "no `x`",
    b'{"x": "broken"}': "ValueError: a mistake of the recipe", b'{"x": [NaN]}': "not finite",
    b'{"x": [1e400]}': "not finite", b'{"reset": 1}': "true or false",
    b'{"x": {"base64": "AAAA", "dtype": "object", "shape": [1]}}': "dtype is one of",
    b'{"x": {"base64": "AAAA", "dtype": "float32", "shape": [-1]}}': "whole numbers",
    b'{"x": {"base64": "AAAA", "dtype": "float32", "shape": [1]}}': "3 bytes",
    b'{"x": {"base64": "?", "dtype": "uint8", "shape": [1]}}': "base64", b"[" * 100_000: "nested too deeply",
    b'{"x":' * 900 + b"1" + b"}" * 900: "JSON",
    b'{"base64": "AAAA", "dtype": "uint8", "shape": [3]}': "no `x`",  # an array is no request
    b'{"id": NaN, "x": [1]}': "`id` has a number that is not finite",
    b'{"x": {"base64": "AAAA", "dtype": "uint8", "shape": [3' + b", 1" * 99 + b"]}}": "no array has the shape",
    b'{"x": {"base64": "", "dtype": "uint8", "shape": [0, 99999999999999999999]}}': "no array has the shape",
}  # fmt: skip


def test_a_bad_request_is_answered_and_the_connection_stays(server, caplog):
    client = Client(server.place)
    for line, expected in BAD.items():
        answer = json.loads(client.raw(line))
        assert list(answer) == ["error"] and expected in answer["error"], (line[:40], answer)
        assert client(reset=True, x=[2])["total"] == 2
    assert server.latencies.refused == len(BAD)
    assert client(id=4)["id"] == 4, "an error names its request, too"


def test_an_id_comes_back_as_it_was_sent(server):
    for given in ("a", 7, None, [1, {"of": 2}], {"base64": "AAAA", "dtype": "uint8", "shape": [3]}):
        assert Client(server.place)(id=given, x=[1])["id"] == given
        assert Client(server.place)(id=given)["id"] == given, "with an error, too"


@pytest.mark.parametrize("form", [[1.0], encoded(np.ones(1, np.float32))], ids=["list", "base64"])
def test_what_a_model_says_in_bfloat16_is_checked_and_sent_and_other_types_are_refused(form):
    answers = iter([jnp.asarray([2, 3], jnp.bfloat16), jnp.asarray([jnp.nan], jnp.bfloat16), np.ones(1, np.complex64)])
    with contextlib.closing(LineServer(lambda: lambda request: {"y": next(answers)}, Address())) as server:
        ask = Client(server.place)
        good = ask(x=form)["y"]
        assert good == ([2, 3] if isinstance(form, list) else encoded(np.float32([2, 3])))
        assert "not finite" in ask(x=form)["error"]
        assert "complex64 cannot be sent" in ask(x=form)["error"]


def test_a_warning_of_a_recipe_that_is_no_text_does_not_cost_the_answer():
    with contextlib.closing(LineServer(lambda: lambda request: {"y": 1, "warnings": [5]}, Address())) as server:
        assert Client(server.place)(x=[1])["y"] == 1


def test_what_would_not_end_or_comes_from_a_browser_closes_the_connection(server, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_BYTES", 1000)
    for line in (b'{"x": [' + b"1," * 1000, b"POST /act HTTP/1.1"):
        client = Client(server.place)
        assert b"the connection is closed" in client.raw(line)
        with contextlib.suppress(ConnectionError):
            assert client.raw(b'{"x": [1]}') == b""
    assert Client(server.place)(x=[1])["total"] == 1


def test_a_warning_is_counted_and_shown_once(server, caplog):
    client = Client(server.place)
    assert "warnings" in client(x=[101]) and "warnings" in client(x=[1])
    assert [record.getMessage() for record in caplog.records] == ["large: 101.0"]
    assert "1 answers" not in server.latencies.line() and "2 warnings" in server.latencies.line()


def test_the_latencies_are_said_while_it_runs(server):
    said, stop = [], threading.Event()
    Client(server.place)(x=[1])
    thread = threading.Thread(target=server.run, args=(stop, lambda line: (said.append(line), stop.set()), 0.01))
    thread.start()
    thread.join(20)
    assert len(said) == 1 and said[0].startswith("1 answer, 0 requests refused; latency p50 ")


def test_with_a_token_nobody_else_is_answered(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    with contextlib.closing(LineServer(connect, address(None, 0, None, file))) as server:
        trusted, other, silent = Client(server.place), Client(server.place), Client(server.place)
        assert trusted(token=TOKEN) == {"accepted": True} and trusted(x=[1])["total"] == 1
        assert "token" in other(x=[1])["error"] and other.file.readline() == b""
        assert "token" in silent(token=TOKEN + "x")["error"]
        assert b"token" in Client(server.place).raw(b"[" * 4000), "deep nesting is an answer before the token, too"


def test_a_stranger_who_is_slow_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_TOKEN_SECONDS", 0.2)
    with contextlib.closing(LineServer(connect, Address(token=TOKEN))) as server:
        silent, slow, trusted = (Client(server.place) for _ in range(3))
        assert trusted(token=TOKEN) == {"accepted": True}
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 10 and not select.select([slow.socket], [], [], 0.05)[0]:
                slow.socket.send(b"[")
        assert time.monotonic() - began < 10
        with contextlib.suppress(ConnectionError):  # if a byte of it comes after the end
            assert "token" in slow.file.readline().decode()
        assert "token" in silent.file.readline().decode()
        assert trusted(x=[1])["total"] == 1, "who is known may take time"


def test_a_place_is_given_back_by_who_leaves(monkeypatch):
    monkeypatch.setattr(lines, "_CLIENTS", 1)
    with contextlib.closing(LineServer(connect, Address())) as server:
        first = Client(server.place)
        assert first(x=[1])["total"] == 1
        second = Client(server.place)
        assert "has 1 clients already" in second.file.readline().decode()
        first.file.close()
        first.socket.close()
        deadline = time.monotonic() + 10
        while "already" in (answer := Client(server.place).raw(b'{"x": [5]}').decode()):
            assert time.monotonic() < deadline
        assert json.loads(answer)["total"] == 5


def test_a_unix_socket_is_for_its_owner_and_that_of_a_killed_server_is_replaced(tmp_path):
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with contextlib.closing(LineServer(connect, Address(path=path))) as server:
        assert Client(server.place)(x=[1])["total"] == 1
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(UserError, match="another server listens"):
            LineServer(connect, Address(path=path))
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("0.0.0.0", 0, None, None), "other machines could reach"),
        (("0.0.0.0", 0, None, "short"), "at least 16"),
        (("0.0.0.0", 0, None, "open"), "other users can read"),
        (("0.0.0.0", 0, None, "absent"), "cannot be read"),
        ((None, 70000, None, None), "is not a port"),
        (("127.0.0.1", 0, "a.sock", None), "has no host"),
        ((None, 0, "file", None), "no socket"),
        ((None, 0, "s" * 200, None), "cannot listen"),
        ((None, 0, "absent/a.sock", None), "cannot listen"),
        (("192.0.2.1", 0, None, "good"), "cannot listen"),
    ],
)
def test_a_bad_address_is_one_message(options, said, tmp_path):
    for name, token, mode in (("short", "x", 0o600), ("open", TOKEN, 0o644), ("good", TOKEN, 0o600)):
        (tmp_path / name).write_text(token)
        (tmp_path / name).chmod(mode)
    (tmp_path / "file").write_text("kept")
    host, port, path, token_file = (tmp_path / part if number > 1 and part else part
                                    for number, part in enumerate(options))  # fmt: skip
    with pytest.raises(UserError, match=said):
        LineServer(connect, address(host, port, path, token_file)).close()
    assert (tmp_path / "file").read_text() == "kept"
    assert address("localhost", 0, None, None).host in ("localhost", LOCAL) and Path(tmp_path).is_dir()
