"""What a step needs in memory, added up before anything is compiled.

    peak(m, cuts) = arguments + gradients + residuals outside the stacks(m) + what every unit keeps(m) + working set(m)

for m examples on each device. Every term but the last is exact: arguments and gradients by shape, dtype and sharding,
residuals from abstract traces of the loss and of one unit. The working set is an allowance: the residuals of one unit,
which the backward pass recomputes, or 1.5 times the gradients outside the stacks (a copy of the vocabulary's table in
the compute dtype and a second gradient of it), whichever is larger. Compared with compiled steps the sum errs by a few
per cent (docs/planner_accuracy.md); the planner compiles what it chooses and corrects its estimates.
"""

from __future__ import annotations

import functools

from aurora_train.mesh import batch_ways
from aurora_train.plan import account
from aurora_train.plan.report import CAUSES
from aurora_train.plan.residuals import trace_stack_unit

HEAD_COPIES = 1.5  # what the loss holds, as a multiple of the gradients outside the stacks


class Estimate:
    """The terms for one program (`train.rehearsal.Rehearsal`). Bytes on one device."""

    def __init__(self, program):
        self.program, self.devices = program, batch_ways(program.mesh)
        blueprint = program.blueprint(program.simplest_plan())
        self.arguments = account.arguments(program, blueprint)
        trained = account.sharded_bytes(blueprint.state.params, blueprint.shardings.params)
        self.gradient = {
            path: account.unit_gradient_bytes(stack, program.mesh) for path, stack in program.stacks().items()
        }
        inside = sum(self.gradient[path] * stack.num_units for path, stack in program.stacks().items())
        self.outer_gradients = max(trained - inside, 0)

    def local(self, microbatch: int) -> int:
        """Examples on each device."""
        return max(microbatch // self.devices, 1)

    @functools.cached_property
    def graphs(self) -> dict:
        """The `UnitGraph` of every stack by path that the loss calls and that has a backward pass.

        A stack in which nothing is trained has one only where something before it is. Whether it has is seen in what
        the loss keeps: less than all stacks would.
        """
        with self.program.here():
            graphs = {path: trace_stack_unit(*call) for path, call in self.program.stack_calls().items()}
        differentiated = {path: graph for path, graph in graphs.items() if self.gradient[path]}
        each = self.program.loss_residuals(2) - self.program.loss_residuals(1)
        return graphs if each >= self._inputs(graphs) else differentiated

    def _inputs(self, graphs: dict) -> int:
        """Bytes that recomputed units keep for each example."""
        units = {path: self.program.stacks()[path].num_units for path in graphs}
        return sum(units[path] * graph.score(()).saved_bytes for path, graph in graphs.items())

    def outside(self, local: int) -> int:
        """Residuals of the loss that lie outside the stacks: linear in the examples, from traces of one and of two."""
        one, two = map(self.program.loss_residuals, (1, 2))
        return max(2 * one - two, 0) + max(two - one - self._inputs(self.graphs), 0) * local

    def working_set(self, local: int) -> int:
        """Bytes needed by the backward pass of one unit, or by the loss, whichever is larger."""
        unit = max((graph.score(None).saved_bytes for graph in self.graphs.values()), default=0)
        return max(unit * local, int(HEAD_COPIES * self.outer_gradients))

    def rest(self, local: int) -> int:
        """Everything but what units keep and their gradients."""
        fixed = sum(self.arguments.values()) + self.outer_gradients
        return fixed + self.outside(local) + self.working_set(local)

    def by_cause(self, local: int, kept: int, gradients: int) -> dict[str, int]:
        """The sum by cause. `kept` and `gradients`: bytes over all units."""
        return dict.fromkeys(CAUSES, 0) | self.arguments | {
            "gradients": self.outer_gradients + gradients,
            "saved": kept + self.outside(local),
            "workspace": self.working_set(local),
        }  # fmt: skip
