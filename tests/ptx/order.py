"""The order in which segments run where threads are at several: a place where paths meet comes after the paths, and
what follows a loop after the loop, so that threads wait there for each other."""

from __future__ import annotations


def components(nodes: list[int], edges: dict[int, list[int]]) -> list[list[int]]:
    """Strongly connected ones, each before those that lead to it (Tarjan, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    inside, found, own = set(), [], set(nodes)
    for root in nodes:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        stack.append(root)
        inside.add(root)
        path = [(root, iter(edges[root]))]
        while path:
            node, rest = path[-1]
            goal = next((g for g in rest if g in own and (g not in index or g in inside)), None)
            if goal is None:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == index[node]:
                    cut = stack.index(node)
                    found.append(stack[cut:])
                    inside -= set(stack[cut:])
                    del stack[cut:]
            elif goal in index:
                low[node] = min(low[node], index[goal])
            else:
                index[goal] = low[goal] = len(index)
                stack.append(goal)
                inside.add(goal)
                path.append((goal, iter(edges[goal])))
    return found


def ordered(nodes: list[int], edges: dict[int, list[int]], entry: int) -> list[int]:
    """Nodes that are reached, each behind what leads to it, but for the way back in a loop."""
    found: list[int] = []
    for part in reversed(components([entry, *(n for n in nodes if n != entry)], edges)):
        if len(part) == 1:
            found += part
            continue
        own = set(part)
        reached = [g for n in nodes if n not in own for g in edges[n] if g in own]
        head = entry if entry in own else min(reached, default=min(part))
        without = {n: [g for g in edges[n] if g in own and g != head] for n in part}
        found += ordered(sorted(part), without, head)
    return found
