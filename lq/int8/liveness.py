"""How long integers are read in a graph whose kernels are written where they end."""

from __future__ import annotations

from typing import Any

from torch import fx

from lq.graph.qdq import DEQUANTIZE, DEQUANTIZE_WEIGHT
from lq.int8.integers import POOLS, pool_of
from lq.int8.matching import Chain, Kernels, is_call, only_user


class Liveness:
    """Where each node of a graph is written, and what is read there for the last time.

    Args:
        graph: the graph.
        kernels: what :func:`lq.int8.matching.find_kernels` finds in it.
    """

    def __init__(self, graph: fx.Graph, kernels: Kernels) -> None:
        self.kernels = kernels
        self._weighted = {chain.op for chain in kernels.chains.values()}
        self._inner = kernels.inner()
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._read_at = self._reading_positions(graph)
        self._last_read: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            at = max((self._read_at[user] for user in node.users), default=self._order[node])
            self._last_read.setdefault(at, []).append(node)

    def is_written_later(self, node: fx.Node) -> bool:
        """Whether a node is written where it is read, as part of what reads it, or not at all."""
        if node in self._inner or is_call(node, DEQUANTIZE) or only_user(node) in self.kernels.concats:
            return True  # a dequantize is written where something reads it in float, a concatenation as integers
        if is_call(node, DEQUANTIZE_WEIGHT) and all(user in self._weighted for user in node.users):
            return True  # kernels read the integers
        # Operators that only move integers are written where the moved integers are quantized.
        return bool(node.users) and all(self._reads_moved(user, node) for user in node.users)

    def last_read(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that nothing reads once ``node`` is written."""
        return self._last_read.get(self._order[node], [])

    def is_still_read(self, quantize: Any, chain: Chain) -> bool:
        """Whether the kernel itself (as its input) or anything after it reads the integers or a view of them."""
        if self._may_be_view(quantize):
            return True
        position = self._order[chain.end]
        pending, seen = [quantize], set()
        while pending:
            node = pending.pop()
            for user in node.users:
                if user is chain.residual or user in seen:
                    continue
                seen.add(user)
                if user.op == "output":
                    return True
                if self._read_at[user] >= position:
                    return True
                pending.extend(view for reader in user.users for view in self._views(reader))
        return False

    def _reading_positions(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """For each node the position of the node where it is written, and its inputs are read."""
        positions: dict[fx.Node, int] = {}
        # A pool whose indices are read too is computed in place, and once more on the integers.
        again = {between: self._order[node] for node, operators in self.kernels.moved.items() for between in operators}
        for node in reversed(graph.nodes):
            positions[node] = max(self._order[node], again.get(node, 0))
            if self.is_written_later(node):
                positions[node] = max((positions[user] for user in node.users), default=positions[node])
        return positions

    def _reads_moved(self, user: fx.Node, node: fx.Node) -> bool:
        if user in self.kernels.moved:
            return node in self.kernels.moved[user]
        return (
            pool_of(user) is node
            and bool(user.users)
            and all(node in self.kernels.moved.get(u, ()) for u in user.users)
        )

    def _may_be_view(self, quantize: Any) -> bool:
        return quantize in self.kernels.moved and self.kernels.moved[quantize][-1].target not in POOLS

    def _views(self, reader: fx.Node) -> list[fx.Node]:
        """The quantize nodes whose integers may be a view of those that ``reader`` moves."""
        return [user for user in reader.users if user in self.kernels.moved and self._may_be_view(user)]
