"""A layer of experts on the CPU device's cores: which kernels run, with which operands (routing.py, experts.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinygrad import Tensor

from tinyvllm.ops.backend import Epilogue, Norm
from tinyvllm.ops.cpu.experts import (
    ExpertSpec,
    SumSpec,
    experts_kernel,
    one_row_kernel,
    scale_rows_kernel,
    sum_kernel,
)
from tinyvllm.ops.cpu.linear import ROWS_PER_PASS
from tinyvllm.ops.cpu.routing import GatherSpec, Plan, RouteSpec, gather_kernel, route_kernel
from tinyvllm.ops.cpu.sharded import Activation, sharded, tensors_of, widths_of
from tinyvllm.ops.experts_spec import ExpertLayer, Routing
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kernel.body import I32, empty, run_kernel


@dataclass(frozen=True)
class PlannedRouting(Routing):
    """The routing of several rows, and the order in which the experts' products take them."""

    plan: Plan | None = None
    order: Tensor | None = None  # the plan's buffer


def route_rows(logits: Activation, layer: ExpertLayer, num_tokens: int, core: str, tile_rows: int) -> PlannedRouting:
    """The routing by the router's products. `tile_rows`: the most rows of a tile."""
    pairs = num_tokens * layer.num_chosen
    plan = None if num_tokens == 1 else Plan(pairs, _tile_rows(pairs, layer.gate_up.num_experts, tile_rows))
    spec = RouteSpec(layer.kind, num_tokens, widths_of(logits, layer.router.num_rows), layer.stacks_shared, plan)
    outs = [empty(pairs, I32, core), empty(pairs, device=core)]
    outs += [empty(num_tokens, device=core)] if spec.has_shared else []
    outs += [empty(plan.size, I32, core)] if plan is not None else []
    tables = (layer.router_bias, layer.choice_bias, layer.expert_scale)
    read = [*tensors_of(logits), *[table for table in tables if table is not None]]
    ids, weights, *rest = run_kernel(route_kernel(spec), outs, read)
    shared = rest[0] if spec.has_shared else None
    return PlannedRouting(ids, weights, shared, plan, rest[-1] if plan is not None else None)


