"""What has to be cut together: units coupled by sums, concatenations, batch norms, flattening.

Enters: a model and inputs. Leaves: its groups of coupled units. The coupling is found by
torch-pruning's dependency graph (Fang et al., DepGraph: Towards Any Structural Pruning, 2023). That
takes every operation it does not know for one that works channel by channel; here only operations
that do are let through, and what depends on any other one is kept whole.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.removal import layers
from lightning_prune.removal.opening import Entrance, EntrancePruner, Opened
from lightning_prune.removal.operations import CHANNELWISE, operation, uses_of
from lightning_prune.removal.running import Run

_MOST_CLASSES = 4096  # units of a layer whose coupling is followed one by one


def load_torch_pruning() -> Any:
    """Return the module ``torch_pruning``.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ImportError(
            "Removing units needs torch-pruning, which finds the layers that are coupled: "
            'pip install "lightning_prune[removal]".'
        ) from error


@dataclass(frozen=True, eq=False)
class Link:
    """One node that a group's units go through.

    Args:
        key: Which node.
        layer: The layer, if it is one that is cut; ``None`` for an operation.
        name: The layer's full name, or what the operation is.
        side: Which side of the layer.
        roots: Units of the group, shape (entries,).
        indices: Where they are in this node, shape (entries,).
        sources: The nodes that feed this one.
        joins: Whether the node puts channels side by side, so that each has one source only.
    """

    key: int
    layer: nn.Module | None
    name: str
    side: layers.Side | None
    roots: Tensor
    indices: Tensor
    sources: tuple[int, ...]
    joins: bool


@dataclass(frozen=True, eq=False)
class Group:
    """Units that fall together: unit r of the root layer, and what is coupled with it.

    Args:
        root: The root layer's full name.
        width: How many units it has.
        links: The nodes they go through.
        obstacle: Why none of them can be cut; ``None`` if they can.
        members: Where several of the root's units fall together: its units, by class.
    """

    root: str
    width: int
    links: list[Link] = field(default_factory=list)
    obstacle: str | None = None
    members: list[Tensor] | None = None


def _shared_entries(links: list[Link], width: int) -> bool:
    """Tell whether some units have entries in common, of which one of them only is told."""
    taken = [link for link in links if link.side == "inputs"]
    reached = {unit for link in taken for unit in link.roots.tolist()}
    return bool(taken) and len(reached) < width


