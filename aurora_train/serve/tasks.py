"""A request as the engine takes it: prompts as ids, and for each answer what is drawn, how, and under which grammar."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from aurora_train.generate.requests import Request, Sampling
from aurora_train.serve import calls
from aurora_train.serve.answers import ChatForm, TextForm
from aurora_train.serve.constrained import Constraint, Grammars
from aurora_train.serve.measures import Measures
from aurora_train.serve.refusal import Refusal
from aurora_train.serve.requests import Asked, Chat, Completion, plain, understood
from aurora_train.serve.speaker import Speaker
from aurora_train.serve.worker import Worker
from aurora_train.serve.written import Written


@dataclass
class Service:
    """What the routes share. `length`: the most tokens of prompt and answer; `created`: seconds since 1970."""

    name: str
    created: int
    speaker: Speaker
    length: int
    worker: Worker
    measures: Measures
    grammars: Grammars


@dataclass
class Task:
    """A request as the engine takes it: `prompts` times `asked.n` answers, prompt by prompt."""

    asked: Asked
    prompts: list[list[int]]
    form: ChatForm
    requests: list[Request]
    constraints: list[Constraint]
    tools: list[dict]
    echoed: list[str]

    def written(self, speaker: Speaker) -> list[Written]:
        """The answers, of which nothing is written yet."""
        return [Written(speaker, prompt, self.asked.stops, bool(self.tools))
                for prompt in self.prompts for _ in range(self.asked.n)]  # fmt: skip


def refuse_other(service: Service, named: str | None) -> None:
    """Refusal for the name of another model than the one that is served."""
    if named not in (None, service.name):
        raise Refusal(f"this server has the model {service.name!r}, and not {named!r}", "model", "model_not_found",
                      status=404)  # fmt: skip


def chat(service: Service, body: dict) -> Task:
    """The task of a request for `/v1/chat/completions`. Raises Refusal and UserError."""
    asked: Chat = understood(Chat, body)
    refuse_other(service, asked.model)
    tools = asked.tools if calls.refuse_unknown(asked.tools, asked.tool_choice, service.speaker.calls_tools) else []
    if tools and asked.response_format not in (None, "text") and asked.response_format.type != "text":
        raise Refusal("an answer of a given form cannot call tools; send one of response_format and tools",
                      "response_format")  # fmt: skip
    prompt = service.speaker.asked([plain(one, n) for n, one in enumerate(asked.messages)], tools or None)
    form = ChatForm(service.name, service.speaker, asked.alternatives >= 0)
    return _task(service, asked, [prompt], form, tools, [], conversation=True)


def completion(service: Service, body: dict) -> Task:
    """The task of a request for `/v1/completions`. Raises Refusal and UserError."""
    asked: Completion = understood(Completion, body)
    refuse_other(service, asked.model)
    speaker, vocabulary = service.speaker, service.speaker.vocabulary
    for given in asked.prompts:
        if not isinstance(given, str) and not all(0 <= number < vocabulary for number in given):
            raise Refusal(f"the ids of this model are 0 to {vocabulary - 1}", "prompt")
    prompts = [speaker.begun(given) if isinstance(given, str) else given for given in asked.prompts]
    texts = [given if isinstance(given, str) else speaker.text(given) for given in asked.prompts]
    form = TextForm(service.name, speaker, asked.alternatives >= 0)
    return _task(service, asked, prompts, form, [], texts if asked.echo else [], conversation=False)


def _task(service: Service, asked, prompts: list[list[int]], form, tools, echoed, *, conversation: bool) -> Task:
    ends, seed = service.speaker.ends(conversation=conversation), asked.seed
    seed = secrets.randbits(32) if seed is None else seed % 2**32
    grammar, requests, constraints = service.grammars.of(asked.response_format, ends), [], []
    for prompt in prompts:
        room = service.length - len(prompt)
        if room < (asked.most or 1):
            raise Refusal(
                f"the prompt has {len(prompt)} tokens and the answer up to {asked.most or 1}, and the server holds "
                f"{service.length}" + (f"; max_tokens of at most {room} fits" if room > 0 else "; shorten the prompt"),
                "max_tokens" if room > 0 else "messages" if conversation else "prompt", "context_length_exceeded",
            )  # fmt: skip
        for number in range(asked.n):
            if grammar is not None:
                constraints.append(grammar())
            sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.min_p,
                                       asked.repetition_penalty, seed, number)  # fmt: skip
            allow = constraints[-1] if grammar is not None else None
            requests.append(Request(tuple(prompt), asked.most or room, sampling, ends, asked.alternatives, allow))
    asked.stops  # noqa: B018 (a Refusal now, and not when the answer has begun)
    return Task(asked, prompts, form, requests, constraints, tools, [text for text in echoed for _ in range(asked.n)])
