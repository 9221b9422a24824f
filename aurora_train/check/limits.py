"""Limits of a config (`Recipe.exceeded`): what happens if a run, an export or a server exceeds them.

They end with a status of their own. An override holds for one command, and is recorded with its reason in the run's
events and provenance.
"""

from __future__ import annotations

from datetime import UTC, datetime

from aurora_train.errors import UserError
from aurora_train.files import read_json, write_json
from aurora_train.run import Run

EXCEEDED = 4  # exit status
HINT = '--override-limits "REASON" overrides them for one command, and puts the reason on record'


class LimitExceeded(UserError):
    """A number of a run exceeds a limit of its config."""

    status = EXCEEDED


def exceeded(recipe, scores: dict) -> list[str]:
    """`Recipe.exceeded`, checked to be a list of lines."""
    from aurora_train.check.blame import recipe_code  # which imports jax

    with recipe_code(recipe, "exceeded"):
        lines = recipe.exceeded({name: value for name, value in scores.items() if isinstance(value, int | float)})
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError("`exceeded` has to return a list of texts", where=type(recipe).__name__)
    return lines


def scored(run: Run, step: int) -> dict:
    """The numbers of a run's score, if `step` is what was scored; {} otherwise, and if this is no run."""
    kept = (read_json(run.scores) or {}) if run.config.is_file() else {}
    return kept.get("score", {}) if kept.get("step") == step else {}


def refuse_blank(reason: str | None) -> None:
    """UserError for a reason that says nothing: before the work that it is for, which may take days."""
    if reason is not None and not reason.strip():
        raise UserError("an override needs a reason, which is put on record", where="--override-limits",
                        hint='--override-limits "in simulation only"')  # fmt: skip


def judged(run: Run, lines: list[str], by: str, reason: str | None, step: int) -> tuple[int, list[str]]:
    """(exit status, lines for the user) of a command `by` whose run exceeds the limits named by `lines`.

    With a reason the command goes on, and the reason is put on record. UserError for a reason that cannot be recorded.
    """
    refuse_blank(reason)
    if not lines:
        return 0, [] if reason is None else ["no limit is exceeded: --override-limits had nothing to override"]
    if reason is None:
        return EXCEEDED, [f"limits of the config are exceeded; {HINT}", *(f"limit exceeded: {one}" for one in lines)]
    _record(run, lines, by, reason, step)
    return 0, [f"limit overridden: {line} ({reason})" for line in lines]


def refuse_exceeded(run: Run, lines: list[str], by: str, reason: str | None, step: int) -> list[str]:
    """As `judged`, for a command that would begin now. Raises LimitExceeded instead of returning a status."""
    status, said = judged(run, lines, by, reason, step)
    if status:
        of = (read_json(run.scores) or {}).get("step")
        if of != step:
            has = "it has no score yet" if of is None else f"its score is of step {of}"
            lines = [f"{has}: `aurora evaluate {run.folder} --step {step}` makes one", *lines]
        raise LimitExceeded(f"this run exceeds limits of its config, and so there is no `aurora {by}` of it",
                            where=str(run.folder), why="\n  ".join(lines), hint=HINT)  # fmt: skip
    return said


def _record(run: Run, lines: list[str], by: str, reason: str, step: int) -> None:
    from aurora_train.record.metrics import EventLog

    record = {"by": by, "reason": reason, "exceeded": lines, "step": step}
    with EventLog(run.events) as events:
        events.event("limits_overridden", step, **{name: record[name] for name in ("by", "reason", "exceeded")})
    known = read_json(run.provenance, {})
    record["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run.provenance, {**known, "limits_overridden": [*known.get("limits_overridden", []), record]})