class Graph:
    """The coupling of a model's layers.

    Args:
        model: In eval mode; every parameter has to require gradients, since the tracing reads
            autograd's graph.
        inputs: What the model takes.
        run: How it is run.
        kept: Layers to keep whole, by full name, and why.
    """

    def __init__(self, model: nn.Module, inputs: Any, run: Run, kept: Mapping[str, str]) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._kept = dict(kept)
        self._tp = load_torch_pruning()
        wrapper = Opened(model, inputs, run)
        calls: Counter[int] = Counter()
        self._largest = 1  # numbers in any tensor seen: no layer has more units

        def count(module: nn.Module, args: Any, output: Any) -> None:
            calls[id(module)] += 1
            for value in pytree.tree_leaves((args, output)):
                if isinstance(value, Tensor):
                    self._largest = max(self._largest, value.numel())

        handles = [module.register_forward_hook(count) for module in model.modules()]
        try:
            with torch.enable_grad():
                self._graph = self._tp.DependencyGraph().build_dependency(
                    wrapper,
                    inputs,
                    forward_fn=lambda opened, given: opened(given),
                    customized_pruners={Entrance: EntrancePruner()},
                    verbose=False,
                )
        finally:
            for handle in handles:
                handle.remove()
        self._note_shared(model, calls, wrapper.outputs)
        _map_flattened(self._graph)

    def _note_shared(
        self, model: nn.Module, calls: Mapping[int, int], outputs: list[Tensor]
    ) -> None:
        """Note which layers' parameters act in more than one place."""
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        uses = uses_of(outputs)
        for name, module in model.named_modules():
            if calls.get(id(module), 0) > 1 and isinstance(module, layers.KNOWN):
                self._kept.setdefault(name, "it is used more than once")
            for parameter in module.parameters(recurse=False):
                names = owners[id(parameter)]
                if len(names) > 1:
                    self._kept.setdefault(name, f"its parameters are tied: {' = '.join(names)}")
                elif uses[id(parameter)] > 1:
                    self._kept.setdefault(name, "its parameters are used more than once")

    def groups(self) -> Iterator[Group]:
        """Yield the groups, each once."""
        seen: set[str] = set()
        for module in list(self._graph.module2node):
            name = self._names.get(id(module))
            roots = (nn.Linear, *layers.CONVOLUTIONS, *layers.TRANSPOSED, nn.Embedding)
            if name is None or name in seen or not isinstance(module, roots):
                continue
            seen.add(name)
            group = self._group(module, name)
            seen |= {link.name for link in group.links if link.side in ("outputs", "channels")}
            yield group

    def closed(self, group: Group, cut: Tensor) -> bool:
        """Tell whether cutting these units drags no others along."""
        module = next(m for m in self._graph.module2node if self._names.get(id(m)) == group.root)
        whole = {(link.key, link.side): link for link in group.links}
        units = cut if group.members is None else torch.cat([group.members[i] for i in cut])
        for link in self._links(module, units.tolist()):
            known = whole.get((link.key, link.side))
            if known is None:
                return False
            expected = known.indices[torch.isin(known.roots, cut)]
            if not torch.equal(torch.unique(expected), torch.unique(link.indices)):
                return False
        return True

    def _group(self, module: nn.Module, name: str) -> Group:
        width = layers.width(module, "outputs")
        try:
            links = self._links(module, list(range(width)))
        except Exception as error:  # noqa: BLE001 (whatever a graph it can't read makes it raise)
            return Group(name, width, obstacle=f"its coupling could not be found ({error})")
        found = (self._obstacle(link) for link in links)
        obstacle = next((each for each in found if each), None)
        if obstacle is None and _shared_entries(links, width):
            return self._group_of_classes(module, name, width)
        return Group(name, width, links, obstacle)

    def _group_of_classes(self, module: nn.Module, name: str, width: int) -> Group:
        """Return a group whose units are classes of the root's units that fall together.

        That is so where one layer's output is split and its parts are multiplied or added.
        """
        if width > _MOST_CLASSES:
            why = f"its {width} units are coupled among themselves, which is followed up to "
            return Group(name, width, obstacle=f"{why}{_MOST_CLASSES}")
        merged: dict[tuple[int, str | None], list[Link]] = {}
        members: list[Tensor] = []
        seen: set[int] = set()
        for unit in range(width):
            if unit in seen:
                continue
            links = self._links(module, [unit])
            together = torch.cat(
                [link.indices for link in links if link.layer is module and link.side != "inputs"]
            )
            seen |= set(together.tolist())
            for link in links:
                numbered = torch.full_like(link.indices, len(members))
                merged.setdefault((link.key, link.side), []).append(replace(link, roots=numbered))
            members.append(torch.unique(together))
        links = [
            replace(
                parts[0],
                roots=torch.cat([part.roots for part in parts]),
                indices=torch.cat([part.indices for part in parts]),
            )
            for parts in merged.values()
        ]
        return Group(name, len(members), links, members=members)

    def _links(self, module: nn.Module, units: list[int]) -> list[Link]:
        pruner = self._graph.get_pruner_of_module(module)
        with _bounded(self._largest, self._names):
            group = self._graph.get_pruning_group(module, pruner.prune_out_channels, units)
        return [self._link(item) for item in group]

    def _link(self, item: Any) -> Link:
        node = item.dep.target
        module = node.module
        layer = module if id(module) in self._names else None
        side: layers.Side | None = None
        if layer is not None:
            inputs = item.dep.handler.__name__.startswith("prune_in")
            side = "inputs" if inputs else "outputs"
            if isinstance(layer, (*layers.BATCH_NORMS, nn.PReLU)) or layers.is_depthwise(layer):
                side = "channels"
        name = self._names[id(module)] if layer is not None else operation(node)
        sources = tuple(id(source) for source in node.inputs)
        return Link(
            key=id(node),
            layer=layer,
            name=name,
            side=side,
            roots=torch.tensor(item.root_idxs, dtype=torch.long),
            indices=torch.tensor(item.idxs, dtype=torch.long),
            sources=sources,
            joins="cat" in name.lower() and layer is None,
        )

    def _obstacle(self, link: Link) -> str | None:
        if link.layer is None:
            return self._obstacle_of_operation(link)
        if link.name in self._kept:
            return f"{link.name}: {self._kept[link.name]}"
        why = layers.obstacle(link.layer)
        depthwise = self._tp.ops.module2type(link.layer) == self._tp.ops.OPTYPE.DEPTHWISE_CONV
        if why is None and depthwise and not layers.is_depthwise(link.layer):
            why = "it has one output and several inputs a group"
        return None if why is None else f"{link.name}: {why}"

    def _obstacle_of_operation(self, link: Link) -> str | None:
        node = next(node for node in self._graph.module2node.values() if id(node) == link.key)
        if node.type == self._tp.ops.OPTYPE.OUTPUT:
            return "its units are outputs of the model"
        if isinstance(node.module, nn.Parameter):
            return "it is coupled with a parameter that belongs to no known layer"
        if isinstance(node.module, Entrance):
            return "it is coupled with an input of the model"
        kind = operation(node)
        if kind in CHANNELWISE:
            if kind == "cat" and any(
                source is None or "AccumulateGrad" in source.name()
                for source, _ in node.grad_fn.next_functions
            ):
                return "it is concatenated with something that no gradient reaches"
            return None
        if kind in ("addmm", "mm") and len(node.outputs) == 1:
            # Inside of a Linear on three or more axes, whose own node is the view that follows.
            (outer,) = node.outputs
            inner = isinstance(outer.module, nn.Linear) and "View" in outer.grad_fn.name()
            if inner and id(outer.module) in self._names:
                return None
        return f"it goes through an operation that may mix channels ({node.grad_fn.name()})"


