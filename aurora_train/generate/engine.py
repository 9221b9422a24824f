"""`Engine`: continuous batching over a fixed number of slots, for samples, scores, rollouts, a chat and a server.

A request takes a slot; its prompt is read in chunks between the steps in which all other slots write a token each. The
host reads one token behind: a step is on its way before the token that it continues has been read. So an answer that
ends early costs one step more, whose result nobody reads.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aurora_train.errors import UserError
from aurora_train.generate import drawing, programs
from aurora_train.generate.knobs import SlotKnobs
from aurora_train.generate.programs import Rows
from aurora_train.generate.requests import Listener, Reason, Request, Ticket, Token, check, fitted
from aurora_train.generate.weights import Decoded, Weights, decoded, own_kinds


@dataclass
class _Slot:
    """A text in its slot. It is being read while `read` is less than the length of `text`, and written from then on."""

    ticket: Ticket
    text: list[int]  # what is to be read: the prompt, or all so far where longrope turns it anew
    read: int = 0
    drawn: int = 0  # how many tokens were drawn, read by the host or not

    @property
    def position(self) -> int:
        """Where the last drawn token stands."""
        return len(self.ticket.request.prompt) + self.drawn - 1


class Engine:
    """Continues prompts with a `Decoder`. `advance` is called by one thread; `submit` and `cancel` by any.

    Args:
        model: a Decoder, or what `weights.decoded` made of one.
        slots: how many texts are written at a time.
        length: the most tokens of a prompt with its answer.
        chunk: the most tokens of a prompt that are read between two steps.
        mesh: slots are cut over all of its devices, weights over `fsdp`.
        weights: see `weights.decoded`.
        together: read the prompts of all slots at once. An answer then depends on its neighbours as far as float order
            does, but many short prompts take one step.
    """

    def __init__(
        self, model, slots: int, length: int, chunk: int = 512, mesh=None, weights: Weights | None = None,
        together: bool = False,
    ):  # fmt: skip
        if mesh is not None and slots % mesh.size:
            raise UserError(
                f"{slots} slots cannot be cut over {mesh.size} devices", where="slots",
                hint=f"slots={-(-slots // mesh.size) * mesh.size}",
            )  # fmt: skip
        self._form, self._weights = model if isinstance(model, Decoded) else decoded(model, weights, mesh)
        shape = self._form.model(self._weights)
        self._rules = _Rules(shape, length, together)
        self.vocabulary, self.length, self.slots = shape.vocab_size, self._rules.length, slots
        self._chunk, self._together = chunk, together and not self._rules.exact
        self._slots: list[_Slot | None] = [None] * slots
        self._knobs = SlotKnobs(slots, self.vocabulary)
        self._caches, self._logits = empty(self._form, self._weights, slots, self.length)
        self._tokens = jax.device_put(np.zeros(slots, np.int32))  # the last drawn of each slot
        self._pending: deque = deque()  # (what was drawn, the slots that it is for), to be read by the host
        self._lock, self._waiting, self._cancelled = threading.Lock(), deque(), deque()

    def submit(self, request: Request, listener: Listener, fit: str = "refuse") -> Ticket:
        """Queue a request. UserError if it is out of range or too long, unless `fit` is "cut" (`requests.fitted`)."""
        assert fit in ("refuse", "cut"), fit
        taken = fitted(request, self.length) if fit == "cut" else request
        check(taken, self.vocabulary, self.length, self._rules.why)
        ticket = Ticket(taken, listener, len(request.prompt) - len(taken.prompt))
        with self._lock:
            self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End an answer, whose slot is free from the next step on. One that has ended stays as it is."""
        with self._lock:
            self._cancelled.append(ticket)

    def advance(self) -> bool:
        """Read a chunk of a prompt, and write a token in every slot whose prompt is read. False if there was nothing
        to do. What a listener or a constraint raises, and scores that are not finite, fail their own answer alone
        (`Ticket.check`).
        """
        self._take_orders()
        if not self._pending and not any(self._slots):
            return False
        self._turn()
        fresh = self._step()
        fresh += self._read()
        fresh = self._draw(fresh) if fresh else []
        self._hear(behind=1 if fresh else 0)
        return True

    @property
    def sizes(self) -> list[int]:
        """The numbers of tokens of which the programs are that read prompts of up to a chunk."""
        return sorted({self._rules.size(left, self._chunk) for left in range(1, min(self._chunk, self.length) + 1)})

    @property
    def load(self) -> tuple[int, int]:
        """(slots in use, requests that wait for one)."""
        with self._lock:
            return sum(slot is not None for slot in self._slots), len(self._waiting)

    def planned_bytes(self) -> dict[str, int]:
        """Bytes by what holds them: `weights`, `caches` and `rest` of all slots, and `per_slot` of the latter two."""
        return planned_bytes(self._form.model(self._weights), self.slots, self.length)

    def _take_orders(self) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, deque()
            for ticket in cancelled:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
        for ticket in cancelled:
            self._end(ticket, "cancelled")
        for number in range(self.slots):
            while self._slots[number] is None:
                with self._lock:
                    ticket = self._waiting.popleft() if self._waiting else None
                if ticket is None:
                    return
                if ticket.request.max_tokens == 0:
                    self._end(ticket, "length")
                    continue
                if any(number == i for *_, slots in self._pending for i, _ in slots):
                    self._hear(behind=0)  # whether its last text left something to erase
                self._slots[number] = _Slot(ticket, list(ticket.request.prompt))
                self._knobs.set(number, ticket.request.sampling, ticket.request.prompt)

    def _free(self, ticket: Ticket) -> None:
        for number, slot in enumerate(self._slots):
            if slot is not None and slot.ticket is ticket:
                self._slots[number] = None
                self._knobs.clear(number)
                if slot.read and not (slot.drawn and slot.read == len(slot.text)):
                    self._erase(number)  # no draw has shown whether what was read is finite

    def _erase(self, number: int) -> None:
        """Empty a slot. A later text sees nothing of an earlier one, but zero times NaN is NaN."""
        self._caches, self._logits = programs.erased(self._form, self._caches, self._logits, np.int32(number))

    def _turn(self) -> None:
        """Read texts anew that longrope turns by other angles from their beginning, now that they have grown so far."""
        if not any(s and s.drawn and s.read == len(s.text) and s.position in self._rules.turns for s in self._slots):
            return
        self._hear(behind=0)
        for number, slot in enumerate(self._slots):
            if slot and slot.read == len(slot.text) and slot.position in self._rules.turns:
                self._slots[number] = _Slot(
                    slot.ticket, [*slot.ticket.request.prompt, *slot.ticket.drawn], drawn=slot.drawn
                )
                self._knobs.set(number, slot.ticket.request.sampling, self._slots[number].text)

    def _step(self) -> list[int]:
        """Continue every text that is being written by its last drawn token. Returns their slots."""
        writing = [i for i, s in enumerate(self._slots) if s and s.drawn and s.read == len(s.text)]
        if not writing:
            return []
        rows = self._rows()
        for i in writing:
            slot = self._slots[i]
            rows.starts[i], rows.counts[i], rows.lengths[i] = slot.position, 1, slot.position + 1
        self._knobs.saw(self._tokens, rows.counts)
        self._caches, self._logits = programs.step(
            self._form, self.length, self._rules.exact, self._weights, self._caches, self._logits, self._tokens, rows
        )
        return writing

    def _read(self) -> list[int]:
        """Read a chunk of the prompts. Returns the slots whose prompt ends with it."""
        reading = [i for i, slot in enumerate(self._slots) if slot and slot.read < len(slot.text)]
        if not self._together:  # the request that came first
            reading = sorted(reading, key=lambda i: self._slots[i].ticket.number)[:1]
        if not reading:
            return []
        room = self._chunk if not self._together else max(16, min(self._chunk, 8 * self._chunk // self.slots))
        size = self._rules.size(max(len(self._slots[i].text) - self._slots[i].read for i in reading), room)
        tokens, rows = np.zeros((self.slots, size), np.int32), self._rows()
        for i in reading:
            slot = self._slots[i]
            part = slot.text[slot.read : slot.read + size]
            tokens[i, : len(part)] = part
            rows.starts[i], rows.counts[i], rows.lengths[i] = slot.read, len(part), len(slot.text)
            slot.read += len(part)
        if self._together:
            given, own, program = (tokens, rows), (), programs.read_all
        else:
            i = reading[0]
            given, own = (np.int32(i), tokens[i : i + 1], Rows(*(a[i : i + 1] for a in rows))), (self._rules.exact,)
            program = programs.read_one
        self._caches, self._logits = program(
            self._form, self.length, *own, self._weights, self._caches, self._logits, *given
        )
        return [i for i in reading if self._slots[i].read == len(self._slots[i].text)]

    def _rows(self) -> Rows:
        """Of no tokens, to be filled in."""
        prefixes = [len(slot.ticket.request.prompt) if slot else 0 for slot in self._slots]
        return Rows(*(np.zeros(self.slots, np.int32) for _ in range(3)), np.array(prefixes, np.int32))

    def _draw(self, fresh: list[int]) -> list[int]:
        """Draw a token in each of these slots, in those with constraints once what they drew has been read."""
        mask = None
        if any(self._slots[i].ticket.request.allow for i in fresh):
            self._hear(behind=0)
            fresh = [i for i in fresh if self._slots[i] is not None]
            mask = np.ones((self.slots, self.vocabulary), bool)
            fresh = [i for i in fresh if self._allowed(self._slots[i].ticket, mask[i])]
            if not fresh:
                return []
        logits = self._logits if mask is None else jnp.where(mask, self._logits, -jnp.inf)
        counts = np.array([slot.drawn if slot else 0 for slot in self._slots], np.int32)
        self._tokens = self._knobs.next_tokens(logits, counts)
        asked = any(self._slots[i].ticket.request.logprobs >= 0 for i in fresh)
        beside = drawing.measured(self._logits, self._tokens) if asked else ()
        for array in (self._tokens, *beside):
            array.copy_to_host_async()
        self._pending.append((self._tokens, beside, [(i, self._slots[i].ticket) for i in fresh]))
        for i in fresh:
            slot = self._slots[i]
            slot.drawn += 1
            if slot.drawn == slot.ticket.request.max_tokens:
                self._free(slot.ticket)
        return fresh

    def _allowed(self, ticket: Ticket, mask) -> bool:
        """Write what a request allows to its row of the mask. False if that is nothing, which ends the answer."""
        if ticket.request.allow is None:
            return True
        try:
            mask[:] = ticket.request.allow(list(ticket.drawn))
        except Exception as fault:  # of whoever made the constraint, and no reason to end other answers
            self._end(ticket, "failed", fault)
            return False
        if not mask.any():
            self._end(ticket, "stop")
        return bool(mask.any())

    def _end(self, ticket: Ticket, reason: Reason, fault: Exception | None = None) -> None:
        """Free a text's slot and tell its listener why."""
        self._free(ticket)
        ticket.fault = ticket.fault or fault
        try:
            ticket.finish(reason)
        except Exception as error:
            ticket.fault = ticket.fault or error

    def _hear(self, behind: int) -> None:
        """Read what was drawn, but for the last `behind` draws, and tell the listeners."""
        while len(self._pending) > behind:
            tokens, beside, slots = self._pending.popleft()
            drawn, beside = np.asarray(tokens), [np.asarray(array) for array in beside]
            for i, ticket in slots:
                if drawn[i] < 0:
                    self._erase(i)
                    self._end(ticket, "failed", None if ticket.reason else _not_finite())
                if ticket.reason is not None:
                    continue
                try:
                    ticket.give(_token(int(drawn[i]), i, beside, ticket.request.logprobs))
                except Exception as fault:  # of whoever listens, and no reason to end other answers
                    self._end(ticket, "failed", fault)
                if ticket.reason is not None:
                    self._free(ticket)


def _token(number: int, row: int, beside: list, alternatives: int) -> Token:
    if alternatives < 0:
        return Token(number)
    own, ids, top = (array[row] for array in beside)
    best = zip(ids[:alternatives].tolist(), top[:alternatives].tolist(), strict=True)
    return Token(number, float(own), tuple(best))


def _not_finite() -> UserError:
    return UserError("the model's scores of the next token are not finite", where="the answer",
                     why="its weights are not, or this text makes it overflow", hint="weights in float32")  # fmt: skip


class _Rules:
    """What a model demands of how it is read."""

    def __init__(self, model, length: int, together: bool):
        config, self._together = model.config, together
        self.why = "the engine holds texts of so many tokens"
        if config.positions == "learned" and config.max_length <= length:
            length, self.why = config.max_length, "its positions are a learned table"
        self.length = length
        # With longrope, a text that grows beyond one of these lengths is turned by other angles from its beginning.
        self.turns = {rope.scaling.original_length for rope in config.ropes if rope.scaling.kind == "longrope"}
        self.whole = model.mask == "prefix"  # the tokens of a prompt see each other
        self.exact = own_kinds(config)  # no padding

    def size(self, left: int, room: int) -> int:
        """How many tokens are read next of a prompt of which so many are left."""
        if self.exact:
            return 1 << (min(left, room).bit_length() - 1)
        if self.whole:
            return bucket(left, 16)
        # A server compiles a program of each size before it listens, so that there are few of them.
        return min(bucket(left, 16) if self._together else max(16, 1 << (left - 1).bit_length()), room)


def bucket(size: int, least: int) -> int:
    """The next power of two, or three quarters of it if that is enough; at least `least`, a power of two."""
    power = max(least, 1 << (int(size) - 1).bit_length())
    return 3 * power // 4 if size <= 3 * power // 4 and power > least else power


def empty(form, arrays, slots: int, length: int):
    """(caches, logits) before the first request."""

    @jax.jit
    def empty():
        model = form.model(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), arrays))
        return form.by_slot(model.empty_caches(slots, length), jnp.zeros((slots, model.vocab_size), jnp.float32))

    return empty()


def planned_bytes(model, slots: int, length: int) -> dict[str, int]:
    """See `Engine.planned_bytes`; of a model as `weights.decoded` gives it, which may be abstract."""

    def held(tree) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    caches = held(jax.eval_shape(lambda: model.empty_caches(slots, length)))
    rest = slots * (4 * model.vocab_size + SlotKnobs.bytes_per_slot(model.vocab_size))
    weights = held(nnx.state(model))
    return {"weights": weights, "caches": caches, "rest": rest, "per_slot": (caches + rest) // slots}
