#!/usr/bin/env bash
# openai 3.57.0 (its Python client): `client.chat.completions.stream(...)` is the helper for events, and asks for no
# form of the answer. Yet `get_final_completion()` raises LengthFinishReasonError ("Could not parse response content")
# when the stream ended with finish_reason "length", although there is nothing to parse and the text has come. Its events
# all come, and only the final completion raises; `create(..., stream=True)` on the same stream raises nothing. A program
# that caps max_tokens has to read `event.snapshot`,
# or catch the error, whose `completion` holds the answer.
# Seen: events: 'Hel', 'Hello'; get_final_completion: LengthFinishReasonError, its completion says 'Hello'; create: 'Hello'.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'openai==3.57.0'
"$work/venv/bin/python" - <<'P'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai


class Answer(BaseHTTPRequestHandler):
    """The stream of a chat that is cut off at two tokens, as the protocol has it."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for delta, reason in (({"role": "assistant", "content": "Hel"}, None), ({"content": "lo"}, None), ({}, "length")):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
asked = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}

with client.chat.completions.stream(**asked) as stream:
    seen = [event.snapshot for event in stream if event.type == "content.delta"]
print("openai", openai.__version__, "| events:", seen)
assert seen == ["Hel", "Hello"]

with client.chat.completions.stream(**asked) as stream:
    try:
        stream.get_final_completion()
        raise SystemExit("it no longer raises")
    except openai.LengthFinishReasonError as error:
        print("get_final_completion:", type(error).__name__, "|", error.completion.choices[0].message.content)
        assert error.completion.choices[0].message.content == "Hello"

plain = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **asked))
print("create:", plain)
assert plain == "Hello"
P
echo "as described"