@contextmanager
def _bounded(most: int, names: Mapping[int, str]) -> Iterator[None]:
    """End a walk through the graph that leads to units that there are not.

    Where a tensor meets its own flattened form, or a slice of itself, torch-pruning takes units for
    one another back and forth, with more or higher numbers each time, and would not stop.
    """
    groups = importlib.import_module("torch_pruning.dependency.group").Group
    add = groups.add_dep

    def add_dep(group: Any, dep: Any, idxs: Any) -> None:
        layer, limit = dep.target.module, most
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            pass  # its slope is that of all channels
        elif id(layer) in names and isinstance(layer, layers.KNOWN):
            inputs = dep.handler.__name__.startswith("prune_in")
            limit = layers.width(layer, "inputs" if inputs else "outputs")
        if len(idxs) > most or any(index.idx >= limit for index in idxs):
            raise ValueError("its units are coupled among themselves, or by broadcasting")
        add(group, dep, idxs)

    groups.add_dep = add_dep
    try:
        yield
    finally:
        groups.add_dep = add


def _map_flattened(graph: Any) -> None:
    """Map channels to columns where one or three axes are flattened, as it is done for two."""
    mapping = importlib.import_module("torch_pruning.dependency.index_mapping")
    shapes = importlib.import_module("torch_pruning.dependency.shape_infer")
    for node in graph.module2node.values():
        size: Sequence[int] = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
        if len(size) not in (3, 5) or "reshape" not in str(node.module).lower():
            continue
        wide = next((shapes.infer_in_channels_recursively(graph, n, [0]) for n in node.outputs), 0)
        per_channel = 1
        for length in size[2:]:
            per_channel *= int(length)
        if wide != int(size[1]) * per_channel or per_channel == 1:
            continue
        for source in node.inputs:
            for dependency in node.dependencies:
                if dependency.target is source:
                    dependency.index_mapping[0] = mapping._FlattenIndexMapping(per_channel, True)
            for dependency in source.dependencies:
                if dependency.target is node:
                    dependency.index_mapping[0] = mapping._FlattenIndexMapping(per_channel, False)
