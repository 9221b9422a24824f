"""Which network links the machines of a run: every one that all of them have is measured, and the fastest is taken.

All machines send to their neighbour in a ring at once, as an all-reduce does, over one TCP connection each. RDMA (NCCL
over InfiniBand or RoCE) is faster than what is measured here; it runs over the same cable.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import NamedTuple

from aurora_train.errors import UserError

_TOTAL_SECONDS = 8.0  # for all measurements together
_ONE_SECONDS = 1.5


class Link(NamedTuple):
    """A network: its name, each process's interface and address on it, and bytes/s (None if not measured)."""

    network: str
    interfaces: list[str]
    addresses: list[str]
    rate: float | None = None

    def variables(self, index: int) -> dict[str, str]:
        """The variables that keep NCCL's own connections on this network; gloo follows the address of the meeting."""
        return {} if self.interfaces[index] == "lo" else {"NCCL_SOCKET_IFNAME": f"={self.interfaces[index]}"}


def choose_link(hosts: list, interface: str | None, say: Callable[[str], None]) -> Link:
    """The fastest network of all machines (of `interface`, if given). UserError, with each reason, if none works."""
    links = common_links([host.facts for host in hosts], interface)
    if not links:
        has = "; ".join(f"{host.name}: {_shown(host.facts)}" for host in hosts)
        raise UserError(
            f"no network that all machines share{f' on the interface `{interface}`' if interface else ''}",
            where="--interface" if interface else "--hosts", why=has,
            hint="give the interfaces that link them addresses of one network",
        )  # fmt: skip
    seconds = min(_ONE_SECONDS, _TOTAL_SECONDS / len(links))
    measured, failed = [], []
    for link in links:
        rate, why = _measured(hosts, link, seconds)
        (failed if why else measured).append(link._replace(rate=rate) if not why else f"{link.network}: {why}")
    if not measured:
        raise UserError("the machines cannot reach each other", where="--hosts", why="; ".join(failed),
                        hint="open the firewall between them, or plug in the cable")  # fmt: skip
    best = max(measured, key=lambda link: link.rate)
    others = [f"{link.network} {link.rate / 1e9:.2f} GB/s" for link in measured if link is not best] + failed
    beside = f" (not {'; '.join(others)})" if others else ""
    say(f"network {best.network} over {', '.join(dict.fromkeys(best.interfaces))}: "
        f"{best.rate / 1e9:.2f} GB/s to the neighbour, all at once, by TCP{beside}")  # fmt: skip
    return best


def common_links(facts: list[dict], interface: str | None = None) -> list[Link]:
    """The networks in which every machine has an address. Loopback counts only where all are one machine."""
    one_machine = len({fact["machine"] for fact in facts}) == 1
    found: dict[str, list] = {}
    for index, fact in enumerate(facts):
        for name, address, mask in fact["addresses"]:
            at = ipaddress.ip_interface(f"{address}/{mask}")
            if at.ip.is_loopback != one_machine or interface not in (None, name):
                continue
            found.setdefault(str(at.network), [None] * len(facts))[index] = name, address
    links = [Link(network, *map(list, zip(*known, strict=True))) for network, known in found.items() if all(known)]
    apart = [link for link in links if one_machine or len(set(link.addresses)) == len({f["machine"] for f in facts})]
    return apart


def _measured(hosts: list, link: Link, seconds: float) -> tuple[float, str]:
    """(bytes/s of the slowest, why it cannot be used)."""
    for host, address in zip(hosts, link.addresses, strict=True):
        host.ask("listen", address=address)
    ports = [host.answer(15)["port"] for host in hosts]
    for index, host in enumerate(hosts):
        neighbour = (index + 1) % len(hosts)
        host.ask("send", to=link.addresses[neighbour], port=ports[neighbour], seconds=seconds,
                 source=link.addresses[index])  # fmt: skip
    answers = [host.answer(seconds + 20) for host in hosts]
    for host, answer in zip(hosts, answers, strict=True):
        if "error" in answer:
            return 0.0, f"{host.name} does not reach its neighbour ({answer['error']})"
    return min(answer["bytes"] / answer["seconds"] for answer in answers), ""


def _shown(fact: dict) -> str:
    return ", ".join(f"{name} {address}" for name, address, _ in fact["addresses"])
