"""The report's Memory section: predicted, compiled and measured bytes, and their causes."""

from __future__ import annotations

from aurora_train.tools.markup import escape
from aurora_train.tools.report_page import facts, folded, section, table


def memory_section(pinned: dict | None, steps: list[dict]) -> str:
    """The section from plan.json ({"plan", "mesh", "device"}) and the step records; "" if the plan has no details.

    The measured figure is the plan's own after the run, otherwise the highest `memory_bytes` of the records.
    """
    plan = (pinned or {}).get("plan") or {}
    details = plan.get("details")
    if not details:
        return ""
    summary = f"Microbatch {plan.get('microbatch')} x accumulation {plan.get('accumulation')}"
    summary += f"; {plan['reason']}." if plan.get("reason") else "."
    parts = [f"<p>{escape(summary)}</p>\n", _figures(plan, steps)]
    parts += _causes(details.get("by_cause") or {})
    parts += _stacks(plan.get("stacks") or {})
    parts += [f'<p class="soft">Not verified: {escape(one)}.</p>\n' for one in details.get("not_verified") or []]
    rest = {name: value for name, value in plan.items() if name not in ("details", "stacks", "reason")}
    rest |= {"mesh": pinned.get("mesh"), "attention": details.get("attention"), "forms": details.get("forms")}
    parts.append(folded("the pinned plan", facts(rest)))
    return section("Memory", *parts)


def _figures(plan: dict, steps: list[dict]) -> str:
    from aurora_train.plan.report import WORTH_TELLING, amount, difference

    predicted = plan.get("predicted_bytes")
    recorded = [record["memory_bytes"] for record in steps if record.get("memory_bytes")]
    measured = plan.get("measured_bytes") or max(recorded, default=None)
    rows = [["predicted", amount(predicted), ""]]
    if plan.get("platform") == "cpu" and (measured or 0) < WORTH_TELLING:
        measured = None  # this is mostly Python and its libraries
    for name, held in (("compiled", plan.get("compiled_bytes")), ("measured", measured)):
        if held is None and name == "measured":
            continue
        rows.append([name, amount(held), difference(held, predicted)])
    if plan.get("budget_bytes"):
        rows.append(["budget", amount(plan["budget_bytes"]), ""])
    return table(["per device", "peak", "difference from the prediction"], rows)


def _causes(bytes_of: dict[str, int]) -> list[str]:
    from aurora_train.plan.report import amount, by_cause

    rows = [[name, amount(held)] for _, name, held in by_cause(bytes_of)]
    return [table(["predicted cause", "bytes"], rows)] if rows else []


def _stacks(stacks: dict) -> list[str]:
    from aurora_train.tools.report_plan import segments

    shown = []
    for name, cut in stacks.items():
        lines = segments(cut)
        shown.append([name, "; ".join(lines)])
    return [table(["stack", "for the backward pass"], shown)] if shown else []