def _tile_rows(num_pairs: int, num_experts: int, most: int) -> int:
    """Rows of a tile: as many as an expert has on average, because a tile that it does not fill costs the same."""
    return max(rows for rows in ROWS_PER_PASS if rows <= min(most, max(1, num_pairs // num_experts)))


@dataclass(frozen=True)
class ExpertProducts:
    """The products of a step's rows with the experts that they chose. Each core computes its own columns."""

    routing: Routing
    layer: ExpertLayer
    num_tokens: int
    cores: tuple[str, ...]

    @property
    def plan(self) -> Plan | None:
        return self.routing.plan if isinstance(self.routing, PlannedRouting) else None

    @property
    def order(self) -> Tensor:
        """The plan's buffer, or of one row the ids of its experts."""
        order = self.routing.order if isinstance(self.routing, PlannedRouting) else None
        return self.routing.ids if order is None else order

    def gate_up(self, x: Activation, norm: Norm | None) -> Activation:
        """The gated hidden values of norm(x), (T * k, ffn), in the order of the plan."""
        layer, plan = self.layer, self.plan
        if plan is not None:
            x, norm = self._gathered(x, plan, norm), None
        widths: list[int] = []
        outs, size = [], layer.gate_up.expert_size // 2
        for core, shard in zip(self.cores, layer.gate_up.shards, strict=False):
            start = sum(widths)
            spec = replace(
                self._spec("experts_gate_up", shard, x),
                norm_eps=None if norm is None else norm.eps,
                activation=layer.kind.activation,
                bias_starts=None if layer.gate_up_bias is None else (start, size + start),
                bias_cols=2 * size,
            )
            tables = [] if norm is None else [norm.weight]
            tables += [] if layer.gate_up_bias is None else [layer.gate_up_bias]
            out = empty(spec.out_rows * spec.out_cols, device=core)
            outs += run_kernel(experts_kernel(spec), [out], [self.order, *shard.planes, *tensors_of(x), *tables])
            widths.append(spec.out_cols)
        return sharded(outs, widths)

    def down(self, hidden: Activation, epilogue: Epilogue) -> Activation:
        """The experts' outputs, added up by weight, and an epilogue without a norm."""
        outs, start = [], 0
        residuals = () if epilogue.residual is None else tensors_of(epilogue.residual)
        widths = [shard.expert_size for shard in self.layer.down.shards]
        for i, (core, shard) in enumerate(zip(self.cores, self.layer.down.shards, strict=False)):
            spec = replace(
                self._spec("experts_down", shard, hidden),
                bias_starts=None if self.layer.down_bias is None else (start,),
                bias_cols=self.layer.down.expert_size,
            )
            rest = [*residuals[i : i + 1], *([] if epilogue.out_scale is None else [epilogue.out_scale])]
            outs.append(self._sum(spec, shard, hidden, core, self._ending(spec, epilogue), rest))
            start += spec.num_rows
        return sharded(outs, widths)

    def _sum(
        self, spec: ExpertSpec, shard: Matrix, hidden: Activation, core: str, end: SumSpec, rest: list[Tensor]
    ) -> Tensor:
        """One core's columns of the sum. `rest`: what the epilogue reads."""
        weights, bias = self.routing.weights, [] if self.layer.down_bias is None else [self.layer.down_bias]
        out, read = empty(self.num_tokens * spec.num_rows, device=core), [*shard.planes, *tensors_of(hidden), *bias]
        if spec.plan is None:
            return run_kernel(one_row_kernel(spec, end), [out], [self.routing.ids, weights, *read, *rest])[0]
        y = empty(spec.out_rows * spec.num_rows, device=core)
        (y,) = run_kernel(experts_kernel(spec), [y], [self.order, *read])
        return run_kernel(sum_kernel(end), [out], [weights, self.order, y, *rest])[0]

    def _ending(self, spec: ExpertSpec, epilogue: Epilogue) -> SumSpec:
        return SumSpec(
            num_tokens=self.num_tokens,
            num_chosen=spec.num_chosen,
            num_cols=spec.num_rows,
            plan=spec.plan,
            scale=epilogue.scale,
            has_residual=epilogue.residual is not None,
            has_out_scale=epilogue.out_scale is not None,
            softcap=epilogue.softcap,
        )

    def _spec(self, name: str, matrix: Matrix, x: Activation) -> ExpertSpec:
        return ExpertSpec(
            name=name,
            format=matrix.format,
            num_tokens=self.num_tokens,
            num_chosen=self.layer.num_chosen,
            num_experts=matrix.num_experts,
            num_rows=matrix.expert_size,
            num_cols=matrix.num_cols,
            x_cols=widths_of(x, matrix.num_cols),
            plan=self.plan,
        )

    def _gathered(self, x: Activation, plan: Plan, norm: Norm | None) -> Activation:
        """The rows of x in the order of a plan, normed."""
        widths = widths_of(x, self.layer.gate_up.num_cols)
        read = [self.order, *tensors_of(x), *([] if norm is None else [norm.weight])]
        outs = []
        for shard, (tensor, cols) in enumerate(zip(tensors_of(x), widths, strict=True)):
            spec = GatherSpec(plan, self.layer.num_chosen, widths, shard, None if norm is None else norm.eps)
            outs += run_kernel(gather_kernel(spec), [empty(plan.num_rows * cols, device=str(tensor.device))], read)
        return sharded(outs, widths)


def scale_activation(x: Activation, factors: Tensor, num_tokens: int) -> Activation:
    """Row t of x times factors[t]."""
    outs, widths = [], []
    for tensor in tensors_of(x):
        cols = int(tensor.numel()) // num_tokens
        out = empty(num_tokens * cols, device=str(tensor.device))
        outs += run_kernel(scale_rows_kernel(num_tokens, cols), [out], [tensor, factors])
        widths.append(cols)
    return sharded(outs, widths)
